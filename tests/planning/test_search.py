"""The planner's search against every way there is, on small chains of random costs."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from localprop.memory.cost import End, Reach, module_end, module_peak
from localprop.memory.part import Cost
from localprop.planning.search.exact import ExactSearch
from localprop.planning.search.fronts import front
from localprop.planning.search.local import LocalSearch, Module
from localprop.planning.search.runs import Runs, Units
from localprop.planning.search.ways import States

KINDS = ("none", "cheap", "whole")
LAST = ("none", "cheap")
NOTHING = States()


def random_cost(draw, output, gradients):
    kept, forward, backward = draw.randint(0, 30), draw.randint(0, 60), draw.randint(0, 45)
    return Cost(kept, forward, backward, output, draw.random() < 0.6, draw.random() < 0.3, gradients, draw.random())


def random_units(draw, size, first_differs=True, ahead=(), frozen=()):
    inner, first = [], []
    for _ in range(size):
        output, gradients = draw.randint(1, 12), draw.randint(0, 6)
        inner.append({kind: random_cost(draw, output, gradients) for kind in KINDS})
        first.append({kind: random_cost(draw, output, gradients) for kind in KINDS})
    return Units(inner, first if first_differs else [first[0], *inner[1:]], LAST, ahead, frozen)


def divisions(size, modules=None):
    for count in range(1, size + 1) if modules is None else [modules]:
        for inner in itertools.combinations(range(1, size), count - 1):
            yield list(itertools.pairwise([0, *inner, size]))


def choices(units, start, stop, shared=0):
    """What each unit of a module may compute again, in all ways."""
    for names in itertools.product(KINDS, repeat=stop - start):
        ahead, last = names[:shared], names[-1]
        if set(ahead) <= set(units.ahead) and (last in LAST or len(ahead) == stop - start):
            yield names


def costs_of(units, start, names, shared=0):
    # Of a module that begins with frozen units, no input needs a gradient up to the first that is trained.
    free = 0 if shared else units.free(start)
    return [(units.first if i < free else units.inner)[start + i][name] for i, name in enumerate(names)]


def fastest(ways, limit):
    return min((seconds for need, seconds in ways if need <= limit), default=None)


def limits(ways):
    needs = sorted({need for need, _ in ways})
    return [needs[0] - 1, *needs[:: max(len(needs) // 25, 1)]]


@pytest.mark.parametrize("seed", range(12))
def test_a_front_is_what_nothing_else_beats(seed):
    draw = random.Random(seed)
    ways = [(draw.randint(0, 20), draw.randint(0, 20)) for _ in range(60)]
    need, seconds = np.array(ways, float).T
    found = front(need, seconds, np.arange(60), np.arange(60))
    best = {own for own in ways if not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in ways)}
    assert list(zip(found.need, found.seconds, strict=True)) == sorted(best)
    assert [ways[i] for i in found.choice] == sorted(best)
    thinned = front(need, seconds, np.arange(60), np.arange(60), most=4)
    assert len(thinned.need) <= 4
    assert set(zip(thinned.need, thinned.seconds, strict=True)) <= best
    assert thinned.need[0] == found.need[0]
    assert thinned.seconds[-1] == found.seconds[-1]


@pytest.mark.parametrize("seed", range(12))
def test_one_module_is_the_best_of_all_ways_to_recompute_its_units(seed):
    draw = random.Random(seed)
    units = random_units(draw, 5)
    auxiliary = random_cost(draw, 0, 4)
    runs = Runs(units)
    for start, stop in itertools.combinations(range(6), 2):
        end = module_end(auxiliary, units.output(stop - 1))
        ways = []
        for names in choices(units, start, stop):
            own = costs_of(units, start, names)
            ways.append((module_peak(own, end), sum(cost.seconds for cost in own) + auxiliary.seconds))
        found = runs.front(start, stop, end)
        for limit in limits(ways):
            way = found.within(limit)
            assert (None if way is None else found.seconds[way]) == pytest.approx(fastest(ways, limit))
            if way is not None:
                names = runs.choices(start, stop, end, way)
                own = costs_of(units, start, names)
                assert module_peak(own, end) == found.need[way]
                assert sum(cost.seconds for cost in own) + auxiliary.seconds == pytest.approx(found.seconds[way])


def every_local(units, count, module, states=NOTHING):
    for division in divisions(len(units), count):
        modules = [module(index, *pair) for index, pair in enumerate(division)]
        beside = sum(own.beside for own in modules) * (1 + states.always)
        best = []
        for (start, stop), own in zip(division, modules, strict=True):
            ways = []
            for names in choices(units, start, stop, own.shared):
                costs = costs_of(units, start, names, own.shared)
                seconds = sum(cost.seconds for cost in costs) + own.end.seconds
                kept = states.own * (own.weights + own.beside)
                ways.append((kept + module_peak(costs, own.end, own.shared), seconds))
            best.append([(need, fastest(ways, need)) for need in sorted({need for need, _ in ways})])
        yield beside, best


def auxiliary_nets(draw, size, reach=False, most=0):
    """What makes local modules, with auxiliary nets of at most so many bytes; heads may read one unit ahead."""
    auxiliaries, heads = ([random_cost(draw, 0, draw.randint(0, 8)) for _ in range(size)] for _ in range(2))
    weights = [draw.randint(0, most) for _ in range(size)]

    def build(units):
        def module(index, start, stop):
            ahead = reach and stop < size
            beyond = Reach([units.inner[stop]["cheap"]], heads[stop]) if ahead else None
            end = module_end(auxiliaries[start], units.output(stop - 1), beyond)
            return Module(end, int(reach and start > 0), weights[start], 3 * (stop - start) + start)

        return module

    return build


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("reach", "frozen"), [(False, ()), (True, ()), (False, (0, 1)), (True, (0, 3)), (False, (2, 3))]
)
def test_local_modules_are_the_fastest_of_all(seed, reach, frozen):
    draw = random.Random(seed)
    units = random_units(draw, 5, ahead=("cheap",), frozen=frozen)
    for options in units.inner[2:4]:  # which does not count again where a head has read them ahead
        options["cheap"] = replace(options["cheap"], forward=200)
    module = auxiliary_nets(draw, 5, reach)(units)
    for count in (1, 2, 3, 5):
        search = LocalSearch(Runs(units), count, module, range(6), lambda index: index)
        known = list(every_local(units, count, module))
        for limit in range(10, 250, 9):
            sums = ([fastest(ways, limit) for ways in modules] for _, modules in known)
            best = min((sum(own) for own in sums if None not in own), default=None)
            way = search.fastest(limit)
            assert (way and way.seconds) == (best and pytest.approx(best))
            if way:
                check_local(units, way, module, limit)
        assert search.fastest(search.least()) is not None
        assert search.fastest(0.98 * search.least()) is None


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_auxiliary_nets_count(seed):
    draw = random.Random(seed)
    units = random_units(draw, 5)
    module = auxiliary_nets(draw, 5, most=20)(units)
    for count in (2, 3):
        search = LocalSearch(Runs(units), count, module, range(6), lambda index: index)
        known = list(every_local(units, count, module))
        for limit in range(10, 250, 9):
            best = {}
            for room in (limit, 0.85 * limit):
                sums = ([fastest(ways, room - beside) for ways in modules] for beside, modules in known)
                best[room] = min((sum(own) for own in sums if None not in own), default=float("inf"))
            way = search.fastest(limit)
            # It finds no way that is not there, and one that is nearly as good as any.
            assert best[limit] - 1e-9 <= (way.seconds if way else float("inf")) <= best[0.85 * limit] + 1e-9
            if way:
                check_local(units, way, module, limit)


@pytest.mark.parametrize("seed", range(8))
def test_states_on_the_host_are_those_of_one_local_module(seed):
    """Nothing is always kept of auxiliary nets here, so the search is exact."""
    draw, states = random.Random(seed), States(own=1.5)
    units = random_units(draw, 5)
    module = auxiliary_nets(draw, 5)(units)
    for count in (1, 2, 4):
        search = LocalSearch(Runs(units), count, module, range(6), lambda index: index).keeping(states)
        known = list(every_local(units, count, module, states))
        for limit in range(20, 250, 9):
            sums = ([fastest(ways, limit) for ways in modules] for _, modules in known)
            best = min((sum(own) for own in sums if None not in own), default=None)
            way = search.fastest(limit)
            assert (way and way.seconds) == (best and pytest.approx(best))
            if way:
                check_local(units, way, module, limit, states)
        assert search.fastest(search.least()) is not None
        assert search.fastest(0.98 * search.least()) is None


def test_what_is_always_kept_of_auxiliary_nets_counts():
    draw, states = random.Random(0), States(always=2.0)
    units = random_units(draw, 5)
    module = auxiliary_nets(draw, 5, most=20)(units)
    search = LocalSearch(Runs(units), 3, module, range(6), lambda index: index).keeping(states)
    found = [way for limit in range(20, 400, 9) if (way := search.fastest(limit))]
    for way in found:
        check_local(units, way, module, 400, states)
    assert len(found) > 20


def check_local(units, way, module, limit, states=NOTHING):
    """A way needs what it says."""
    seconds = beside = peak = 0
    pairs = itertools.pairwise([0, *way.ends])
    for index, ((start, stop), names) in enumerate(zip(pairs, way.recomputation, strict=True)):
        own = module(index, start, stop)
        costs = costs_of(units, start, names, own.shared)
        kept = states.own * (own.weights + own.beside)
        peak = max(peak, kept + module_peak(costs, own.end, own.shared))
        seconds += sum(cost.seconds for cost in costs) + own.end.seconds
        beside += own.beside * (1 + states.always)
    assert peak + beside == way.need <= limit
    assert seconds == pytest.approx(way.seconds)


def every_exact(units, forward, loss, own, away=False):
    """Needs and times of all exact ways: each module's boundaries, the gradient of its output, and its own peak.

    Those of modules before may rest on the host.
    """
    size = len(units)
    for division in divisions(size):
        modules = []
        boundaries = 0
        for start, stop in division:
            output = units.output(stop - 1)
            end = loss if stop == size else End(output, 0, output)
            again = 0 if stop == size else sum(forward[start:stop])
            ways = []
            for names in choices(units, start, stop):
                costs = [(units.first if start + i == 0 else units.inner)[start + i][n] for i, n in enumerate(names)]
                seconds = sum(cost.seconds for cost in costs) + end.seconds + again
                ways.append((boundaries + sum(own[start:stop]) + module_peak(costs, end), seconds))
            modules.append([(need, fastest(ways, need)) for need in sorted({need for need, _ in ways})])
            boundaries = output if away else boundaries + output
        yield modules


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("own", [[0] * 5, [7, 0, 12, 30, 4]], ids=["", "states on the host"])
@pytest.mark.parametrize("away", [False, True], ids=["", "boundaries on the host"])
def test_exact_training_is_the_best_of_all_divisions(seed, own, away):
    draw = random.Random(seed)
    units = random_units(draw, 5, first_differs=False)
    forward = [draw.random() for _ in range(5)]
    loss = End(draw.randint(0, 20), draw.randint(0, 5), 0, draw.random())
    outputs = [units.output(i) for i in range(5)]
    ends = {stop: loss if stop == 5 else End(outputs[stop - 1], 0, outputs[stop - 1]) for stop in range(1, 6)}
    search = ExactSearch(Runs(units), forward, ends.__getitem__, own=own, away=away)
    known = list(every_exact(units, forward, loss, own, away))
    for limit in range(10, 150, 7):
        sums = ([fastest(ways, limit) for ways in modules] for modules in known)
        best = min((sum(times) for times in sums if None not in times), default=None)
        number = search.front.within(limit)
        if best is None:
            assert number is None
            continue
        way = search.way(number)
        assert way.seconds == pytest.approx(best)
        assert way.need <= limit
        seconds, needs, boundaries = 0, [], 0
        for (start, stop), names in zip(itertools.pairwise([0, *way.ends]), way.recomputation, strict=True):
            costs = [(units.first if start + i == 0 else units.inner)[start + i][n] for i, n in enumerate(names)]
            seconds += (
                sum(cost.seconds for cost in costs)
                + ends[stop].seconds
                + (0 if stop == 5 else sum(forward[start:stop]))
            )
            needs.append(boundaries + sum(own[start:stop]) + module_peak(costs, ends[stop]))
            boundaries = units.output(stop - 1) if away else boundaries + units.output(stop - 1)
        assert way.need == max(needs)
        assert way.seconds == pytest.approx(seconds)
