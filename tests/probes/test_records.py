"""What a recorded number is, and the frame that many of them become."""

import math

import numpy as np
import pandas as pd

from stability_probe import Run
from stability_probe.probes import COLUMNS, Key
from stability_probe.probes.records import (
    CATEGORIES,
    Column,
    Layout,
    Part,
    RunFolder,
    as_frame,
    empty_frame,
    joined,
)


def column(stat, **how):
    return Column(Key("loss", "loss", 0, stat), **how)


def values_of(frame):
    return list(zip(frame.step, frame.stat, frame.value, strict=True))


class TestLayout:
    def test_a_value_is_recorded_as_it_is(self):
        frame = Layout([column("a"), column("b")]).frame([3, 5], np.array([[1.0, 2], [3, 4]]))
        assert tuple(frame.columns) == COLUMNS
        assert values_of(frame) == [(3, "a", 1), (3, "b", 2), (5, "a", 3), (5, "b", 4)]
        assert frame.index.tolist() == [0, 1, 2, 3]

    def test_a_mean_is_a_sum_over_a_weight_that_is_not_shown(self):
        layout = Layout([column("mean", join="sum", weight=1, how="mean"), Column(None, "sum")])
        assert values_of(layout.frame([1], np.array([[6.0, 4.0]]))) == [(1, "mean", 1.5)]

    def test_a_root_is_that_of_a_ratio(self):
        layout = Layout([column("r", weight=1, how="root"), Column(None)])
        frame = layout.frame([1, 2, 3], np.array([[9.0, 4.0], [1.0, 0.0], [0.0, 0.0]]))
        assert frame.value.tolist()[:2] == [1.5, math.inf]
        assert math.isnan(frame.value[2])

    def test_means_and_counts_of_no_samples_go_and_only_at_their_step(self):
        nan = float("nan")
        layout = Layout(
            [column("t0", weight=1, how="mean"), column("n0", how="count"), column("a")]
        )
        frame = layout.frame([1, 2, 3], np.array([[0.0, 0, 0], [nan, 2, 0], [4.0, 2, 0]]))
        left = {step: set(rows.stat) for step, rows in frame.groupby("step")}
        assert left == {1: {"a"}, 2: {"t0", "n0", "a"}, 3: {"t0", "n0", "a"}}
        assert frame.value.isna().sum() == 1  # a NaN of samples that are there is kept
        assert frame[frame.stat == "t0"].value.tolist()[1] == 2.0
        assert frame.index.tolist() == list(range(len(frame)))

    def test_of_no_columns_there_are_no_records(self):
        assert Layout([]).frame([1, 2], np.empty((2, 0))).empty


def part(stat, steps, metric="loss"):
    layout = Layout([Column(Key(metric, "loss", 0, stat))])
    return Part(layout, steps, np.array(steps, dtype=float).reshape(-1, 1))


class TestFrames:
    def test_parts_come_in_the_order_of_their_steps(self):
        frame = as_frame([part("a", [1, 3]), part("b", [2, 3]), part("c", [1])])
        found = [(step, stat) for step, stat, _ in values_of(frame)]
        assert found == [(1, "a"), (1, "c"), (2, "b"), (3, "a"), (3, "b")]
        assert frame.index.tolist() == list(range(5))

    def test_names_stay_categories_whichever_there_are(self):
        frames = [as_frame([part("a", [1], "loss")]), as_frame([part("b", [2], "energy")])]
        frames.append(frames[0].astype(dict.fromkeys(CATEGORIES, object)))
        frame = joined(frames)
        assert all(isinstance(frame[name].dtype, pd.CategoricalDtype) for name in CATEGORIES)
        assert frame.metric.tolist() == ["loss", "energy", "loss"]
        assert frame.value.tolist() == [1.0, 2.0, 1.0]

    def test_no_frames_are_an_empty_one(self):
        pd.testing.assert_frame_equal(joined([]), empty_frame())
        pd.testing.assert_frame_equal(as_frame([]), empty_frame())
        assert as_frame([part("a", [])]).empty


def test_an_empty_frame_has_the_columns():
    assert tuple(empty_frame().columns) == COLUMNS
    assert empty_frame().empty


def test_a_run_is_a_run_folder(tmp_path):
    assert isinstance(Run(tmp_path), RunFolder)
    assert not isinstance(tmp_path, RunFolder)
