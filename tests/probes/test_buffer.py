"""Numbers on the device, and their way off it."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe.probes import COLUMNS, Key
from stability_probe.probes.buffer import Outgoing, RecordBuffer, _Ring
from stability_probe.probes.records import Column, Layout, empty_frame


def layout(*stats, metric="loss"):
    return Layout([Column(Key(metric, "loss", 0, stat)) for stat in stats])


def test_numbers_come_out_in_order_with_their_steps_and_only_once():
    buffer = RecordBuffer()
    buffer.add(3, layout("mean", "min"), torch.tensor([1.0, 2.0]))
    wide = Layout([Column(Key("energy", "u", 2, "max"))])
    buffer.add(4, wide, torch.tensor([3.0], dtype=torch.float64))
    assert len(buffer) == 2
    frame = buffer.frame()
    assert tuple(frame.columns) == COLUMNS
    assert frame.values.tolist() == [
        [3, "loss", "loss", 0, "mean", 1.0],
        [3, "loss", "loss", 0, "min", 2.0],
        [4, "energy", "u", 2, "max", 3.0],
    ]
    assert len(buffer) == 0
    pd.testing.assert_frame_equal(buffer.frame(), empty_frame())


def test_float64_keeps_its_digits_beside_float32():
    buffer = RecordBuffer()
    buffer.add(1, layout("a"), torch.tensor([0.1], dtype=torch.float64))
    buffer.add(1, layout("b"), torch.tensor([0.1]))
    assert buffer.frame().value.tolist() == [0.1, float(np.float32(0.1))]


def test_one_layout_in_two_types():
    buffer, same = RecordBuffer(), layout("a")
    buffer.add(1, same, torch.tensor([0.1], dtype=torch.float64))
    buffer.add(2, same, torch.tensor([0.25]))
    assert buffer.frame().value.tolist() == [0.1, 0.25]


def test_no_graph_is_held():
    weight = torch.ones(1, requires_grad=True)
    buffer = RecordBuffer()
    buffer.add(1, layout("a"), 2 * weight)
    assert buffer.frame().value.tolist() == [2.0]


def test_a_column_too_many_is_refused():
    with pytest.raises(ValueError, match="2 columns for 1 values at step 5"):
        RecordBuffer().add(5, layout("a", "b"), torch.ones(1))


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_there_is_room_for_more_steps_than_expected(rows):
    buffer, same = RecordBuffer(rows), layout("a")
    for step in range(1, 8):
        buffer.add(step, same, torch.tensor([float(step)]))
    assert buffer.frame().value.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_taken_is_not_overwritten_by_what_comes_next(dtype):
    buffer, same = RecordBuffer(2), layout("a")
    buffer.add(1, same, torch.ones(1, dtype=dtype))
    taken = buffer.take()
    buffer.add(2, same, torch.full((1,), 7.0, dtype=dtype))
    assert taken.parts()[0].values.tolist() == [[1.0]]
    assert buffer.take().parts()[0].steps == [2]


def test_room_is_used_again_and_given_back_when_it_is_not():
    buffer, every_time, once = RecordBuffer(2), layout("a"), layout("b")
    buffer.add(1, every_time, torch.ones(1))
    buffer.add(1, once, torch.ones(1))
    buffer.take()
    rooms = {kind[0]: ring.room.data_ptr() for kind, ring in buffer._rings.items()}
    assert set(rooms) == {every_time, once}
    for step in (2, 3):
        buffer.add(step, every_time, torch.ones(1))
        buffer.take()
        kept = {kind[0]: ring.room.data_ptr() for kind, ring in buffer._rings.items()}
        assert kept == {every_time: rooms[every_time]}


def test_numbers_may_be_kept_in_inference_mode_and_out_of_it():
    buffer, same = RecordBuffer(1), layout("a")
    for step in (1, 2, 3, 4):
        with torch.inference_mode(step % 2 == 1):
            buffer.add(step, same, torch.ones(1))
    assert buffer.frame().step.tolist() == [1, 2, 3, 4]


def test_copies_are_waited_for_each_on_its_device():
    """What a GPU does, as far as that can be told without one: an event a ring, waited for."""
    waited = []

    class Event:
        def __init__(self, name):
            self.name = name

        def synchronize(self):
            waited.append(self.name)

    class Queued(_Ring):
        def copy(self):
            return self.room.clone(), Event(self.steps[0])

    rings = [(layout("a"), Queued(1, torch.ones(1))) for _ in range(2)]
    for step, (_, ring) in enumerate(rings):
        ring.put(step, torch.ones(1))
    outgoing = Outgoing(rings)
    assert (outgoing.arrived, waited) == (False, [])
    assert [part.values.tolist() for part in outgoing.parts()] == [[[1.0]], [[1.0]]]
    assert waited == [0, 1]
    assert Outgoing([]).arrived


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
        buffer.add(step, layout(*names), torch.tensor(values, dtype=torch.float64))
    frame = buffer.frame()
    in_order = sorted(steps, key=lambda pair: pair[0])
    expected = [(step, f"v{i}", v) for step, values in in_order for i, v in enumerate(values)]
    assert len(frame) == len(expected)
    for row, (step, stat, value) in zip(frame.itertuples(), expected, strict=True):
        assert (row.step, row.stat) == (step, stat)
        assert row.value == value or (np.isnan(row.value) and np.isnan(value))
