"""Suites: grids of training runs, each with its result in one JSON file, and reports made of these.

suite.py (what is to be run), runner.py (running it), collect.py (from a run folder to a record), record.py (the JSON),
live.py (what is seen meanwhile), report.py (what is seen afterwards), publish.py (a page beside published figures).
Of reports: settings.py and groups.py put runs together, labels.py names them, tables.py and pictures.py show them,
placing.py finds room for labels, published.py compares with figures of others.
"""
