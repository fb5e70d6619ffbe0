"""Schedules on a clock: against times that are known from papers, or that a few lines of arithmetic give."""

import itertools
from math import inf

import pytest

from localprop.errors import ConfigError
from localprop.planning.schedules import (
    Link,
    StageTime,
    data_parallel,
    local_modules,
    one_f_one_b,
    one_f_one_b_order,
    zero_bubble,
)

SIZES = [(1, 1), (1, 4), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 32)]


def pipeline(stages, micro, forward, backward, weights=0.0, **more):
    """Equal stages, from the times of one micro-batch."""
    return [StageTime(micro * forward, micro * backward, micro * weights, **more)] * stages


@pytest.mark.parametrize(("stages", "micro"), SIZES)
@pytest.mark.parametrize("overlapped", [False, True])
def test_1f1b_has_the_bubble_that_is_known(stages, micro, overlapped):
    """(m + p - 1) (f + b): arXiv 2104.04473, section 2.2."""
    result = one_f_one_b(pipeline(stages, micro, 1.0, 1.5, 0.5), Link(), micro, overlapped)
    assert result.seconds == pytest.approx((micro + stages - 1) * 3)
    assert result.waiting == pytest.approx(((stages - 1) / (micro + stages - 1),) * stages)


@pytest.mark.parametrize(("stages", "micro"), SIZES)
@pytest.mark.parametrize(("forward", "backward", "weights"), [(1, 1, 1), (1, 1.5, 0.5), (2, 3, 1), (1, 1, 0.25)])
def test_zero_bubble_has_the_bubble_that_is_published(stages, micro, forward, backward, weights):
    """ZB-H1's is (p - 1) (f + b - w): arXiv 2401.10241, section 2."""
    result = zero_bubble(pipeline(stages, micro, forward, backward, weights), Link(), micro)
    bubble = (stages - 1) * (forward + backward - weights)
    assert result.seconds == pytest.approx(micro * (forward + backward + weights) + bubble)


def test_1f1b_keeps_no_more_micro_batches_than_stages_follow():
    for rank in range(4):
        order = one_f_one_b_order(rank, 4, 9)
        held = list(itertools.accumulate(1 if kind == "F" else -1 for kind, _ in order))
        assert max(held) == 4 - rank
        assert held[-1] == 0
        for kind in "FB":
            assert [i for own, i in order if own == kind] == list(range(9))


