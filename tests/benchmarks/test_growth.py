import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.contention import Taken
from benchmarks.growth import LayeredUNet, grown, plan_of, printed, reason, row
from benchmarks.paired import Pair
from stability_probe import find_skips


@pytest.mark.parametrize("n_skips", [2, 8])
def test_the_layered_network_has_as_many_layers_and_skips_as_asked_for(n_skips):
    net = LayeredUNet(n_skips, layers=33, width=8)
    assert sum(isinstance(module, torch.nn.Linear) for module in net.modules()) == 33
    assert len(find_skips(net, torch.ones(1, 8))) == n_skips


def test_what_ranks_print_is_read_back():
    pairs = [Pair(1.0, 2.0, 50, Taken(0.0, 0.0, 0.5)), Pair(1.0, 2.0, 50)]
    text = "some library says hello\n" + json.dumps([asdict(pair) for pair in pairs]) + "\n"
    assert printed(text) == pairs


def test_a_failure_is_told_in_one_line():
    traceback = (
        "[rank1]: Traceback (most recent call last):\n[rank1]:   File x\n"
        "[rank1]: ValueError: two ranks\nE1101 torch elastic says more"
    )
    assert reason(traceback) == "ValueError: two ranks"
    assert reason("usage: x\nerror: no such option\n") == "error: no such option"
    assert reason("") == "nothing was printed"


def test_a_row_holds_milliseconds_a_step():
    found = row("ranks", 2, [Pair(1.0, 1.1, steps=10), Pair(1.0, 1.3, steps=10)])
    assert found["bare_ms"] == pytest.approx(100)
    assert found["added_ms"] == pytest.approx(20)
    assert found["ratio"] == pytest.approx(1.2)
    assert found["note"] == ""


def test_a_row_without_pairs_says_why():
    found = row("ranks", 2, [], "failed: no")
    assert (found["added_ms"], found["note"]) == (None, "failed: no")
    assert grown([row("ranks", 1, [Pair(1.0, 2.0)]), found]) == "size × 2, added × ?"


def test_slow_steps_get_few_pairs_of_few_steps():
    assert (plan_of(1e-4, 6.0).pairs, plan_of(1e-4, 6.0).block) == (20, 10)
    assert (plan_of(3.0, 6.0).pairs, plan_of(3.0, 6.0).block) == (3, 1)
