import os
import time

import pytest

from benchmarks.contention import Meter, Reading, Taken, between, rule

START = Reading(wall=100.0, own=10.0, waited=1.0, stolen=5.0, busy=50.0)


def after(**passed: float) -> Reading:
    now = {name: value + passed.get(name, 0.0) for name, value in vars(START).items()}
    return Reading(**now)


def test_nothing_is_taken_where_only_this_process_ran():
    taken = between(START, after(wall=2.0, own=2.0, busy=2.0), cores=2)
    assert taken == Taken(0.0, 0.0, 0.0)
    assert taken.quiet


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        ({"waited": 0.1}, Taken(0.05, 0.0, 0.0)),
        ({"stolen": 0.4}, Taken(0.0, 0.1, 0.0)),
        ({"busy": 3.0}, Taken(0.0, 0.0, 0.25)),
    ],
)
def test_each_share_is_of_what_there_was_to_take(passed, expected):
    taken = between(START, after(**{"wall": 2.0, "own": 2.0, "busy": 2.0, **passed}), cores=2)
    assert vars(taken) == pytest.approx(vars(expected))
    assert not taken.quiet


def test_waiting_for_a_disk_is_not_taken_by_others():
    assert between(START, after(wall=2.0, own=0.5, busy=0.5), cores=2).quiet


def test_clocks_that_run_backwards_count_as_still():
    ended = between(START, after(wall=1.0, own=1.0, busy=0.99, waited=-0.5), cores=2)
    assert ended == Taken(0.0, 0.0, 0.0)


def test_a_real_reading_sees_this_process():
    meter = Meter()
    before = meter.read()
    if before is None:
        assert "not say" in rule()
        return
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    now, taken = meter.read(), meter.taken(before)
    assert now is not None and taken is not None
    assert now.own - before.own == pytest.approx(0.05, abs=0.04)
    assert now.wall - before.wall >= now.own - before.own - 0.001
    assert taken.waited >= 0 and 0 <= taken.others <= 1.5


def test_a_tree_below_another_process_does_not_wait_for_itself():
    reading = Meter(os.getppid()).read()
    assert reading is None or reading.waited == 0.0


def test_elsewhere_nothing_is_read():
    meter = Meter()
    meter.works = False
    assert meter.read() is None
    assert meter.taken(START) is None
    assert meter.taken(None) is None
