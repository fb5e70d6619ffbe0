"""Suites: grids of training runs, each with its result in one JSON file, and reports made of these.

suite.py (what is to be run), runner.py (running it), collect.py (from a run folder to a record), record.py (the JSON),
live.py (what is seen meanwhile), report.py (what is seen afterwards), publish.py (a page beside published figures).
Of reports: settings.py and groups.py put runs together, labels.py names them, tables.py and pictures.py show them,
placing.py finds room for labels, published.py compares with figures of others.
"""

from localprop.bench.live import SuiteView
from localprop.bench.report import write_report
from localprop.bench.runner import Runner
from localprop.bench.suite import find_suite, load_suite, shipped_suites

__all__ = ["Runner", "SuiteView", "find_suite", "load_suite", "shipped_suites", "write_report"]
