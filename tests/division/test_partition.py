"""The balanced partition against every other partition, and stages of well-known shapes."""

import itertools
import random

import pytest

from localprop import localize
from localprop.division.partition import balanced, balanced_exact, module_ends, most_modules, stage_ends
from localprop.errors import ChainError, ConfigError
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.tracing.units import Chain, Unit
from tiny import SIZE, build, traced_once, units_of


def every_partition(size, modules):
    for inner in itertools.combinations(range(1, size), modules - 1):
        yield [*inner, size]


def quality(ends, cost):
    costs = [cost(index, *run) for index, run in enumerate(itertools.pairwise([0, *ends]))]
    return max(costs), sum(c * c for c in costs)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("additive", [False, True])
def test_balanced_is_the_best_of_all_partitions(seed, additive):
    generator = random.Random(seed)
    size = generator.randint(1, 9)
    # Few values, so that many partitions tie for the largest run and the squares have to decide.
    units = [generator.randint(0, 6) for _ in range(size)]
    runs = list(itertools.combinations(range(size + 1), 2))
    table = {(index, *run): generator.randint(0, 12) for index in range(size) for run in runs}

    def cost(index, start, stop):
        return sum(units[start:stop]) if additive else table[index, start, stop]

    for modules in range(1, size + 1):
        ends = balanced(size, modules, cost)
        assert len(ends) == modules
        assert ends in every_partition(size, modules)
        assert quality(ends, cost) == min(quality(other, cost) for other in every_partition(size, modules))


def test_balanced_evens_out_the_runs_below_the_largest():
    costs = [9, 1, 1, 1, 1]
    assert balanced(5, 3, lambda _, i, j: sum(costs[i:j])) == [1, 3, 5]


def test_balanced_asks_for_the_cost_of_a_run_once():
    asked = []

    def cost(index, start, stop):
        asked.append((index, start, stop))
        return stop - start

    balanced(12, 4, cost)
    assert len(asked) == len(set(asked))
    # Of the first and the last it asks only where these can be, and every run leaves units for the others.
    assert all(index <= start < stop <= 9 + index for index, start, stop in asked)
    assert all((start == 0, stop == 12) == (index == 0, index == 3) for index, start, stop in asked)


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


def depths(*values):
    return Chain(tuple(Unit(str(i), (8,), (), {}, (), depth) for i, depth in enumerate(values)), (3, 32, 32))


SWIN = depths(0, 1, 1, 0, 1, 1, 0, 1, 0)  # a stem, blocks, downsamplings, the classifier


@pytest.mark.parametrize(("min_depth", "most"), [(0, 9), (1, 5), (2, 2), (3, 1), (5, 1), (6, 0)])
def test_most_modules_of_a_least_depth(min_depth, most):
    """Against every choice of ends: each module has so many blocks, and ends with one, or with the last unit."""

    def allowed(ends):
        runs = [[unit.depth for unit in SWIN[start:stop]] for start, stop in itertools.pairwise([0, *ends])]
        return all(sum(run) >= min_depth and (run[-1] or stop == 9) for run, stop in zip(runs, ends, strict=True))

    found = max(
        (count for count in range(1, 10) for ends in every_partition(9, count) if not min_depth or allowed(ends)),
        default=0,
    )
    assert most_modules(SWIN, range(1, 10), min_depth) == found == most


def test_modules_end_where_they_may():
    assert module_ends(SWIN, range(1, 10), 0) == list(range(1, 10))
    assert module_ends(SWIN, range(1, 10), 1) == [2, 3, 5, 6, 8, 9]
    assert module_ends(SWIN, [4, 6, 9], 2) == [6, 9]
    assert most_modules(SWIN, [4, 6, 9], 1) == 2


def cut(name, modules=None, **options):
    with traced_once(name):
        return localize(build(name), modules, input_size=SIZE, **options)


def ends_of(net):
    return list(itertools.accumulate(len(module.units) for module in net.local_modules))


@pytest.mark.parametrize("partition", ["balanced", "compute"])
@pytest.mark.parametrize(("min_depth", "modules"), [(1, 3), (1, 2), (2, 2), (3, 1)])
def test_every_module_has_the_least_depth(min_depth, modules, partition):
    units = units_of("vit")
    ends = ends_of(cut("vit", modules, method="greedy", min_depth=min_depth, partition=partition))
    for start, stop in itertools.pairwise([0, *ends]):
        assert sum(unit.depth for unit in units[start:stop]) >= min_depth
        assert units[stop - 1].depth or stop == len(units)


def test_as_many_modules_as_blocks():
    # A stem goes with what follows it, and so does a downsampling; the classifier with what comes before.
    assert ends_of(cut("swin", 3, method="greedy")) == [2, 3, 6]


