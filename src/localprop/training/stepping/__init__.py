"""Training steps that do not wait for the device: masked where a number is not finite, captured as CUDA graphs."""
