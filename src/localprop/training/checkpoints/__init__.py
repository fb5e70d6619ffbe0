"""Checkpoints: the file of a part, the folder of parts, and checks of what a part gives back to a module."""
