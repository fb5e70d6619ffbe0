"""Runs that a signal stops after a step."""

import os
import signal

from localprop.report.progress import Progress


def stop_at(monkeypatch, step, per_epoch, number=signal.SIGTERM):
    """Sends this process a signal after a step, counted from the first epoch on."""
    taken = Progress.step

    def interrupt(self, epoch, step_in_epoch, losses, memory):
        taken(self, epoch, step_in_epoch, losses, memory)
        if (epoch - 1) * per_epoch + step_in_epoch == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "step", interrupt)
