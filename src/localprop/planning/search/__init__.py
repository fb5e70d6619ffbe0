"""The fastest way to train within any amount of memory: by dynamic programming over a chain's units."""
