"""A run: from its settings to what its folder holds, and what is done with that."""
