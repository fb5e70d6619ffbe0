"""Training: the state that changes, one step of it, epochs and checkpoints."""
