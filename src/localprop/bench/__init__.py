"""Suites: grids of training runs, each with its result in one JSON file, and reports made of these.

suite.py (what is to be run), runner.py (runs it), collect.py (from a run folder to a record), record.py (the JSON),
live.py (the table while it runs), series.py (runs that differ only in their seeds). In reports/: groups.py makes
comparisons of series, labels.py names them within a suite, ways.py across suites. tables.py, pictures.py and
gap.py show them, frames.py and placing.py draw panels and labels, measured.py says how they were measured. report.py
writes a suite's report; with published.py and costs.py page.py puts it beside figures of others. published.yaml and
costs.yaml have these figures.
"""
