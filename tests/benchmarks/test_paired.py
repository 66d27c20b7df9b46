import numpy as np
import pytest

from benchmarks.contention import Reading, Taken
from benchmarks.paired import (
    Pair,
    Plan,
    additions,
    counted,
    error_of_median,
    interleave,
    plain_seconds,
    ratios,
)

QUIET, BUSY = Taken(0.0, 0.0, 0.0), Taken(0.5, 0.0, 0.0)


class Clock:
    """A meter that finds another process at work in the pairs it is told."""

    def __init__(self, busy: set[int]) -> None:
        self.busy, self.pair = busy, -1

    def read(self) -> Reading:
        self.pair += 1
        return Reading(0.0, 0.0, 0.0, 0.0, 0.0)

    def taken(self, before: Reading | None) -> Taken:
        return BUSY if self.pair in self.busy else QUIET


class Sides:
    """Two sides whose steps take what they are told, and the order in which they were taken."""

    def __init__(self, plain: float, watched: list[float]) -> None:
        self.order, self.taken = [], 0
        self._plain, self._watched = plain, watched

    def plain(self) -> float:
        self.order.append("plain")
        return self._plain

    def watched(self) -> float:
        self.order.append("watched")
        self.taken += 1
        return self._watched[(self.taken - 1) % len(self._watched)]


def test_pairs_alternate_and_the_warmup_is_dropped():
    sides = Sides(1.0, [9.0, 9.0, 2.0, 3.0, 4.0])
    pairs = interleave(sides.plain, sides.watched, Plan(pairs=3, warmup=2), Clock(set()))
    assert [pair.watched for pair in pairs] == [2.0, 3.0, 4.0]
    assert sides.order[4:] == ["plain", "watched", "watched", "plain", "plain", "watched"]


def test_a_block_sums_a_period_of_a_schedule():
    sides = Sides(1.0, [1.0] * 9 + [2.0])
    pairs = interleave(sides.plain, sides.watched, Plan(4, block=10, warmup=10), Clock(set()))
    assert [pair.ratio for pair in pairs] == pytest.approx([1.1] * 4)
    assert ratios(pairs).median == pytest.approx(1.1)
    assert additions(pairs).median == pytest.approx(0.1)
    assert plain_seconds(pairs) == pytest.approx(1.0)


def test_the_rare_step_of_a_schedule_comes_first_as_often_as_last():
    sides = Sides(1.0, [1.0] * 9 + [2.0])
    interleave(sides.plain, sides.watched, Plan(4, block=10, warmup=0), Clock(set()))
    rare = [sides.order[2 * step : 2 * step + 2].index("watched") for step in (9, 19, 29, 39)]
    assert sorted(rare) == [0, 0, 1, 1]


def test_disturbed_pairs_are_dropped():
    sides = Sides(1.0, [2.0, 50.0, 2.0, 4.0])
    pairs = interleave(sides.plain, sides.watched, Plan(4, warmup=0), Clock({1}))
    found = ratios(pairs)
    assert (found.kept, found.dropped) == (3, 1)
    assert (found.least, found.median, found.largest) == (2.0, 2.0, 4.0)
    assert found.mean == pytest.approx(8 / 3)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_where_hardly_a_pair_was_kept_all_count_and_it_is_said(kept):
    pairs = [Pair(1.0, 2.0, taken=QUIET)] * kept + [Pair(1.0, 4.0, taken=BUSY)] * 7
    found = ratios(pairs)
    assert counted(pairs) == pairs
    assert (found.median, found.kept, found.dropped, found.disturbed) == (4.0, kept, 7, True)


def test_three_pairs_are_enough_and_so_are_all():
    some = [Pair(1.0, 2.0, taken=QUIET)] * 3 + [Pair(1.0, 4.0, taken=BUSY)] * 7
    assert (ratios(some).median, ratios(some).disturbed) == (2.0, False)
    assert not ratios([Pair(1.0, 2.0, taken=QUIET)] * 2).disturbed


def test_without_knowledge_of_others_every_pair_is_kept():
    assert (ratios([Pair(1.0, 2.0)] * 3).kept, ratios([Pair(1.0, 2.0)] * 3).dropped) == (3, 0)


def test_the_mean_is_weighted_by_time_and_by_steps():
    pairs = [Pair(10.0, 11.0, steps=10), Pair(2.0, 4.0, steps=1)]
    assert ratios(pairs).mean == pytest.approx(15 / 12)
    assert additions(pairs).mean == pytest.approx(3 / 11)


def test_the_error_of_the_median_is_that_of_theory_for_normal_numbers():
    values = np.random.default_rng(1).normal(1.0, 0.1, 400)
    expected = 0.1 * (np.pi / 2 / 400) ** 0.5
    assert error_of_median(list(values)) == pytest.approx(expected, rel=0.3)
    assert error_of_median(list(values)) == error_of_median(list(values))
