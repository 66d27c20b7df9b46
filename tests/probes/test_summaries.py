"""From one number a sample to a few a step."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe.probes import Key
from stability_probe.probes.summaries import per_sample, summarise

LOSS, X = Key("loss", "loss", 0, ""), Key("energy", "x", 0, "")
EDGES = torch.tensor([250.0, 500.0, 750.0])


def rows(layout, values):
    """What is recorded of the numbers of one step, by metric and stat."""
    frame = layout.frame([1], values[None].double().numpy())
    assert not frame.duplicated(["metric", "site", "level", "stat"]).any()
    return {(row.metric, row.stat): row.value for row in frame.itertuples()}


def table(samples, t=None, edges=EDGES):
    return rows(*summarise(samples, t, edges))


def test_by_hand():
    samples = {LOSS: torch.tensor([1.0, 2.0, 6.0]), X: torch.tensor([5.0, -1.0, 2.0])}
    found = table(samples, torch.tensor([0, 100, 800]))
    assert found == {  # bins 1 and 2 are empty, and not there
        ("loss", "mean"): 3.0, ("loss", "min"): 1.0, ("loss", "max"): 6.0,
        ("loss", "t0"): 1.5, ("loss", "t3"): 6.0,
        ("energy", "mean"): 2.0, ("energy", "min"): -1.0, ("energy", "max"): 5.0,
        ("energy", "t0"): 2.0, ("energy", "t3"): 2.0,
        ("samples", "t0"): 2.0, ("samples", "t3"): 1.0,
    }  # fmt: skip


def test_without_noise_levels_there_are_no_bins():
    assert set(table({LOSS: torch.ones(2)})) == {("loss", s) for s in ("mean", "min", "max")}


def test_a_quantity_of_another_length_is_not_binned():
    found = table({LOSS: torch.tensor([4.0]), X: torch.ones(3)}, torch.tensor([0, 1, 2]))
    assert found["loss", "mean"] == 4.0
    assert ("loss", "t0") not in found
    assert found["energy", "t0"] == 1.0
    assert found["samples", "t0"] == 3.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_stays_in_its_bin_and_quantity(bad):
    samples = {LOSS: torch.tensor([1.0, bad]), X: torch.tensor([1.0, 2.0])}
    found = table(samples, torch.tensor([0, 999]))
    for stat in ("mean", "max", "t3"):
        assert not math.isfinite(found["loss", stat])
    assert found["loss", "t0"] == 1.0
    assert all(math.isfinite(found["energy", s]) for s in ("mean", "min", "max", "t0", "t3"))
    if math.isnan(bad):
        assert math.isnan(found["loss", "min"])


@pytest.mark.parametrize("t", [0, 249.9, 250, 499.9, 500, 749.9, 750, 999, 5000])
def test_a_bin_holds_its_lower_edge_and_the_last_holds_the_rest(t):
    found = table({LOSS: torch.ones(1)}, torch.tensor([t]))
    expected = min(int(t // 250), 3)
    assert {stat for metric, stat in found if metric == "samples"} == {f"t{expected}"}
    assert found["samples", f"t{expected}"] == 1


def test_one_bin_holds_everything():
    found = table({LOSS: torch.tensor([1.0, 5.0])}, torch.tensor([1, 999]), torch.empty(0))
    assert found["loss", "t0"] == 3.0
    assert found["samples", "t0"] == 2.0


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32, torch.float32], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.float16, torch.bfloat16], torch.float32),
    ],
)
def test_numbers_are_kept_in_the_widest_type(dtypes, expected):
    samples = dict(zip((LOSS, X), (torch.ones(2, dtype=d) for d in dtypes), strict=True))
    assert summarise(samples, None, EDGES)[1].dtype == expected
    assert per_sample(samples)[1].dtype == expected


def test_no_quantities_are_no_numbers():
    layout, values = summarise({}, None, EDGES)
    assert len(layout) == len(values) == 0


def test_the_same_quantities_have_the_same_layout_whatever_their_number_of_samples():
    one, two = (summarise({LOSS: torch.ones(n)}, torch.zeros(n), EDGES)[0] for n in (1, 2))
    assert one is two
    assert per_sample({LOSS: torch.ones(2)})[0] is per_sample({LOSS: torch.zeros(2)})[0]


def test_how_processes_are_joined():
    layout, _ = summarise({LOSS: torch.ones(2)}, torch.zeros(2), EDGES)
    joins = {(c.key.metric, c.key.stat): c.join for c in layout.columns if c.key}
    assert joins == {
        ("loss", "mean"): "sum", ("loss", "min"): "min", ("loss", "max"): "max",
        **{(m, f"t{b}"): "sum" for m in ("loss", "samples") for b in range(4)},
    }  # fmt: skip
    assert {c.join for c in per_sample({LOSS: torch.ones(2)})[0].columns} == {"same"}


def test_per_sample_keeps_each_number_with_its_sample():
    found = rows(*per_sample({LOSS: torch.tensor([1.0, 2.0]), X: torch.tensor([3.0])}))
    assert found == {("loss", "s0"): 1.0, ("loss", "s1"): 2.0, ("energy", "s0"): 3.0}


finite = st.floats(-1e6, 1e6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(finite, st.floats(0, 999)), min_size=1, max_size=12))
def test_means_of_bins_make_the_mean(pairs):
    """The law of total expectation, and the order of mean, least and largest."""
    values, t = (torch.tensor(c, dtype=torch.float64) for c in zip(*pairs, strict=True))
    found = table({LOSS: values}, t)
    there = [stat for metric, stat in found if metric == "samples"]
    parts = [(found["samples", stat], found["loss", stat]) for stat in there]
    total = sum(n * mean for n, mean in parts)
    assert sum(n for n, _ in parts) == len(values)
    assert total / len(values) == pytest.approx(found["loss", "mean"], rel=1e-9, abs=1e-6)
    assert found["loss", "min"] <= found["loss", "mean"] + 1e-9 * abs(found["loss", "mean"])
    np.testing.assert_allclose(found["loss", "max"], values.numpy().max())


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)))
def test_the_order_of_samples_does_not_matter(order):
    values = torch.tensor([1.0, -2.0, 4.0, 8.0, 0.5, 3.0], dtype=torch.float64)
    t = torch.tensor([0, 0, 300, 300, 900, 900])
    assert table({LOSS: values[order]}, t[order]) == pytest.approx(
        table({LOSS: values}, t), nan_ok=True
    )
