"""Training runs that stop and go on: with the records and weights of one that never stopped."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from stability_probe import Run, StabilityProbeError
from stability_probe.errors import TrainingDiverged
from stability_probe.probes import ProbeConfig, SensitivityConfig
from stability_probe.probes.ranks import RecordWarning
from stability_probe.runs import RecordConfig, TrainConfig, record_training, recording
from stability_probe.runs import run as run_module
from stability_probe.runs.recording import recorded_settings
from stability_probe.runs.run import STATE_FILE

# Three batches an epoch, so that savings are in the middle of an epoch and at its end.
CONFIG = TrainConfig(
    model="theory-unet", n_skips=2, width=8, data="faces", batch_size=30, steps=11, warmup=5
)
PROBING = RecordConfig(
    sensitivity_every=5,
    probe_samples=3,
    sensitive_samples=1,
    save_every=4,
    probe=ProbeConfig(
        flush_every=3,
        updates=True,
        sensitivity=SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=2),
    ),
)
PLAIN = replace(PROBING, sensitivity_every=0, probe=ProbeConfig(flush_every=3))


class Stopped(Exception):
    """Ends a sitting."""


def stop_at(step, how=Stopped):
    def act(taken):
        if taken.step == step:
            raise how

    return act


def sitting(folder, config=CONFIG, probing=PLAIN, until=None, how=Stopped):
    """Train from where the folder has got to, to the end or to a step."""
    arguments = (config, folder / "run", probing)
    weights = folder / "weights.pth"
    if until is None:
        return record_training(*arguments, weights=weights, resume=True)
    with pytest.raises(how):
        record_training(*arguments, stop_at(until, how), weights, resume=True)
    return Run.open(folder / "run")


def assert_same(run, whole):
    """The same records to the last bit, and the same weights."""
    assert (run.info["state"], run.info["reason"]) == ("complete", None)
    frame, expected = run.records(), whole.records()
    pd.testing.assert_frame_equal(frame, expected, check_exact=True, check_categorical=False)
    bits, expected_bits = (f.value.to_numpy(copy=True).view("i8") for f in (frame, expected))
    assert np.array_equal(bits, expected_bits)
    weights, expected = (torch.load(r.path.parent / "weights.pth") for r in (run, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert not list(run.path.rglob("*.p*t*al")) and not (run.path / STATE_FILE).exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that never stopped."""
    return sitting(tmp_path_factory.mktemp("whole"))


