"""Where a chain is cut, and the network that comes of it."""
