"""Finds the fastest settings within a budget, and those that no other beats; each of them is simulated."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from localprop.errors import PlanError
from localprop.planning.rows import PlanRow
from localprop.planning.search.costed import Kind
from localprop.planning.search.trials import Terms, Trials
from localprop.planning.search.ways import Way
from localprop.report.formats import format_bytes

_ROUNDS = 5
_CLOSE = 0.01
"""Part of a budget that may be left over without another look for what is faster."""
_POINTS = 3
"""Settings of a front that are simulated, beside the fastest."""
_NEARLY = 1.02
"""What is called the least memory, against what that is."""
_DEEPEST = 4
"""How much less memory slices may be expected to need at most."""
_LIKELY = 1.15
"""Against the budget, what a setting may be expected to need that is looked at with more micro-batches."""
_WORTH = 0.98
"""Part of the time that is left at most by what is not as usual: states on the host, or micro-batches."""


@dataclass
class Finder:
    """Finds settings of one model.

    Args:
        trials: the settings that there are, and simulated steps of them.
    """

    trials: Trials

    def front(self, kind: Kind) -> list[PlanRow]:
        """Settings from the one with the least memory to the fastest, none of which is beaten by another in both."""
        usual, trials = Terms(), self.trials
        ways = trials.ways(kind, usual)
        if ways is None:
            return []
        all_terms = [usual._replace(offload=offload) for offload in trials.offloads(kind)]
        static = [trials.static(terms) for terms in all_terms]
        states = [trials.states(terms) for terms in all_terms]
        # The very least takes much time for little.
        least = min(_NEARLY * ways.least(own) + more for own, more in zip(states, static, strict=True))
        most = max((ways.most(states[0]) + static[0]) / least, 1.0)
        rows = []
        for limit in (1.001 * least * most ** (i / _POINTS) for i in range(_POINTS + 1)):
            found = [ways.fastest(limit - more, own) for own, more in zip(states, static, strict=True)]
            for terms, way in zip(all_terms, found, strict=True):
                if way and (not terms.offload or _worth(way, found[0])):
                    rows.append(trials.row(kind, way, terms))
        best = [row for row in rows if not any(_beats(other, row) for other in rows)]
        return [row for i, row in enumerate(best) if row not in best[:i]]

    def fitting(self, kind: Kind, budget: int) -> PlanRow | None:
        """The fastest setting of a kind within `budget` bytes.

        On CUDA boundaries and optimizer states may rest on the host. The batch is divided only where nothing fits
        without: first into slices in which single units run again, then into as few micro-batches as can be. Only where
        that does not help either, the optimizer keeps its states in 8 bits. None where the model allows no setting of
        this kind, or where nothing fits even so, with one image at a time.
        """
        if self.trials.ways(kind, Terms()) is None:
            return None
        found = (
            self._on(kind, budget, terms)
            for opt in self.trials.optimizers
            for terms in self._likely(kind, budget, Terms(opt=opt))
        )
        return next((row for row in found if row), None)

    def divided(self, budget: int, other: PlanRow) -> PlanRow | None:
        """End-to-end training in the fewest micro-batches that fit a budget, if it is faster than another setting.

        None, too, where the model has batch norm, for which micro-batches are other batches.
        """
        trials = self.trials
        batch_norm = nn.modules.batchnorm._BatchNorm
        if not other.setting.same_numbers or any(isinstance(m, batch_norm) for m in trials.planner.model.modules()):
            return None
        usual = trials.baseline(Terms())
        moving = usual.step.peak - trials.static(Terms())
        for count in self._counts():
            terms = Terms(count)
            if trials.held(Terms()) + moving * trials.parts(Terms()) / count > _LIKELY * budget:
                continue
            row = trials.baseline(terms)
            if row.step.seconds > _WORTH * other.step.seconds:
                return None
            if row.step.peak <= budget:
                return row
        return None

    def nothing_fits(self, kind: Kind, budget: int) -> PlanError:
        """What is said where nothing fits."""
        trials, images = self.trials, self.trials.planner.batch_size
        one = Terms(images if images > trials.parts(Terms()) else None)
        kind = kind if trials.ways(kind, one) else "exact"
        all_terms = [one._replace(opt=opt, offload=own) for opt in trials.optimizers for own in trials.offloads(kind)]
        ways = trials.ways(kind, one)
        assert ways is not None
        terms = min(all_terms, key=lambda terms: trials.static(terms) + ways.least(trials.states(terms)))
        way = ways.fastest(1.001 * ways.least(trials.states(terms)), trials.states(terms))
        assert way is not None
        least = trials.row(kind, way, terms)
        name = replace(least.setting, micro_batches=None).name
        return PlanError(
            f"nothing fits {format_bytes(budget)}: {name} with 1 image at a time takes "
            f"{format_bytes(least.peak)}; choose a smaller model or smaller images, or raise --budget"
        )

    def _counts(self) -> list[int]:
        """Numbers of micro-batches above the one that was asked for."""
        images = self.trials.planner.batch_size
        return [count for count in range(self.trials.parts(Terms()) + 1, images + 1) if images % count == 0]

    def _likely(self, kind: Kind, budget: int, first: Terms) -> Iterator[Terms]:
        """How the batch may be divided so that something may fit, in the order in which that is tried."""
        trials, images, parts = self.trials, self.trials.planner.batch_size, self.trials.parts(first)
        ways = trials.ways(kind, first)
        assert ways is not None
        all_terms = [first._replace(offload=offload) for offload in trials.offloads(kind)]

        def least(division: float) -> float:
            """About what is needed at least where a part of the batch is at work."""
            return min(trials.held(own) + ways.least(trials.states(own)) / division for own in all_terms)

        yield first
        if least(_DEEPEST) < _LIKELY * budget:
            yield first._replace(sliced=True)
        for count in self._counts():
            if count == images or least(count / parts) < _LIKELY * budget:
                yield first._replace(micro_batches=count)

    def _on(self, kind: Kind, budget: int, terms: Terms) -> PlanRow | None:
        """The fastest setting within `budget` bytes on terms on which something may rest on the host."""
        best = self._fastest(kind, budget, terms)
        if best and best.setting.modules == 1:
            return best
        trials, ways = self.trials, self.trials.ways(kind, terms)
        assert ways is not None
        expected = ways.fastest(budget - trials.static(terms), trials.states(terms))
        # What rests on the host rules out CUDA graphs, without which the usual way would be slower.
        limit = _WORTH * best.step.device_seconds if best else math.inf
        for offload in trials.offloads(kind)[1:]:
            away = terms._replace(offload=offload)
            promised = ways.fastest(budget - trials.static(away), trials.states(away))
            if best and not (promised and _worth(promised, expected)):
                continue
            other = self._fastest(kind, budget, away)
            if other and other.seconds < limit:
                best, limit = other, other.seconds
        return best

    def _fastest(self, kind: Kind, budget: int, terms: Terms) -> PlanRow | None:
        """The fastest setting within `budget` bytes on some terms; None if there is none.

        What a step needs is composed of costs, for all settings at once. The one that this finds is simulated; where
        that says something else, it is looked for again.
        """
        trials = self.trials
        if kind == "exact" and trials.baseline(terms).peak <= budget:
            return trials.baseline(terms)
        ways, states, best = trials.ways(kind, terms), trials.states(terms), None
        assert ways is not None
        least, beside = ways.least(states), float(trials.static(terms))
        for _ in range(_ROUNDS):
            way = ways.fastest(budget - beside, states) or (None if best else ways.fastest(1.001 * least, states))
            if way is None:
                break
            row = trials.row(kind, way, terms)
            needed = row.peak - way.need
            if row.peak > budget:
                if way.need <= 1.002 * least:
                    break
                beside = needed
                continue
            if best is None or row.seconds < best.seconds:
                best = row
            if row.peak > (1 - _CLOSE) * budget or needed >= beside:
                break
            beside = needed
        return best


def _worth(way: Way, usual: Way | None) -> bool:
    """Whether a way promises enough against the usual one, if there is that."""
    return usual is None or way.seconds < _WORTH * usual.seconds


def _beats(one: PlanRow, other: PlanRow) -> bool:
    """Whether one setting is better in one of memory and time, and no worse in the other."""
    ours, theirs = ((row.peak, row.seconds) for row in (one, other))
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))
