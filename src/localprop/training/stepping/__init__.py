"""An optimizer's step without waiting for the device: masked where a number is not finite, recorded as CUDA graphs."""
