"""Modules trained at the same time, in processes of their own, bit for bit as by one process.

Each process is a `Stage` of a pipeline without backward: it trains consecutive modules and hands their detached output
to the next. The files: job.py (the processes as a group, and how one
that fails ends all), messages.py (a batch on the wire), pipeline.py (the stage), replicas.py (several processes for
one stage), traces.py (when each did what), launch.py (starting the processes).
"""

from localprop.parallel.job import Job, Lost, in_job, join
from localprop.parallel.launch import launch
from localprop.parallel.pipeline import PipelineStage

__all__ = ["Job", "Lost", "PipelineStage", "in_job", "join", "launch"]
