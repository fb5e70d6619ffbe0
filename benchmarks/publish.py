"""Writes the results of the suite cifar10-small beside the published ones.

python benchmarks/publish.py

Reads benchmarks/results/cifar10-small/ (records of `localprop bench`) and benchmarks/published.yaml; writes
docs/results.md with its pictures, and the part of README.md between `<!-- results -->` and `<!-- /results -->`.
"""

import sys

from common import RESULTS, ROOT

import localprop
from localprop.bench.reports.publish import publish


def main() -> int:
    """Returns the exit code: 0, or 2 if there are no results yet."""
    folder, published = RESULTS / "cifar10-small", ROOT / "benchmarks" / "published.yaml"
    try:
        written = publish(folder, published, ROOT / "docs" / "results.md", ROOT / "README.md", "JPEG copy")
    except localprop.LocalpropError as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
