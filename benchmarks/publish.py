"""Writes docs/results.md from the committed records, and its first part into the README.

python benchmarks/publish.py

The page is what `localprop bench report` makes of the folders of records that are there, beside published figures.
Between `<!-- results -->` and `<!-- /results -->` the README has the same as the page.
"""

import os
import re
import sys
from pathlib import Path

from common import RESULTS, ROOT
from publish_gpu import filled

import localprop
from localprop.bench.reports.report import write_report

SUITES = ("four", "paper-quick", "gap", "gap-vit", "cifar10-small")
NOTE = "CIFAR-10 is a copy in JPEG."
START, END = "<!-- results -->", "<!-- /results -->"


def folders() -> list[Path]:
    """Those of the suites that have records, relative to the root."""
    return [Path("benchmarks/results", name) for name in SUITES if list((RESULTS / name).glob("*.json"))]


def first_part(page: str) -> str:
    """What stands between the markers, with links that lead from the root."""
    text = page.partition(START)[2].partition(END)[0].strip()
    return re.sub(r"\]\((?!\w+:)", "](docs/", text.replace("](#", "](results.md#"))


def main() -> int:
    """Returns the exit code: 0, or 2 if records cannot be read."""
    os.chdir(ROOT)  # the page names the folders as a user would
    page, readme = ROOT / "docs" / "results.md", ROOT / "README.md"
    try:
        written = write_report(*folders(), output=Path("docs/results.md"), published=True, note=NOTE)
    except localprop.LocalpropError as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    readme.write_text(filled(readme.read_text(), first_part(page.read_text()), START, END, readme))
    print(*(f"wrote {path}" for path in [*written, readme.name]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
