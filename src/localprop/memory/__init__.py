"""What a computation takes: measured on a device, and predicted on fake tensors."""
