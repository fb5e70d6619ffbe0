"""What a network is trained for. To add a task: a file here, and a line in `localprop.registry`."""

from localprop.registry import TASKS

__all__ = ["TASKS"]
