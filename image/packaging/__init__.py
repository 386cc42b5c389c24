"""The lock of the Debian packages, the folder that holds them, and what differs: docs/reproducible.md explains."""
