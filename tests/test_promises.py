"""The promises of docs/design.md name tests that exist, and mark those that plain `pytest` leaves out."""

import ast
import re

import pytest

from places import ROOT, TESTS

MARK = " (processes)"


def promises():
    """For each row of the table its number, and its tests as (file, name, whether the row marks it)."""
    table = (ROOT / "docs" / "design.md").read_text().partition("## Promises")[2].partition("\n## ")[0]
    for number, cells in re.findall(r"^\| (\d+) \|(.*)$", table, re.MULTILINE):
        found = re.findall(r"`(test_\w+\.py)::(test_\w+)`(\s\(processes\))?", cells)
        yield number, [(file, name, mark == MARK) for file, name, mark in found]


def starts_processes(file, name):
    """Whether this test has the marker `processes`."""
    (path,) = TESTS.rglob(file)
    tree = ast.parse(path.read_text())
    (test,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    module_marks = (node for node in tree.body if isinstance(node, ast.Assign))
    marks = [ast.unparse(node) for node in (*test.decorator_list, *module_marks)]
    return any("pytest.mark.processes" in mark for mark in marks)


@pytest.mark.parametrize(
    ("number", "tests"), list(promises()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_promise_names_tests_that_exist_and_how_they_are_run(number, tests):
    assert tests, f"promise {number} is guarded by no test"
    assert [(file, name, starts_processes(file, name)) for file, name, _ in tests] == tests
