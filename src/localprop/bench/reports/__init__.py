"""Tables and pictures of a suite, made of its records alone."""
