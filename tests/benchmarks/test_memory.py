import pytest
import torch

from benchmarks.memory import LiveBytes, growth

FLOATS = 4 * 1000


def test_storages_are_counted_once_and_forgotten_when_they_die():
    with LiveBytes() as counter:
        x = torch.zeros(1000)
        view = x.view(10, 100)[3:]
        assert (counter.live, counter.peak) == (FLOATS, FLOATS)
        del x
        assert counter.live == FLOATS
        del view
        assert (counter.live, counter.peak) == (0, FLOATS)


def test_what_a_backward_pass_keeps_and_makes_is_seen():
    with LiveBytes() as counter:
        w = torch.ones(1000, requires_grad=True)
        out = (w * 2).exp().sum()  # exp keeps its output
        assert counter.live == 2 * FLOATS + 4
        out.backward()
        del out
        assert w.grad is not None
        assert counter.live == 2 * FLOATS
        assert counter.peak >= 3 * FLOATS


def test_growth_is_taken_after_the_warmup():
    row = growth(
        [(500, 50.0), (1000, 100.0), (1500, 101.0), (2000, 102.0), (2500, 90.0), (3000, 102.0)],
        warmup=1000,
    )
    assert (row["first_step"], row["last_step"]) == (1000, 3000)
    assert row["ratio"] == pytest.approx(1.02)
    assert row["rise_KiB"] == pytest.approx(2 * 1024)
    assert row["verdict"] == "MISSED"
