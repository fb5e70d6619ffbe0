"""Suites: grids of training runs, each with its result in one JSON file, and reports made of these.

suite.py (what is to be run), runner.py (runs it), collect.py (from a run folder to a record), record.py (the JSON),
live.py (the table while it runs), series.py (runs that differ only in their seeds). In reports/: groups.py makes
comparisons of series, labels.py names them, tables.py and pictures.py show them, placing.py places labels, report.py
writes a suite's report, published.py compares with figures of others, publish.py writes a page of both.
"""