class TestTheSameAsWithoutStopping:
    @pytest.mark.parametrize("options", [
        {"model": "theory-unet", "scheme": "unscaled"},
        {"model": "uvit", "scheme": "ls"},
        {"model": "unet2d", "scheme": "sc-tuner", "n_skips": 4},
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
    @pytest.mark.slow
    def test_three_times(self, tmp_path, options, every):
        """Once before the first saving, once in an epoch, once in the next."""
        config, probing = replace(CONFIG, **options), replace(PROBING, every=every)
        if options["model"] == "unet2d" or every == 3:
            probing = replace(probing, sensitivity_every=0)
        for name in ("whole", "stopped"):
            (tmp_path / name).mkdir()
        for until in (2, 6, 9):
            run = sitting(tmp_path / "stopped", config, probing, until)
            assert run.info["state"] == "failed"
        run = sitting(tmp_path / "stopped", config, probing)
        assert run.info["resumed"] == [0, 4, 8]
        assert_same(run, sitting(tmp_path / "whole", config, probing))

    @pytest.mark.parametrize(
        "save_every",
        [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow), 10],
    )
    def test_wherever_it_was_saved(self, tmp_path, whole, save_every):
        """After every step, at the end of epochs, and just before the end."""
        probing = replace(PLAIN, save_every=save_every)
        for until in (1, 4, 7, 11):
            sitting(tmp_path, CONFIG, probing, until)
        run = sitting(tmp_path, CONFIG, probing)
        last = [save_every * (step // save_every) for step in (0, 3, 6, 10)]
        assert run.info["resumed"] == last
        assert_same(run, whole)

    def test_after_an_interrupt(self, tmp_path, whole):
        run = sitting(tmp_path, until=6, how=KeyboardInterrupt)
        assert run.info["reason"].startswith("KeyboardInterrupt")
        assert_same(sitting(tmp_path), whole)

    def test_that_never_saves_starts_again(self, tmp_path, whole):
        probing = replace(PLAIN, save_every=0)
        run = sitting(tmp_path, CONFIG, probing, until=9)
        assert not (run.path / STATE_FILE).exists()
        run = sitting(tmp_path, CONFIG, probing)
        assert run.info["resumed"] == [0]
        assert_same(run, whole)

    def test_networks_that_draw_random_numbers(self, tmp_path, monkeypatch):
        class WithDropout(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner, self.drop = inner, nn.Dropout(0.2)

            def forward(self, x, t):
                return self.inner(self.drop(x), t)

        build = recording.build_model
        monkeypatch.setattr(
            recording, "build_model", lambda config, shape: WithDropout(build(config, shape))
        )
        runs = []
        for name, stops in (("whole", ()), ("stopped", (6, 9))):
            (tmp_path / name).mkdir()
            torch.manual_seed(7)
            for until in stops:
                sitting(tmp_path / name, until=until)
                torch.manual_seed(8)  # another process has another state
            runs.append(sitting(tmp_path / name))
        assert_same(*runs)

    def test_the_cost_counts_every_sitting(self, tmp_path):
        first = sitting(tmp_path, until=9).info["probe"]
        second = sitting(tmp_path).info["probe"]
        for name in ("elapsed_s", "hooks_s", "step_s", "flush_s"):
            assert second[name] > 0.7 * first[name] > 0  # three of eleven steps are new


@pytest.fixture
def saved(monkeypatch):
    """The steps after which a state is saved, while they are."""
    steps, save = [], recording.save_state

    def note(run, state):
        steps.append(state["training"]["step"])
        save(run, state)

    monkeypatch.setattr(recording, "save_state", note)
    return steps


class TestWhatIsThere:
    def test_while_it_runs(self, tmp_path, saved):
        """A saving at every fourth step, with the records up to it; none after the last."""
        seen = {}

        def look(step):
            run = Run.open(tmp_path / "run")
            state = run.path / STATE_FILE
            last = torch.load(state)["training"]["step"] if state.exists() else 0
            seen[step.step] = last
            assert last <= (run.records().step.max() if last else 0)

        config = replace(CONFIG, steps=12)
        run = record_training(config, tmp_path / "run", PLAIN, look)
        assert list(seen.values()) == [0] * 4 + [4] * 4 + [8] * 4
        assert saved == [4, 8]
        assert not (run.path / STATE_FILE).exists()
        assert "resumed" not in run.info

    def test_settings_are_in_run_json(self, whole):
        assert whole.info["probing"] == json.loads(json.dumps(PLAIN.as_dict()))
        assert recorded_settings(Run.open(whole.path)) == (CONFIG, PLAIN)

    def test_a_complete_run_is_left_alone(self, tmp_path, whole):
        sitting(tmp_path)
        (tmp_path / "run" / STATE_FILE).touch()  # killed before it was removed
        before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
        told = []
        run = record_training(CONFIG, tmp_path / "run", PLAIN, told.append, resume=True)
        del before[tmp_path / "run" / STATE_FILE]
        assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
        assert told == []

    def test_a_run_is_not_gone_on_with_unless_that_is_asked_for(self, tmp_path):
        sitting(tmp_path, until=6)
        with pytest.raises(StabilityProbeError, match="holds a run already"):
            record_training(CONFIG, tmp_path / "run", PLAIN)

    def test_other_settings_are_refused(self, tmp_path):
        run = sitting(tmp_path, until=6)
        before = run.info
        with pytest.raises(StabilityProbeError, match="seed = 0, and seed = 1 was asked for"):
            sitting(tmp_path, replace(CONFIG, seed=1))
        with pytest.raises(StabilityProbeError, match="every = 1, and every = 2 was asked for"):
            sitting(tmp_path, CONFIG, replace(PLAIN, every=2))
        assert run.info == before

    def test_a_run_that_diverged_is_refused_and_keeps_no_state(self, tmp_path):
        config = replace(CONFIG, learning_rate=1e30, warmup=6)
        probing = replace(PLAIN, save_every=1)
        with pytest.raises(TrainingDiverged):
            sitting(tmp_path, config, probing)
        run = Run.open(tmp_path / "run")
        assert not (run.path / STATE_FILE).exists()
        with pytest.raises(StabilityProbeError, match="and would do so again"):
            sitting(tmp_path, config, probing)

    def test_a_step_that_is_not_finite_is_not_saved(self, tmp_path, saved):
        """What is gone on with from there would diverge a step later."""
        config = replace(CONFIG, learning_rate=1e30, warmup=0)
        with pytest.raises(TrainingDiverged, match="not finite at step 2 of 11"):
            record_training(config, tmp_path / "run", replace(PLAIN, save_every=1))
        assert saved == [1]

    def test_weights_that_cannot_be_written_are_refused_before_training(self, tmp_path):
        (tmp_path / "file").touch()
        for weights in (tmp_path / "file" / "w.pth", tmp_path):
            with pytest.raises(StabilityProbeError, match="the weights cannot be written"):
                record_training(CONFIG, tmp_path / "run", PLAIN, weights=weights)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_save_every_is_checked(self):
        with pytest.raises(StabilityProbeError, match="save_every must be at least 0, got -2"):
            RecordConfig(save_every=-2)


class TestAFullDisk:
    def test_a_state_that_cannot_be_written_ends_nothing(self, tmp_path, whole, monkeypatch):
        save = torch.save

        def full(state, file):
            if "training" in state and state["training"]["step"] == 8:
                raise OSError(28, "No space left on device")
            save(state, file)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full)
            with pytest.warns(RecordWarning, match="training state cannot be written .+No space"):
                run = sitting(tmp_path, until=9)
        assert torch.load(run.path / STATE_FILE)["training"]["step"] == 4
        assert_same(sitting(tmp_path), whole)

    def test_records_that_cannot_be_stored_are_taken_again(self, tmp_path, whole, monkeypatch):
        """The state stays that of the last step up to which all records are stored."""
        put = run_module.put_in_place

        def full(partial, final):
            if final.suffix == ".parquet" and final.stem > "part-000002":
                raise OSError(28, "No space left on device")
            put(partial, final)

        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", RecordWarning)
            patch.setattr(run_module, "put_in_place", full)
            run = sitting(tmp_path)
        assert run.info["state"] == "failed" and "could not be stored" in run.info["reason"]
        assert torch.load(run.path / STATE_FILE)["training"]["step"] == 4
        run = sitting(tmp_path)
        assert run.info["resumed"] == [4]
        assert_same(run, whole)
