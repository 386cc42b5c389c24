"""The process that gets a model from the network, and the daemon's side of the connection to it."""
