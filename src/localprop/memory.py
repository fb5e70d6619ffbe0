"""What training takes."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: the allocator's on CUDA, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
