"""Every test computes in one thread: roundings are the same on every machine then, and a fork loses no threads."""

import torch

torch.set_num_threads(1)
