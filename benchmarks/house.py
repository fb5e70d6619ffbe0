"""Measures the source: folders and modules, the longest file, function and class, and the time of `localprop --help`.

python benchmarks/house.py [--json FILE]
"""

import argparse
import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import localprop

PACKAGE = Path(__file__).parents[1] / "src" / "localprop"
COMMANDS = (("--help",), ("train", "--help"), ("trian",))
RUN = """
import resource, sys
before = set(sys.modules)
sys.argv[0] = "localprop"
from localprop.cli import main
try:
    main()
except SystemExit:
    pass
used = resource.getrusage(resource.RUSAGE_SELF)
packages = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
packages = {name for name in packages if not name.startswith(("_", "cython"))}
print()
print(used.ru_utime + used.ru_stime, *sorted(packages))
"""


def main() -> None:
    """Prints the numbers, and writes them to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    numbers = {"folders": folders(), "longest": longest(), "start": [start(words) for words in COMMANDS]}
    show(numbers)
    if options.json:
        options.json.write_text(json.dumps(numbers | {"made with": localprop.provenance()}, indent=1) + "\n")


def folders() -> dict[str, int]:
    """Modules directly in each folder of the package, without its `__init__`."""
    counts: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = str(path.parent.relative_to(PACKAGE.parent))
        counts[folder] = counts.get(folder, 0) + (path.name not in ("__init__.py", "__main__.py"))
    return counts


def longest() -> dict[str, list[tuple[int, str]]]:
    """The three longest files, functions and classes: lines and names."""
    found: dict[str, list[tuple[int, str]]] = {"file": [], "function": [], "class": []}
    for path in sorted(PACKAGE.rglob("*.py")):
        place, text = str(path.relative_to(PACKAGE.parent)), path.read_text()
        found["file"].append((len(text.splitlines()), place))
        for kind, name, lines in definitions(ast.parse(text)):
            found[kind].append((lines, f"{place}: {name}"))
    return {kind: sorted(entries, reverse=True)[:3] for kind, entries in found.items()}


def definitions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, str, int]]:
    """Kind, name and lines of the functions and classes in a tree; a function's docstring counts."""
    for node in ast.iter_child_nodes(tree):
        name = within
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{within}.{node.name}".lstrip(".")
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield "class" if isinstance(node, ast.ClassDef) else "function", name, lines
        yield from definitions(node, name)


def start(words: tuple[str, ...]) -> dict[str, Any]:
    """Processor time of a command in seconds, the least of three, and the packages that it imports."""
    lines = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True)
        lines.append(done.stdout.splitlines()[-1].split())
    seconds = min(float(line[0]) for line in lines)
    return {"command": " ".join(("localprop", *words)), "seconds": round(seconds, 3), "packages": lines[0][1:]}


def show(numbers: dict[str, Any]) -> None:
    """Prints the numbers as tables."""
    print(f"{'modules':>7}  folder")
    for folder, count in numbers["folders"].items():
        print(f"{count:7}  {folder}")
    print(f"\n{sum(numbers['folders'].values())} modules in {len(numbers['folders'])} folders\n")
    for kind, entries in numbers["longest"].items():
        for lines, name in entries:
            print(f"{lines:7}  lines: {kind} {name}")
    print()
    for command in numbers["start"]:
        packages = ", ".join(command["packages"])
        print(f"{command['seconds']:7.2f}  s of processor time: {command['command']} (imports {packages})")


if __name__ == "__main__":
    main()
