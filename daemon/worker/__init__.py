"""The process that holds one model, and the daemon's side of the connection to it."""
