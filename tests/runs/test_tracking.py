"""Trackers: they show what the run has recorded, and no more than show."""

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker

from stability_probe import Run, StabilityProbe, StabilityProbeError, TheoryUNet, find_skips
from stability_probe.probes import ProbeConfig, SensitivityConfig
from stability_probe.probes.ranks import RecordWarning
from stability_probe.regression.measures import measures_of
from stability_probe.runs import (
    RecordConfig,
    Trackers,
    TrainConfig,
    log_to,
    open_runs,
    record_training,
    scalars,
    tracking,
)
from stability_probe.verify import Evidence
from tests.oracles.curves import tensorboard_curves, wandb_curves

CONFIG = TrainConfig(
    model="theory-unet", scheme="cs:0.5", n_skips=2, batch_size=8, steps=9, warmup=4
)
PROBING = RecordConfig(
    every=2,
    sensitivity_every=4,
    probe_samples=3,
    sensitive_samples=2,
    save_every=4,
    paths=True,
    probe=ProbeConfig(
        flush_every=2,
        sensitivity=SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=2),
    ),
)
PLAIN = replace(PROBING, every=1, sensitivity_every=0)
NAMES = {
    "loss/mean", "kappa/skip_1", "kappa/skip_2", "energy/h_0", "energy/h_1", "energy/h_2",
    "gradient/a_1", "gradient/a_2", "gradient/b_1", "gradient/b_2", "gradient/mid",
    "sensitivity/exact", "sensitivity/pathwise", "path/skip_1", "path/skip_2", "path/mid",
    "path/around", "learning_rate",
}  # fmt: skip


class InMemory(GeneralTracker):
    """Keeps what it is told, and fails when told to."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self, name="memory", fails_at=None):
        self.rows, self.name, self.fails_at, self.ended = [], name, fails_at, False
        super().__init__()

    @property
    def tracker(self):
        return self.rows

    def log(self, values, step=None, **more):
        if step == self.fails_at is not None:
            raise OSError(28, "No space left on device")
        self.rows.append((step, values, more))

    def finish(self):
        self.ended = True


@pytest.fixture
def made(monkeypatch):
    """Trackers in memory in the place of the real ones, by name, as they are started."""
    found = {}

    def make(name, fails_at=None):
        def tracker(run, after):
            found[name] = InMemory(name, fails_at)
            return found[name]

        monkeypatch.setitem(tracking._MADE, name, tracker)
        return found

    return make


def curves_of(run):
    """What records say, without `scalars`: rows that are looked for one by one."""
    frame = run.records()
    frame = frame.astype({"site": str, "stat": str, "metric": str})
    curves = {}

    def put(name, rows, how="mean"):
        if len(rows):
            curves[name] = getattr(rows.groupby("step").value, how)().to_dict()

    means, singly = frame[frame.stat == "mean"], frame[frame.stat.str.match(r"s\d")]
    put("loss/mean", means[means.metric == "loss"])
    for i in range(3):
        put(f"kappa/skip_{i}", means[(means.metric == "kappa") & (means.level == i)])
        put(f"energy/h_{i}", means.query(f"metric == 'energy' and site == 'h' and level == {i}"))
        paths = singly[(singly.metric == "path") & (singly.level == i)]
        put(f"path/skip_{i}", paths[paths.site == "skip"])
        grads = frame[(frame.metric == "grad_energy") & (frame.level == i)]
        for kind in "ab":
            put(f"gradient/{kind}_{i}", grads[grads.site.str.startswith(f"{kind}/")], "sum")
    put(
        "gradient/mid",
        frame[(frame.metric == "grad_energy") & frame.site.str.startswith("mid")],
        "sum",
    )
    put("sensitivity/exact", singly[singly.metric == "sigma_max"])
    for site in ("mid", "around"):
        put(f"path/{site}", singly[(singly.metric == "path") & (singly.site == site)])
    paths = singly[singly.metric == "path"]
    if len(paths):
        samples = paths.stat.nunique()
        curves["sensitivity/pathwise"] = (paths.groupby("step").value.sum() / samples).to_dict()
    return curves


def assert_curves(curves, expected, rel=1e-12):
    assert curves.keys() == expected.keys()
    for name, curve in curves.items():
        assert curve == pytest.approx(expected[name], rel=rel), name


def rates(run):
    """The learning rates of recorded steps, by hand."""
    steps = sorted(set(run.records().step))
    return {step: 1e-3 * min((step - 1) / CONFIG.warmup, 1) for step in steps}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run that TensorBoard was told of."""
    folder = tmp_path_factory.mktemp("tracked")
    return record_training(CONFIG, folder / "run", PROBING, track=["tensorboard"])


