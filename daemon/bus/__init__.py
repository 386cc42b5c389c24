"""The D-Bus side of the daemon."""
