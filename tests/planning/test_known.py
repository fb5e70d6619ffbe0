"""What local learning is known to cost in accuracy."""

import sys

import pytest

from localprop.planning.known import cost_in_accuracy, known_gaps
from localprop.settings.recipe import Recipe
from places import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # as for a script that lies there

import publish_known


def test_the_file_is_what_the_records_say():
    assert publish_known.TARGET.read_text(encoding="utf-8") == publish_known.content()


def test_published_gaps_are_differences_of_the_published_figures():
    (published,) = (gap for gap in known_gaps() if gap.protocol.startswith("published") and gap.method == "greedy")
    # 83.94 - 91.37, 69.34 - 75.03 and 67.00 - 72.19: arXiv 2309.17357, table 4.
    assert published.gaps == (-7.43, -5.69, -5.19)
    assert published.modules == 4


def test_a_recipe_gets_the_gaps_of_its_own_settings():
    plain = cost_in_accuracy(Recipe(modules=4, reach=0, kinetic=0.0))
    assert plain.startswith("accuracy against end-to-end training at K=4: -2.0 to -5.3 points (published: Swin-Tiny")
    assert "-6.1 points (a prototype" in plain
    ahead = cost_in_accuracy(Recipe(modules=4, reach=1, kinetic=0.1))
    assert "-0.7 points (a prototype" in ahead
    assert "published" not in ahead


@pytest.mark.parametrize(
    ("recipe", "begin"),
    [
        (
            Recipe(modules=4, method="end-to-end"),
            "it has the accuracy of end-to-end training, whose gradients it computes",
        ),
        (
            Recipe(modules=64, method="infopro"),
            "what K=64 costs in accuracy has not been measured; at K=4: -6.7 to -8.0 points",
        ),
        (
            Recipe(modules=4, method="infopro", reach=2, kinetic=0.1),
            "what infopro with reach 2 and the kinetic term costs in accuracy has not been measured",
        ),
    ],
)
def test_what_is_not_known_is_said(recipe, begin):
    assert cost_in_accuracy(recipe).startswith(begin)