class TestScalars:
    def test_are_what_the_records_say(self, tracked):
        curves = {}
        steps = []
        for step, values in scalars(tracked.records()):
            steps.append(step)
            for name, value in values.items():
                curves.setdefault(name, {})[step] = value
        assert_curves(curves, curves_of(tracked))
        assert curves.keys() == NAMES - {"learning_rate"}
        assert steps == [1, 2, 4, 6, 8]
        assert list(curves["sensitivity/exact"]) == [1, 4, 8]

    def test_are_what_a_check_compares(self, tracked):
        """Under the same names; of a single step, so that means over steps are the numbers."""
        frame = tracked.records()
        last = frame[frame.step == 8]
        ((_, values),) = scalars(last)
        found = measures_of(Evidence("run", last, info=tracked.info)).tested
        for name, value in found.items():
            mine = {"loss": "loss/mean"}.get(name, name.replace(".", "/"))
            mine = mine.replace("gain/", "kappa/")
            if not mine.startswith("oscillation/"):
                assert values[mine] == pytest.approx(value, rel=1e-12), name

    def test_a_loss_that_is_not_finite_stays_so(self):
        frame = pd.DataFrame({
            "step": [1, 1], "metric": "grad_energy", "site": ["a/w", "a/v"], "level": 1,
            "stat": "value", "value": [np.nan, 1.0],
        })  # fmt: skip
        ((step, values),) = scalars(frame)
        assert step == 1 and np.isnan(values["gradient/a_1"])

    def test_of_nothing(self, tracked):
        assert list(scalars(tracked.records().iloc[:0])) == []


class TestTraining:
    def test_tensorboard_has_the_records(self, tracked):
        curves = tensorboard_curves(tracked.path / "tensorboard")
        assert curves.keys() == NAMES
        expected = {**curves_of(tracked), "learning_rate": rates(tracked)}
        assert_curves(curves, expected, rel=1e-6)  # it has float32

    def test_the_run_is_what_it_was(self, made, tmp_path):
        """The same records, and a configuration that does not know of trackers."""
        made("wandb")
        tracked = record_training(CONFIG, tmp_path / "tracked", PLAIN, track=["wandb"])
        plain = record_training(CONFIG, tmp_path / "plain", PLAIN)
        assert tracked.records().equals(plain.records())
        infos = [Run.open(run.path).info for run in (tracked, plain)]
        assert infos[0].pop("probe").keys() == infos[1].pop("probe").keys()
        assert infos[0] == infos[1]

    def test_steps_are_logged_once_and_in_order(self, made, tmp_path):
        found = made("tensorboard")
        run = record_training(CONFIG, tmp_path / "run", PLAIN, track=["tensorboard"] * 2)
        tracker = found["tensorboard"]
        assert [step for step, _, _ in tracker.rows] == list(range(1, 10))
        assert {v["learning_rate"] for _, v, _ in tracker.rows} == set(rates(run).values())
        assert tracker.ended

    def test_nothing_is_logged_in_a_step(self, made, tmp_path):
        """But when records are stored: every fourth step, and at the end."""
        found, seen = made("tensorboard"), []

        def on_step(taken):
            seen.append(len(found["tensorboard"].rows))

        probing = replace(PLAIN, save_every=0, probe=ProbeConfig(flush_every=4))
        record_training(CONFIG, tmp_path / "run", probing, on_step, track=["tensorboard"])
        assert seen == [0, 0, 0, 4, 4, 4, 4, 8, 8]
        assert len(found["tensorboard"].rows) == 9


