"""The memory that a computation needs: measured on a device, and predicted on fake tensors."""
