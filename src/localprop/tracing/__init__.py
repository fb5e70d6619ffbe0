"""From a model to a chain of units: where it can be cut."""