class TestFailures:
    def test_a_tracker_that_fails_ends_nothing(self, made, tmp_path):
        made("wandb", fails_at=3)
        found = made("tensorboard")
        with pytest.warns(RecordWarning, match="the tracker wandb failed") as warned:
            run = record_training(CONFIG, tmp_path / "run", PLAIN, track=["wandb", "tensorboard"])
        (warning,) = [w for w in warned if issubclass(w.category, RecordWarning)]
        assert str(warning.message) == (
            f"{run.path}: the tracker wandb failed (OSError: [Errno 28] No space left on device); "
            "training goes on, and it gets nothing more"
        )
        assert run.info["state"] == "complete" and set(run.records().step) == set(range(1, 10))
        assert len(found["wandb"].rows) == 2 and not found["wandb"].ended
        assert len(found["tensorboard"].rows) == 9

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_disk_that_fills_up_under_tensorboard(self, tmp_path, monkeypatch):
        write = TensorBoardTracker.log

        def full(tracker, values, step=None, **more):
            if step == 2:  # as its thread that writes would find out
                tracker.writer.file_writer.event_writer._async_writer._writer.close()
            write(tracker, values, step, **more)

        monkeypatch.setattr(TensorBoardTracker, "log", full)
        with pytest.warns(RecordWarning, match="the tracker tensorboard failed"):
            run = record_training(CONFIG, tmp_path / "run", PLAIN, track=["tensorboard"])
        assert set(run.records().step) == set(range(1, 10))

    def test_one_that_cannot_end(self, made, tmp_path, monkeypatch):
        made("tensorboard")
        monkeypatch.setattr(InMemory, "finish", lambda self: 1 / 0)
        with pytest.warns(RecordWarning, match=r"tensorboard failed \(ZeroDivisionError"):
            run = record_training(CONFIG, tmp_path / "run", PLAIN, track=["tensorboard"])
        assert run.info["state"] == "complete"

    def test_one_that_cannot_be_started(self, made, tmp_path, monkeypatch):
        found = made("tensorboard")
        monkeypatch.setitem(tracking._MADE, "wandb", lambda run, after: 1 / 0)
        with pytest.raises(StabilityProbeError) as refused:
            record_training(CONFIG, tmp_path / "run", PLAIN, track=["tensorboard", "wandb"])
        assert found["tensorboard"].ended
        assert str(refused.value) == (
            f"{tmp_path / 'run'}: the tracker wandb cannot be started (ZeroDivisionError: division "
            "by zero); see to that, or train without --track wandb"
        )
        monkeypatch.undo()
        record_training(CONFIG, tmp_path / "run", PLAIN)  # the folder is still free

    def test_unknown(self, tmp_path):
        with pytest.raises(
            StabilityProbeError, match="unknown tracker 'aim'; choose from tensorboard, wandb"
        ):
            Trackers(["aim"], Run(tmp_path))

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tracking, "find_spec", lambda name: None)
        with pytest.raises(StabilityProbeError, match="not installed; install stability_probe"):
            Trackers(["wandb"], Run(tmp_path))


class Stopped(Exception):
    pass


def stop_at(step):
    def act(taken):
        if taken.step == step:
            raise Stopped

    return act


