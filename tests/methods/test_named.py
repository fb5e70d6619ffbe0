"""Methods that are made of parts: what they fill in, and what a user's own choice does."""

import pytest

from localprop import localize
from localprop.division.resolve import resolved, with_methods_defaults
from localprop.errors import ConfigError
from localprop.heads.conv import ConvHead
from localprop.heads.linear import LinearHead
from localprop.heads.mlp import MlpHead
from localprop.network.kinetic import kinetic_weight
from localprop.settings.config import LocalConfig
from localprop.settings.recipe import Recipe
from tiny import SIZE, build, split


def test_trgl_is_greedy_with_a_linear_head_and_the_kinetic_term():
    net = localize(build("vit"), 4, "trgl", cuts=["blocks.0", "blocks.1", "blocks.2"], input_size=SIZE)
    assert (net.recipe.head, net.recipe.kinetic) == ("linear", 0.1)
    assert [type(module.local_loss.head) for module in net.local_modules[:-1]] == [LinearHead] * 3
    # tau = 10, and 5 in the first half: 1 / (2 tau).
    assert [module.kinetic for module in net.local_modules] == [1 / 10, 1 / 10, 1 / 20, 1 / 20]


def test_a_users_choice_wins():
    net = split("vit", 2, "trgl", head="conv", kinetic=0.5)
    assert isinstance(net.local_modules[0].local_loss.head, ConvHead)
    assert [module.kinetic for module in net.local_modules] == [0.5, 0.25]
    assert split("vit", 2, "trgl", kinetic=0).local_modules[0].kinetic == 0


def test_other_methods_have_the_usual_head_and_no_kinetic_term():
    net = split("vit", 2, "greedy")
    assert (net.recipe.head, net.recipe.kinetic) == ("mlp", 0)
    assert isinstance(net.local_modules[0].local_loss.head, MlpHead)
    assert [module.kinetic for module in net.local_modules] == [0, 0]


def test_settings_are_filled_in_and_nothing_else():
    own = LocalConfig(method="trgl", budget="1GiB")
    filled = with_methods_defaults(own)
    assert (filled.head, filled.kinetic, filled.budget, filled.modules) == ("linear", 0.1, "1GiB", None)
    assert with_methods_defaults(LocalConfig(method="of-a-plugin")).head == "mlp"


@pytest.mark.parametrize(
    ("index", "count", "expected"),
    [(0, 1, 1), (0, 2, 1), (1, 2, 0.5), (0, 3, 1), (1, 3, 1), (2, 3, 0.5), (1, 4, 1), (2, 4, 0.5)],
)
def test_the_kinetic_term_is_halved_in_the_second_half(index, count, expected):
    assert kinetic_weight(1.0, index, count) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kinetic": -1.0}, "kinetic is -1.0; it must be at least 0"),
        ({"kinetic": float("nan")}, "kinetic is nan"),
        ({"head_kwargs": {"depth": 2}}, "head mlp has no option 'depth'; it has none"),
    ],
)
def test_impossible_settings_are_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        resolved(Recipe.of(**settings))
    assert "\n" not in str(error.value)
