"""A backbone divided into local modules, and the one place where gradients are cut."""
