"""What the service processes of the product share: objects on the bus, readiness and the watchdog.

The daemon and the small root services stand on this, and it on `errors` alone; see daemon/README.md.
"""
