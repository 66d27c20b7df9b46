import numpy as np
import pandas as pd
import pytest

from stability_probe import Run, StabilityProbeError
from stability_probe.verify import Evidence, gather
from tests.oracles.evidence import (
    altered,
    band,
    bare,
    checkpoint,
    complete,
    gains,
    relabelled,
    sampled,
    stored,
    trace,
    traced,
    training,
)


def test_missing_columns_are_named():
    frame = pd.DataFrame({"step": [1], "metric": ["loss"], "site": ["loss"], "value": [0.1]})
    with pytest.raises(StabilityProbeError, match=r"mine: records need .*missing: level, stat$"):
        Evidence("mine", frame)


def test_further_columns_do_no_harm():
    frame = bare(trace()).frame.assign(extra=1)
    assert Evidence("mine", frame).n_skips == 3


def test_series_is_a_table_of_steps_and_levels():
    evidence = training(traced("energy", "h", [[1, 2], [3, 4], [5, 6]], spread=0.5))
    table = evidence.series("energy", "h")
    assert list(table.index) == [1, 2, 3] and list(table.columns) == [0, 1]
    np.testing.assert_array_equal(table, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(evidence.series("energy", "h", "max"), 1.5 * table)
    assert evidence.series("energy", "u").empty


def test_samples_are_ordered_by_number_and_gaps_are_nan():
    values = np.arange(24.0).reshape(1, 2, 12)  # s10 comes after s9, not after s1
    frame = sampled("sample_energy", "h", values, steps=[5]).sample(frac=1, random_state=0)
    evidence = training(frame[~((frame.level == 1) & (frame.stat == "s3"))])
    values[0, 1, 3] = np.nan
    np.testing.assert_array_equal(evidence.samples("sample_energy", "h"), values)


def test_samples_leave_means_out_and_are_empty_where_nothing_was_taken():
    evidence = training(traced("energy", "h", [[1.0]]))
    assert evidence.samples("energy", "h").shape == (0, 0, 0)


def test_sampled_steps():
    np.testing.assert_array_equal(band().sampled_steps, [1, 50, 100])
    assert len(trace().sampled_steps) == 0


@pytest.mark.parametrize("stated", [{}, {"kappa": None}, {"kappa": []}])
def test_kappa_is_measured_where_run_json_has_none(stated):
    frame = training(gains([1.0, 0.4], steps=[1, 2])).frame
    assert Evidence("e", frame, stated).kappa == [1.0, 0.4]
    moving = altered(Evidence("e", frame, stated), "kappa", "skip", 0.6, level=2, step=2)
    assert moving.kappa == pytest.approx([1.0, 0.5])  # the mean over time


def test_stated_kappa_goes_before_measured():
    assert relabelled(trace(), kappa=[3, 2, 1]).kappa == [3.0, 2.0, 1.0]


def test_zero_is_a_kappa():
    assert trace((0.0, 0.0)).kappa == [0.0, 0.0]
    assert not trace((0.0, 0.0)).input_dependent
    assert not bare(trace((0.0, 0.0))).input_dependent


def test_kappa_depends_on_the_input_where_run_json_says_so():
    assert relabelled(trace(), kappa=None).input_dependent
    assert not trace().input_dependent


def test_kappa_of_bare_records_depends_on_the_input_if_it_varies():
    constant, gated = training(gains([1.0, 0.5])), training(gains([1.0, 0.5], spread=0.1))
    assert not bare(constant).input_dependent
    assert bare(gated).input_dependent
    drifting = altered(altered(bare(constant), "kappa", "skip", 0.9, step=50, level=1, stat="mean"),
                       "kappa", "skip", 0.9, step=50, level=1, stat="min")  # fmt: skip
    assert drifting.input_dependent


def test_sampled_kappa_is_the_constant_or_else_the_gain_of_each_sample():
    measured = np.random.default_rng(0).uniform(0.4, 0.6, (2, 3, 5))
    frames = (sampled("sample_kappa", "skip", measured, first_level=1, steps=[1, 9]),
              gains([1.0, 0.7, 0.49], spread=0.1))  # fmt: skip
    constants = np.broadcast_to(np.reshape([1.0, 0.7, 0.49], (1, 3, 1)), (2, 3, 5))
    np.testing.assert_array_equal(training(*frames).sampled_kappa(), constants)
    gated = relabelled(training(*frames), kappa=None)
    np.testing.assert_array_equal(gated.sampled_kappa(), measured)
    np.testing.assert_array_equal(bare(gated).sampled_kappa(), measured)


class TestGather:
    def test_a_frame(self):
        (found,) = gather(complete().frame)
        assert (found.name, found.kind, found.info) == ("records", "training", {})

    def test_a_run_keeps_its_records_and_info(self, tmp_path):
        (found,) = gather(stored(complete(), tmp_path / "folder"))
        assert (found.name, found.kind) == ("cs:0.7", "training")
        assert found.info["seed"] == 0
        pd.testing.assert_frame_equal(
            found.frame, complete().frame, check_dtype=False, check_categorical=False
        )

    def test_a_run_without_a_scheme_is_named_after_its_folder(self, tmp_path):
        run = Run(tmp_path / "mine")
        run.begin({})
        assert [e.name for e in gather(run)] == ["mine"]

    def test_several_runs_come_with_the_largest_sum_of_squares_first(self, tmp_path):
        kappas = {"uniform:0": (0.0, 0.0), "cs:0.5": (1.0, 0.5), "unscaled": (1.0, 1.0),
                  "uniform:0.9": (0.9, 0.9)}  # fmt: skip
        runs = [
            stored(trace(kappa, scheme=scheme), tmp_path / scheme)
            for scheme, kappa in kappas.items()
        ]
        names = [e.name for e in gather(runs)]
        assert names == ["unscaled", "uniform:0.9", "cs:0.5", "uniform:0"]

    def test_seeds_are_named_only_where_a_scheme_has_several(self, tmp_path):
        runs = [stored(trace(seed=seed), tmp_path / str(seed)) for seed in (0, 7)]
        assert [e.name for e in gather(runs)] == ["cs:0.7 seed 0", "cs:0.7 seed 7"]
        assert [e.name for e in gather(runs[1:])] == ["cs:0.7"]

    def test_runs_of_one_scheme_and_seed_are_told_apart(self, tmp_path):
        runs = [stored(trace(steps=steps), tmp_path / "a" / str(steps)) for steps in (20, 40)]
        assert [e.name for e in gather(runs)] == ["cs:0.7 seed 0 in 20", "cs:0.7 seed 0 in 40"]

    def test_runs_of_one_folder_name_have_the_shortest_path_that_tells_them_apart(self, tmp_path):
        runs = [Run(tmp_path / "exr" / name) for name in ("diffusers/run", "lightning/run", "cs")]
        for run in runs:
            run.begin({})
        assert [e.name for e in gather(runs)] == ["diffusers/run", "lightning/run", "cs"]
        assert [e.name for e in gather(runs[:1])] == ["run"]

    def test_nothing(self):
        with pytest.raises(StabilityProbeError, match="at least one run is needed, got none"):
            gather([])


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (10, 1), (11, 2), (25, 3), (30, 3)])
def test_the_final_loss_is_the_mean_of_the_last_tenth_rounded_up(steps, last):
    losses = np.arange(steps, dtype=float)[:, None] ** 2
    run = training(traced("loss", "loss", losses))
    assert run.final_loss == pytest.approx(losses[-last:].mean())


def test_no_final_loss_without_losses_or_training():
    loss = traced("loss", "loss", [[1.0]])
    assert training().final_loss is None
    assert training(loss, kind="checkpoint").final_loss is None


def test_fewer_noise_levels_than_were_probed(tmp_path):
    run = stored(checkpoint(noise_levels=(50.0, 500.0)), tmp_path / "run")
    run.update({"noise_levels": [50.0]})
    with pytest.raises(StabilityProbeError, match="`noise_levels`: the records are of 2, got 1"):
        gather(run)
    run.update({"noise_levels": None})
    assert gather(run)[0].kind == "checkpoint"
