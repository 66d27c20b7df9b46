"""The buffer of recorded numbers and the frame they become."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe import Run
from stability_probe.probes import COLUMNS, Key
from stability_probe.probes.records import RecordBuffer, RunFolder, empty_frame


def keys(*stats, metric="loss"):
    return [Key(metric, "loss", 0, stat) for stat in stats]


def test_numbers_come_out_in_order_with_their_steps_and_only_once():
    buffer = RecordBuffer()
    buffer.add(3, keys("mean", "min"), torch.tensor([1.0, 2.0]))
    buffer.add(4, [Key("energy", "u", 2, "max")], torch.tensor([3.0], dtype=torch.float64))
    assert len(buffer) == 2
    frame = buffer.frame()
    assert tuple(frame.columns) == COLUMNS
    assert frame.values.tolist() == [
        [3, "loss", "loss", 0, "mean", 1.0],
        [3, "loss", "loss", 0, "min", 2.0],
        [4, "energy", "u", 2, "max", 3.0],
    ]
    buffer.clear()
    assert len(buffer) == 0
    pd.testing.assert_frame_equal(buffer.frame(), empty_frame())


def test_float64_keeps_its_digits_beside_float32():
    buffer = RecordBuffer()
    buffer.add(1, keys("a"), torch.tensor([0.1], dtype=torch.float64))
    buffer.add(1, keys("b"), torch.tensor([0.1]))
    assert buffer.frame().value.tolist() == [0.1, float(np.float32(0.1))]


def test_no_graph_is_held():
    weight = torch.ones(1, requires_grad=True)
    buffer = RecordBuffer()
    buffer.add(1, keys("a"), 2 * weight)
    assert buffer.frame().value.tolist() == [2.0]


def test_a_key_too_many_is_refused():
    with pytest.raises(ValueError, match="2 keys for 1 values at step 5"):
        RecordBuffer().add(5, keys("a", "b"), torch.ones(1))


def test_means_of_empty_bins_go_and_only_at_their_step():
    nan = float("nan")
    buffer = RecordBuffer()
    for step, (count0, count1) in {1: (0.0, 4.0), 2: (4.0, 4.0), 3: (4.0, 0.0)}.items():
        buffer.add(step, keys("mean", "t0", "t1"), torch.tensor([1.0, nan, nan]))
        buffer.add(step, keys("t0", "t1", metric="samples"), torch.tensor([count0, count1]))
    frame = buffer.frame()
    left = {step: set(rows.stat) for step, rows in frame.groupby("step")}
    assert left == {1: {"mean", "t1"}, 2: {"mean", "t0", "t1"}, 3: {"mean", "t0"}}
    assert frame.value.isna().sum() == 4  # a NaN of samples that are there is kept
    assert frame.index.tolist() == list(range(len(frame)))


def test_an_empty_frame_has_the_columns():
    assert tuple(empty_frame().columns) == COLUMNS
    assert empty_frame().empty


def test_a_run_is_a_run_folder(tmp_path):
    assert isinstance(Run(tmp_path), RunFolder)
    assert not isinstance(tmp_path, RunFolder)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.floats(allow_nan=True), max_size=4)), max_size=6
    )
)
def test_nothing_is_lost_or_changed(steps):
    buffer = RecordBuffer()
    for step, values in steps:
        names = [f"v{i}" for i in range(len(values))]
        buffer.add(step, keys(*names), torch.tensor(values, dtype=torch.float64))
    frame = buffer.frame()
    expected = [(step, f"v{i}", value) for step, values in steps for i, value in enumerate(values)]
    assert len(frame) == len(expected)
    for row, (step, stat, value) in zip(frame.itertuples(), expected, strict=True):
        assert (row.step, row.stat) == (step, stat)
        assert row.value == value or (np.isnan(row.value) and np.isnan(value))