MISTAKES = [
    (
        {"modules": 4},
        ChainError,
        ["4 modules", "6 units", "at least 1 of its 3 blocks", "at most 3: layers.0.blocks.0"],
    ),
    ({"modules": 2, "min_depth": 2}, ChainError, ["2 modules", "at least 2 of its 3 blocks", "at most 1"]),
    ({"modules": 7, "min_depth": 0}, ChainError, ["7 modules", "6 units: at most 6: patch_embed"]),
    ({"modules": 2, "min_depth": -1}, ConfigError, ["min_depth is -1", "at least 0"]),
    ({"modules": 3, "partition": "stage"}, ChainError, ["3 modules", "2 stages", "at most 2"]),
]


@pytest.mark.parametrize(("options", "error", "words"), MISTAKES)
def test_a_depth_that_cannot_be_is_an_error_of_one_line(options, error, words):
    with pytest.raises(error) as caught:
        cut("swin", **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_one_module_has_whatever_depth_there_is():
    assert ends_of(cut("swin", method="end-to-end", min_depth=9)) == [6]


@pytest.mark.parametrize(("name", "reach"), [("resnet", 0), ("swin", 2)])
def test_partition_by_compute_makes_the_slowest_module_fastest(name, reach):
    """Against every other cut, by the expected times of whole steps, in a process for each module.

    A head that reads ahead is computed in the process of the module that it reads.
    """

    def slowest(net):
        steps = [simulate_step(net, OptimConfig(opt="sgd"), 32, SIZE, modules=range(k, k + 1)) for k in range(2)]
        return max(step.seconds for step in steps)

    options = {"method": "greedy", "reach": reach}
    units = units_of(name)
    times = {end: slowest(cut(name, cuts=[units[end - 1].name], **options)) for end in range(1, len(units))}
    chosen, other = (
        ends_of(cut(name, 2, min_depth=0, partition=partition, **options))[0] for partition in ("compute", "balanced")
    )
    assert times[chosen] <= 1.02 * min(times.values())
    assert times[other] > 1.1 * min(times.values())  # memory is another matter


@pytest.mark.parametrize("seed", range(20))
def test_cuts_for_exact_training_are_the_best_of_all(seed):
    generator, size = random.Random(seed), 7
    needs, outputs = ([generator.randint(1, most) for _ in range(size)] for most in (50, 30))

    def peak(ends):
        spans = list(itertools.pairwise([0, *ends]))
        waiting = [sum(outputs[stop - 1] for _, stop in spans[:k]) for k in range(len(spans))]
        return max(beside + sum(needs[i:j]) for beside, (i, j) in zip(waiting, spans, strict=True))

    for count in (1, 2, 3, 5, size):
        ends = balanced_exact(size, count, lambda _, i, j: sum(needs[i:j]), lambda j: outputs[j - 1])
        partitions = list(every_partition(size, count))
        lowest = [own for own in partitions if peak(own) == min(map(peak, partitions))]
        assert ends in lowest
        # All runs but the last run twice.
        assert count == 1 or ends[-2] == min(own[-2] for own in lowest)


@pytest.mark.parametrize(("name", "modules"), [("vit", 2), ("vit", 3), ("resnet", 3)])
def test_exact_training_is_cut_where_its_peak_is_lowest(name, modules):
    def peak(**options):
        return simulate_step(cut(name, method="end-to-end", **options), OptimConfig(opt="sgd"), 32, SIZE).peak

    units = units_of(name)
    blocks = [unit.name for unit in units if unit.depth]
    peaks = [peak(cuts=list(cuts)) for cuts in itertools.combinations(blocks[:-1], modules - 1)]
    assert min(peaks) <= peak(modules=modules) <= 1.01 * min(peaks)


@pytest.mark.parametrize(("name", "modules"), [("resnet", 3), ("swin", 2)])
def test_exact_training_is_cut_between_stages_where_its_peak_is_lowest(name, modules):
    def peak(**options):
        return simulate_step(cut(name, method="end-to-end", **options), OptimConfig(opt="sgd"), 32, SIZE).peak

    units = units_of(name)
    ends = stage_ends(units)
    stages = [units[end - 1].name for end in ends[:-1]]
    assert set(ends_of(cut(name, modules, method="end-to-end", partition="stage"))) <= set(ends)
    peaks = [peak(cuts=list(cuts)) for cuts in itertools.combinations(stages, modules - 1)]
    assert min(peaks) <= peak(modules=modules, partition="stage") <= 1.01 * min(peaks)


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_exact_training_by_compute_makes_the_slowest_module_fastest(name):
    """Both turns of a module counted."""

    def slowest(net):
        return max(simulate_step(net, OptimConfig(opt="sgd"), 32, SIZE).module_seconds)

    units = units_of(name)
    times = {end: slowest(cut(name, cuts=[units[end - 1].name], method="end-to-end")) for end in range(1, len(units))}
    chosen = ends_of(cut(name, 2, min_depth=0, partition="compute", method="end-to-end"))[0]
    assert times[chosen] <= 1.02 * min(times.values())
