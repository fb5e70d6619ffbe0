"""Everything a person sees of a training run: progress, results.csv, losses.csv, curves.png, and what came out."""

from localprop.report.curves import draw_curves
from localprop.report.formats import format_accuracy, format_bytes, format_duration, format_loss, format_speed
from localprop.report.losses import LossCurve, read_losses
from localprop.report.planning import draw_plan, plan_table, processes_table
from localprop.report.progress import Progress
from localprop.report.results import EpochRow, read_results, write_results
from localprop.report.summary import final_table, next_steps
from localprop.report.texts import code, drawn, markdown, shortened
from localprop.report.timelines import draw_timeline

__all__ = [
    "EpochRow",
    "LossCurve",
    "Progress",
    "code",
    "draw_curves",
    "draw_plan",
    "draw_timeline",
    "drawn",
    "final_table",
    "format_accuracy",
    "format_bytes",
    "format_duration",
    "format_loss",
    "format_speed",
    "markdown",
    "next_steps",
    "plan_table",
    "processes_table",
    "read_losses",
    "read_results",
    "shortened",
    "write_results",
]
