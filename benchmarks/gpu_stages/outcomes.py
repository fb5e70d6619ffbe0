"""A plugin of pytest: writes the name and outcome of each test into a file as soon as it is over."""

import json
import os

import pytest

FILE = "GPU_STAGES_OUTCOMES"  # the environment variable that names the file


class Outcomes:
    """Writes a line of JSON for each test: name, outcome, seconds, and why, if it did not pass."""

    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes the outcome of a test: that of the phase (setup, call, teardown) that decides."""
        if report.when == "call" or report.outcome != "passed":
            why = None
            if report.skipped:
                why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            elif report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                why = crash.message if crash else str(report.longrepr)
            lines = (why or "").strip().splitlines()
            line = {"name": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self._write(line | ({"why": lines[0][:300]} if lines else {}))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Writes which file could not be collected."""
        if report.failed:
            line = str(report.longrepr).strip().splitlines()[-1][:300]
            self._write({"name": report.nodeid, "outcome": "failed", "seconds": 0.0, "why": line})

    def _write(self, line: dict[str, object]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Reports in the process that collects what others run."""
    if FILE in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(os.environ[FILE]))