class TestGoingOn:
    def test_tensorboard_shows_every_step_once(self, tmp_path):
        track = ["tensorboard"]
        for until in (7, None):
            arguments = (CONFIG, tmp_path / "run", PLAIN)
            if until:
                with pytest.raises(Stopped):
                    record_training(*arguments, stop_at(until), resume=True, track=track)
                assert len(tensorboard_curves(tmp_path / "run" / "tensorboard")["loss/mean"]) == 7
            else:
                run = record_training(*arguments, resume=True, track=track)
        assert run.info["resumed"] == [4]
        expected = {**curves_of(run), "learning_rate": rates(run)}
        assert_curves(tensorboard_curves(run.path / "tensorboard"), expected, rel=1e-6)

    def test_a_run_may_be_gone_on_with_under_other_trackers(self, made, tmp_path):
        with pytest.raises(Stopped):
            record_training(CONFIG, tmp_path / "run", PLAIN, stop_at(7))
        found = made("wandb")
        record_training(CONFIG, tmp_path / "run", PLAIN, resume=True, track=["wandb"])
        assert [step for step, _, _ in found["wandb"].rows] == [5, 6, 7, 8, 9]

    def test_a_complete_run_starts_no_tracker(self, made, tracked):
        found = made("tensorboard")
        record_training(CONFIG, tracked.path, PROBING, resume=True, track=["tensorboard"])
        assert not found


@pytest.fixture
def offline(monkeypatch):
    """W&B that reaches for no network, and whose service has ended afterwards."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def test_wandb_offline(offline, tmp_path):
    config = replace(CONFIG, steps=3)
    run = record_training(config, tmp_path / "run", PLAIN, track=["wandb"])
    (file,) = (run.path / "wandb").rglob("run-*.wandb")
    expected = {**curves_of(run), "learning_rate": rates(run)}
    assert_curves(wandb_curves(file), expected)
    assert set(expected["loss/mean"]) == {1, 2, 3}
    assert open_runs([tmp_path])[0].records().equals(run.records())


@pytest.mark.slow
def test_wandb_in_two_sittings(offline, tmp_path):
    """Two folders of one run, with the records of the steps of each."""
    with pytest.raises(Stopped):
        record_training(CONFIG, tmp_path / "run", PLAIN, stop_at(6), track=["wandb"])
    run = record_training(CONFIG, tmp_path / "run", PLAIN, resume=True, track=["wandb"])
    files = sorted((run.path / "wandb").rglob("run-*.wandb"), key=os.path.getmtime)
    assert len(files) == 2 and len({file.name for file in files}) == 1
    expected = {**curves_of(run), "learning_rate": rates(run)}
    for file, steps in zip(files, (range(1, 7), range(5, 10)), strict=True):
        mine = {name: {step: curve[step] for step in steps} for name, curve in expected.items()}
        assert_curves(wandb_curves(file), mine)
    assert Run.open(run.path).records().equals(run.records())


class TestLogTo:
    def probed(self, *trackers):
        """An accelerator's trackers, told of five steps in two parts."""
        accelerator = Accelerator(cpu=True, log_with=list(trackers))
        net = TheoryUNet(8, 2)
        x = torch.ones(4, 8)
        config = ProbeConfig(flush_every=3)
        with StabilityProbe(
            net, find_skips(net, x), every=1, sensitivity_every=0,
            on_records=log_to(accelerator), config=config,
        ) as probe:  # fmt: skip
            accelerator.init_trackers("mine")
            for _ in range(5):
                net.zero_grad()
                loss = net(x).square().mean(1)
                loss.mean().backward()
                probe.step(loss=loss)
                accelerator.log({"mine": 0.0}, step=probe.steps)
        return dict(scalars(probe.frame()))

    def test_every_step_under_its_own_number(self):
        tracker = InMemory()
        rows = self.probed(tracker)
        told = {step: values for step, values, _ in tracker.rows if "mine" not in values}
        assert told == rows and list(rows) == [1, 2, 3, 4, 5]

    def test_wandb_gets_the_newest_in_its_row(self):
        """Which it would not take under the number of a step that is past."""
        tracker = InMemory("wandb")
        rows = self.probed(tracker)
        told = [(values, more) for step, values, more in tracker.rows if step is None]
        assert told == [(rows[3], {"commit": False}), (rows[5], {"commit": False})]
