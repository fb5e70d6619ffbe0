"""The balanced partition against every other partition, and stages of well-known shapes."""

import itertools
import random

import pytest

from localprop.chain import Chain, Unit
from localprop.partition import balanced, stage_ends


def every_partition(size, modules):
    for inner in itertools.combinations(range(1, size), modules - 1):
        yield [*inner, size]


def quality(ends, cost):
    costs = [cost(start, stop) for start, stop in itertools.pairwise([0, *ends])]
    return max(costs), sum(c * c for c in costs)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("additive", [False, True])
def test_balanced_is_the_best_of_all_partitions(seed, additive):
    generator = random.Random(seed)
    size = generator.randint(1, 9)
    # Few values, so that many partitions tie for the largest run and the squares have to decide.
    units = [generator.randint(0, 6) for _ in range(size)]
    table = {run: generator.randint(0, 12) for run in itertools.combinations(range(size + 1), 2)}

    def cost(start, stop):
        return sum(units[start:stop]) if additive else table[start, stop]

    for modules in range(1, size + 1):
        ends = balanced(size, modules, cost)
        assert len(ends) == modules
        assert ends in every_partition(size, modules)
        assert quality(ends, cost) == min(quality(other, cost) for other in every_partition(size, modules))


def test_balanced_evens_out_the_runs_below_the_largest():
    costs = [9, 1, 1, 1, 1]
    assert balanced(5, 3, lambda i, j: sum(costs[i:j])) == [1, 3, 5]


def test_balanced_asks_for_the_cost_of_a_run_once():
    asked = []

    def cost(start, stop):
        asked.append((start, stop))
        return stop - start

    balanced(12, 4, cost)
    assert len(asked) == len(set(asked))
    assert all(0 <= start < stop <= 12 for start, stop in asked)


def stages(shapes, input_size=(3, 224, 224)):
    units = tuple(Unit(str(i), shape, parameters=(), code={}, switches=()) for i, shape in enumerate(shapes))
    return stage_ends(Chain(units, input_size))


def test_stages_of_swin():
    shapes = [(56, 56, 96)] * 3 + [(28, 28, 192)] * 3 + [(14, 14, 384)] * 7 + [(7, 7, 768)] * 3 + [(1000,)]
    assert stages(shapes) == [3, 6, 13, 17]


def test_stages_of_resnet50_whose_stem_is_narrower_than_the_first_stage():
    shapes = [(64, 56, 56)] + [(256, 56, 56)] * 3 + [(512, 28, 28)] * 4 + [(1024, 14, 14)] * 6 + [(2048, 7, 7)] * 3
    assert stages([*shapes, (1000,)]) == [4, 8, 14, 18]


def test_stages_of_resnet18_whose_stem_is_as_wide_as_the_first_stage():
    shapes = [(64, 56, 56)] * 3 + [(128, 28, 28)] * 2 + [(256, 14, 14)] * 2 + [(512, 7, 7)] * 2 + [(1000,)]
    assert stages(shapes) == [3, 5, 7, 10]


def test_stages_of_convnext_with_a_unit_for_each_downsampling():
    shapes = [(96, 56, 56)] * 4 + [(192, 28, 28)] * 4 + [(384, 14, 14)] * 10 + [(768, 7, 7)] * 4
    assert stages([*shapes, (768,), (1000,)]) == [4, 8, 18, 24]


def test_stages_of_pvt_with_tokens_in_a_row():
    shapes = [(3136, 64)] * 3 + [(784, 128)] * 3 + [(196, 320)] * 3 + [(49, 512)] * 3 + [(1000,)]
    assert stages(shapes) == [3, 6, 9, 13]


def test_a_vit_is_one_stage():
    assert stages([(197, 192)] * 13 + [(1000,)]) == [14]


def test_a_chain_of_vectors_is_one_stage():
    assert stages([(32,), (64,), (10,)]) == [3]