@pytest.mark.parametrize("pause", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("kind", ["bandwidth", "latency"])
def test_messages_of_1f1b_wait_where_torch_waits_for_them(pause, kind):
    """Two stages, two micro-batches, forward 1, backward 2, by hand.

    Rank 0: F0 at 0, F1 at 1. Rank 1: F0 at 1+c, B0 at 2+c, and only at 4+c it posts B0's gradient together with the
    receive of F1's features. So rank 0 has B0 at 4+2c, rank 1 F1 too and B1 at 5+2c, rank 0 B1 at 7+3c, which takes
    until 9+3c. Messages that travel by themselves bring F1's features in time: 9+2c.
    """
    link = Link(bandwidth=1 / pause if pause else inf) if kind == "bandwidth" else Link(latency=pause)
    stages = pipeline(2, 2, 1.0, 2.0, output=2.0)
    assert one_f_one_b(stages, link, 2).seconds == pytest.approx(9 + 3 * pause)
    assert one_f_one_b(stages, link, 2, overlapped=True).seconds == pytest.approx(9 + 2 * pause)


def test_an_optimizer_of_a_later_stage_steps_while_gradients_go_back():
    """Rank 1 is done with its last backward 2 before rank 0, and updates meanwhile; rank 0's update delays both."""
    both = one_f_one_b(pipeline(2, 4, 1.0, 2.0, update=0.5), Link(), 4)
    assert both.seconds == pytest.approx(15.5)
    stages = [StageTime(4.0, 8.0), StageTime(4.0, 8.0, update=2.0)]
    assert one_f_one_b(stages, Link(), 4).seconds == pytest.approx(15)


def test_a_pipeline_of_uneven_stages_is_bound_by_the_slow_one():
    stages = [StageTime(4.0, 8.0), StageTime(8.0, 16.0)]
    result = one_f_one_b(stages, Link(), 4)
    # The first forward, all that rank 1 does, the last backward of rank 0.
    assert result.seconds == pytest.approx(1 + 24 + 2)
    assert result.bottleneck == "rank 1"
    assert result.waiting == pytest.approx((1 - 12 / 27, 1 - 24 / 27))


def test_local_modules_have_no_bubble():
    result = local_modules([StageTime(1.0, 2.0, update=0.5, output=10.0)] * 5, Link(bandwidth=10.0))
    assert result.seconds == pytest.approx(3.5)
    assert result.waiting == pytest.approx((0.0,) * 5, abs=1e-12)


@pytest.mark.parametrize("slow", range(3))
def test_local_modules_are_as_fast_as_the_slowest(slow):
    times = [1.0, 1.0, 1.0]
    times[slow] = 1.25
    result = local_modules([StageTime(t, output=8.0) for t in times], Link(bandwidth=10.0, latency=0.01))
    assert result.seconds == pytest.approx(1.25)
    assert result.bottleneck == f"rank {slow}"
    assert result.waiting == pytest.approx(tuple(1 - t / 1.25 for t in times), abs=1e-12)


def test_a_slow_link_is_the_bottleneck_and_a_far_one_if_few_batches_are_in_flight():
    stages = [StageTime(1.0, output=5.0), StageTime(1.0, output=30.0), StageTime(1.0)]
    result = local_modules(stages, Link(bandwidth=10.0))
    assert (result.seconds, result.bottleneck) == (pytest.approx(3), "link 1-2")
    assert result.waiting == pytest.approx((2 / 3,) * 3)
    # In flight and worked on are n + 1 batches, each of which takes 1 to compute and 5 to travel.
    stages = [StageTime(1.0), StageTime(1.0)]
    for ahead in (1, 2, 3):
        result = local_modules(stages, Link(latency=5.0), ahead)
        assert (result.seconds, result.bottleneck) == (pytest.approx(6 / (ahead + 1)), "link 0-1")
    assert local_modules(stages, Link(latency=5.0), 5).seconds == pytest.approx(1)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_rank_waits_while_the_next_one_reads_ahead(micro_batches):
    """A turn takes what the rank itself computes, and what the next computes before it sends the gradient back."""
    first, middle, last = StageTime(2.0, 4.0), StageTime(3.0, 2.0, ahead=1.0), StageTime(4.0, ahead=0.5)
    result = local_modules([first, middle, last], micro_batches=micro_batches)
    assert result.seconds == pytest.approx(2 + 1 + 4)
    assert result.waiting == pytest.approx((1 / 7, 1 - 6 / 7, 1 - 4.5 / 7))
    result = local_modules([first, StageTime(3.0, 3.0, ahead=1.0), last], micro_batches=micro_batches)
    assert result.seconds == pytest.approx(1 + 3 + 0.5 + 3)
    result = local_modules([first, middle, StageTime(9.0, ahead=0.5)], micro_batches=micro_batches)
    assert (result.seconds, result.bottleneck) == (pytest.approx(9.5), "rank 2")
    # Nothing is in flight meanwhile: features and gradient both take their time.
    result = local_modules([StageTime(2.0, 4.0, output=10.0), middle], Link(bandwidth=10.0, latency=0.25))
    assert result.seconds == pytest.approx(2 + 1 + 4 + 2 * (1 + 0.25))


def test_data_parallel_reduces_behind_backward_or_beside_it():
    """Four ranks, three buckets of 100 bytes at 100 per second: 2 * 3/4 seconds each."""
    stages = [StageTime(1.0, 1.0, 1.0, 0.5, gradients=100.0)] * 3
    link = Link(bandwidth=100.0)
    assert data_parallel(stages, 4, link, overlapped=False).seconds == pytest.approx(10.5 + 4.5)
    # Backward ends at 9; the last bucket is reduced behind it.
    result = data_parallel(stages, 4, link)
    assert result.seconds == pytest.approx(9 + 1.5 + 1.5)
    assert result.waiting == pytest.approx((1.5 / 12,) * 4)
    assert result.bottleneck == "every rank"
    # Slower than backward, buckets wait for each other: from 5, when the first is there.
    slow = data_parallel(stages, 4, Link(bandwidth=10.0))
    assert (slow.seconds, slow.bottleneck) == (pytest.approx(5 + 3 * 15 + 1.5), "every link")
    assert data_parallel(stages, 4, Link(latency=0.01), overlapped=False).seconds == pytest.approx(10.5 + 0.06)
    assert data_parallel(stages, 1, link).seconds == pytest.approx(10.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: one_f_one_b([StageTime(1.0)] * 4, Link(), 3), "micro_batches is 3; it must be at least 4"),
        (lambda: zero_bubble([StageTime(1.0)] * 4, Link(), 3), "micro_batches is 3; it must be at least 4"),
        (lambda: local_modules([StageTime(1.0)], Link(), 0), "in_flight is 0"),
        (lambda: data_parallel([StageTime(1.0)], 0), "ranks is 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_an_error_of_one_line(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_replicas_talk_behind_the_last_micro_batch_and_the_next_stage_waits_for_it():
    stages = [StageTime(0.4, gradients=30.0), StageTime(3.4)]  # the first talks for 3 s
    whole = local_modules(stages, Link(bandwidth=10.0), replicas=2)
    assert whole.seconds == pytest.approx(3.4)
    parts = local_modules(stages, Link(bandwidth=10.0), replicas=2, micro_batches=16)
    assert 5 < parts.seconds < 0.4 + 3 + 3.4  # the parts that are in flight do not last so long


@pytest.mark.parametrize("micro_batches", [1, 4, 16])
def test_micro_batches_of_even_stages_change_nothing(micro_batches):
    stages = [StageTime(2.0, output=10.0)] * 4
    result = local_modules(stages, Link(bandwidth=10.0), micro_batches=micro_batches)
    assert result.seconds == pytest.approx(2.0)
