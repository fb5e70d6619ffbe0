"""Modules trained at the same time, in processes of their own, bit for bit as by one process.

Each process is a `Stage` of a pipeline without backward: it trains consecutive modules and hands their detached output
to the next. The files: launch.py (starting the processes), children.py (waiting for them), loopback.py (where they
talk on one machine), agreement.py (what must be the same in all of them), job.py (the processes as a group, and how
one that fails ends all), forms.py (what a batch looks like on the wire), messages.py (sending and receiving it),
pipeline.py (the stage), replicas.py (several processes for one stage), traces.py (when each did what).
"""
