"""Sweeps: what is done, skipped, gone on with, listed and refused; processes that die."""

import os
import signal
import threading
import time
import warnings
from importlib import import_module

import pandas as pd
import pytest
import torch
from filelock import FileLock

from stability_probe import Run, StabilityProbeError
from stability_probe.probes.ranks import RecordWarning
from stability_probe.regression import run_numbers
from stability_probe.runs import Grid, cells, survey, sweep
from stability_probe.runs.cells import record_training
from stability_probe.runs.run import STATE_FILE
from stability_probe.runs.training import Training
from tests.oracles.workers import Died, hire_nobody

BASE = {
    "model": "theory-unet", "steps": 4, "n_skips": 2, "batch_size": 4, "data": "uniform",
}  # fmt: skip
PROBING = {"sensitivity_every": 0, "save_every": 2}
GRID = Grid(BASE, {"seed": [0, 1, 2]}, PROBING)
DIVERGING = Grid(BASE, {"learning_rate": [1e-3, 1e30]}, PROBING)
module = import_module("stability_probe.runs.sweep")


def numbers(run):
    """Something to measure."""
    return {"last": float(run.records().step.max())}


@pytest.fixture
def here(monkeypatch):
    """Runs are done in this process."""
    monkeypatch.setattr(module, "hire", hire_nobody)


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that are trained, and what is to happen to some of them."""
    seen, fates = [], {}

    def train(config, path, *arguments, **named):
        seen.append(path.name)
        if path.name in fates:
            raise fates[path.name]
        return record_training(config, path, *arguments, **named)

    monkeypatch.setattr(cells, "record_training", train)
    train.seen, train.fates = seen, fates
    return train


@pytest.mark.usefixtures("here")
class TestRuns:
    def test_are_done_once(self, tmp_path, trained, contents):
        told = []
        frame = sweep(GRID, tmp_path, measure=numbers, on_done=lambda *ended: told.append(ended))
        assert frame.run.tolist() == ["seed=0", "seed=1", "seed=2"] == trained.seen
        assert frame.seed.tolist() == [0, 1, 2] and (frame["last"] == 4).all()
        assert (frame.state == "complete").all() and (frame.seconds > 0).all()
        assert [name for name, _ in told] == trained.seen
        assert all(outcome.numbers == {"last": 4.0} for _, outcome in told)
        read = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
        pd.testing.assert_frame_equal(read, frame)
        before = contents(tmp_path)
        assert set(before) > {"runs/seed=1/run.json", "runs/seed=1/outcome.json"}
        assert not [name for name in before if name.endswith(("lock", "attempts")) and "/" in name]
        again = sweep(GRID, tmp_path, measure=numbers, on_done=lambda *ended: told.append(ended))
        assert contents(tmp_path) == before and len(told) == len(trained.seen) == 3
        pd.testing.assert_frame_equal(again, frame)
        pd.testing.assert_frame_equal(survey(GRID, tmp_path, numbers), frame)

    def test_are_added_by_more_values(self, tmp_path, trained):
        sweep(Grid(BASE, {"seed": [1]}, PROBING), tmp_path)
        sweep(GRID, tmp_path)
        assert trained.seen == ["seed=1", "seed=0", "seed=2"]

    def test_are_measured_later_without_training(self, tmp_path):
        sweep(GRID, tmp_path)
        before = (tmp_path / "runs/seed=0/run.json").stat().st_mtime_ns
        assert (sweep(GRID, tmp_path, measure=numbers)["last"] == 4).all()
        assert (tmp_path / "runs/seed=0/run.json").stat().st_mtime_ns == before

    def test_are_measured_again_by_another_measure(self, tmp_path, trained):
        def others(run):
            return {"first": 1.0}

        def none(run):
            return {}

        grid = Grid(BASE, {"seed": [0]}, PROBING)
        before = sweep(grid, tmp_path, measure=numbers).drop(columns="last")
        pd.testing.assert_frame_equal(
            sweep(grid, tmp_path, measure=others), before.assign(first=1.0)
        )
        for _ in range(2):
            pd.testing.assert_frame_equal(sweep(grid, tmp_path, measure=none), before)
        assert len(trained.seen) == 3, "once for each measure"

    def test_are_known_whatever_the_order_of_the_axes(self, tmp_path, trained):
        sweep(Grid(BASE, {"seed": [0], "width": [8]}, PROBING), tmp_path)
        frame = sweep(Grid(BASE, {"width": [8, 4], "seed": [0]}, PROBING), tmp_path)
        assert frame.run.tolist() == trained.seen == ["seed=0,width=8", "width=4,seed=0"]

    def test_are_told_from_other_folders(self, tmp_path):
        for folder in (".ipynb_checkpoints", "notes"):
            (tmp_path / "runs" / folder).mkdir(parents=True)
        (tmp_path / "runs/.ipynb_checkpoints/run.json").touch()
        assert survey(GRID, tmp_path).run.tolist() == ["seed=0", "seed=1", "seed=2"]

    def test_may_keep_their_weights(self, tmp_path):
        grid = Grid(BASE, {"seed": [0]}, PROBING, weights=True)
        for _ in range(2):
            assert sweep(grid, tmp_path).state.tolist() == ["complete"]
            (tmp_path / "runs/seed=0/outcome.json").unlink()
        weights = torch.load(tmp_path / "runs/seed=0/weights.pth")
        assert "middle.0.weight" in weights or len(weights) > 2

    def test_that_were_interrupted_are_gone_on_with(self, tmp_path, monkeypatch):
        whole = sweep(GRID, tmp_path / "whole", measure=run_numbers)
        step = Training.__next__

        def until(taken):
            if taken.config.seed == 1 and taken.step == 3:
                raise KeyboardInterrupt
            return step(taken)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Training, "__next__", until)
            sweep(GRID, tmp_path, measure=run_numbers)
        table = pd.read_csv(tmp_path / "results.csv")
        assert table.state.tolist() == ["complete", "open", "open"]
        assert (tmp_path / "runs/seed=1" / STATE_FILE).exists()
        frame = sweep(GRID, tmp_path, measure=run_numbers)
        assert Run.open(tmp_path / "runs/seed=1").info["resumed"] == [2]
        timed = ["seconds", "probe_overhead"]
        pd.testing.assert_frame_equal(frame.drop(columns=timed), whole.drop(columns=timed))


@pytest.mark.usefixtures("here")
class TestFailures:
    def test_are_listed_and_left_alone(self, tmp_path, trained):
        for _ in range(2):
            frame = sweep(DIVERGING, tmp_path, measure=numbers).set_index("learning_rate")
            assert frame.state.tolist() == ["complete", "failed"]
            assert frame.reason[1e30].startswith("TrainingDiverged: the loss was not finite at st")
            assert pd.isna(frame["last"][1e30])
        assert len(trained.seen) == 2

    def test_are_done_again_on_request(self, tmp_path, trained):
        sweep(DIVERGING, tmp_path)
        frame = sweep(DIVERGING, tmp_path, retry=True)
        assert trained.seen.count("learning_rate=1e+30") == 2
        assert frame.reason[1].startswith("TrainingDiverged"), "and not that it would do so again"

    def test_that_were_never_told_of_are_found(self, tmp_path, trained):
        folder = tmp_path / "runs/learning_rate=1e+30"
        reason = sweep(DIVERGING, tmp_path).reason[1]
        for retry, times in ((False, 1), (True, 1), (True, 2)):
            if times == 1:  # its process died right after the training
                (folder / "outcome.json").unlink()
            assert sweep(DIVERGING, tmp_path, retry=retry).reason[1] == reason
            assert trained.seen.count(folder.name) == times
            assert Run.open(folder).info["state"] == "failed"

    @pytest.mark.parametrize("error", [StabilityProbeError("no\nsuch"), MemoryError("no such")])
    def test_of_any_kind(self, tmp_path, trained, error):
        trained.fates["seed=1"] = error
        frame = sweep(GRID, tmp_path).set_index("run")
        assert frame.state.tolist() == ["complete", "failed", "complete"]
        assert frame.reason["seed=1"] == f"{type(error).__name__}: no such"
        trained.fates.clear()
        assert (sweep(GRID, tmp_path).state == "failed").any()
        assert (sweep(GRID, tmp_path, retry=True).state == "complete").all()

    def test_warnings_are_in_the_table(self, tmp_path, monkeypatch):
        def train(*arguments, **named):
            warnings.warn("look out", RecordWarning, stacklevel=1)
            return record_training(*arguments, **named)

        monkeypatch.setattr(cells, "record_training", train)
        assert sweep(GRID, tmp_path).warnings.tolist() == ["look out"] * 3


@pytest.mark.usefixtures("here")
class TestDeath:
    def test_of_a_process_is_survived(self, tmp_path, trained, monkeypatch):
        died = []

        def once(config, path, *arguments, **named):
            if config.seed == 1 and len(died) < 3:
                died.append(path.name)
                raise Died
            return trained(config, path, *arguments, **named)

        monkeypatch.setattr(cells, "record_training", once)
        with pytest.warns(RecordWarning, match="a process has died; its run is gone on with by an"):
            frame = sweep(GRID, tmp_path)
        assert (frame.state == "complete").all()
        assert trained.seen == ["seed=0", "seed=2", "seed=1"], "the suspect last, and alone"

    def test_time_and_again_is_a_failure_of_the_run(self, tmp_path, trained):
        trained.fates["seed=0"] = Died()
        with pytest.warns(RecordWarning, match="a process has died"):
            frame = sweep(GRID, tmp_path).set_index("run")
        assert frame.state.tolist() == ["failed", "complete", "complete"]
        assert frame.reason["seed=0"] == (
            "its process was killed each of the 4 times it was started"
        )
        assert trained.seen.count("seed=0") == 4

    def test_before_anything_is_started_ends_the_sweep(self, tmp_path, monkeypatch):
        def work(*arguments):
            raise Died("no room")

        monkeypatch.setattr(module, "work", work)
        message = r"processes die before they start a run \(no room\); see whether"
        with pytest.raises(StabilityProbeError, match=message), pytest.warns(RecordWarning):
            sweep(GRID, tmp_path)
        assert (pd.read_csv(tmp_path / "results.csv").state == "open").all()


@pytest.mark.usefixtures("here")
class TestRefused:
    @pytest.fixture
    def done(self, tmp_path):
        """The folder of a sweep with two runs done."""
        sweep(Grid(BASE, {"seed": [0, 1]}, PROBING), tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("grid", "message"),
        [
            (Grid({**BASE, "steps": 5}, GRID.axes, PROBING), "run with steps = 4, and steps = 5"),
            (
                Grid(BASE, GRID.axes),
                "with sensitivity_every = 0, and sensitivity_every = 100",
            ),
            (Grid(BASE, GRID.axes, PROBING, True), "weights = False, and weights = True"),
            (Grid(BASE, {"seed": [1]}, PROBING), "the run seed=0, which the grid has not; add it"),
            (Grid(BASE, {"width": [8]}, PROBING), "holds the run seed=0, which the grid has not"),
        ],
    )
    def test_another_grid(self, done, contents, grid, message):
        before = contents(done)
        with pytest.raises(StabilityProbeError, match=message):
            sweep(grid, done, retry=True)
        assert contents(done) == before

    @pytest.mark.parametrize(
        ("base", "weights", "message"),
        [
            ({**BASE, "steps": 5}, False, "a run with steps = 4, and steps = 5"),
            (BASE, True, "a run with weights = False, and weights = True"),
        ],
    )
    def test_another_grid_where_a_run_has_no_outcome(self, tmp_path, base, weights, message):
        sweep(Grid(BASE, {"seed": [1]}, PROBING), tmp_path)
        (tmp_path / "runs/seed=1/outcome.json").unlink()
        with pytest.raises(StabilityProbeError, match=message):
            sweep(Grid(base, {"seed": [1]}, PROBING, weights), tmp_path)

    def test_a_damaged_outcome(self, done):
        (done / "runs/seed=1/outcome.json").write_text("{")
        with pytest.raises(StabilityProbeError, match=r"outcome.json: cannot be read .*; rem"):
            sweep(GRID, done)

    def test_a_folder_in_use(self, tmp_path):
        with (
            FileLock(tmp_path / "sweep.lock", is_singleton=False),
            pytest.raises(StabilityProbeError, match="another sweep is at work in it; wait for it"),
        ):
            sweep(GRID, tmp_path)

    def test_a_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StabilityProbeError, match=r"cannot be written .*; choose another fold"):
            sweep(GRID, tmp_path / "file" / "deeper")

    def test_a_run_that_is_a_file(self, tmp_path):
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "seed=1").touch()
        with pytest.raises(StabilityProbeError, match="seed=1: cannot be written"):
            sweep(GRID, tmp_path)


# Long enough to be killed in mid-run, on any machine.
LONG = Grid({**BASE, "steps": 300}, {"seed": [0, 1, 2, 3]}, {**PROBING, "save_every": 50})
LONGER = Grid({**BASE, "steps": 900}, {"seed": [0, 1, 2, 3]}, {**PROBING, "save_every": 50})
"""A worker outlives its Ray node by seconds, on a busy machine by more than 300 steps."""


def under_way(out, number):
    """Wait for so many runs to be under way with their training saved; their names and processes.

    There are fewer of them where one has just ended.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = {}
        for file in out.glob("runs/*/attempts"):
            if (file.parent / STATE_FILE).exists():
                try:
                    found[file.parent.name] = int(file.read_text().splitlines()[-1].split()[-1])
                except (FileNotFoundError, IndexError):
                    continue
        if len(found) >= number:
            return found
        time.sleep(0.01)
    raise AssertionError("no run has been started in five minutes")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill_one(out, killed):
    """Kill the process of a run, and say which it was."""
    name, pid = next(iter(under_way(out, 1).items()))
    os.kill(pid, signal.SIGKILL)
    killed.append(name)


def sweep_with_a_death(out, backend):
    """Do a sweep of which one process is killed; the table, and the run that was in it."""
    killed = []
    killer = threading.Thread(target=kill_one, args=(out, killed))
    killer.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordWarning)
        frame = sweep(LONG, out, backend=backend, jobs=2, measure=run_numbers)
    killer.join()
    return frame, killed[0]


def assert_all_there(frame, out, killed, steps=300):
    """Every run is complete to its last step, the one that lost its process by going on."""
    assert frame.run.tolist() == ["seed=0", "seed=1", "seed=2", "seed=3"]
    assert (frame.state == "complete").all(), frame.reason.tolist()
    for name in frame.run:
        assert Run.open(out / "runs" / name).records().step.max() == steps
    resumed = Run.open(out / "runs" / killed).info["resumed"]
    assert resumed and resumed[0] >= 50, "it was in mid-run when its process was killed"


@pytest.mark.parametrize("backend", ["local", pytest.param("dask", marks=pytest.mark.slow)])
def test_every_run_is_had_though_a_process_is_killed(tmp_path, backend):
    frame, killed = sweep_with_a_death(tmp_path, backend)
    assert_all_there(frame, tmp_path, killed)


QUICK_TO_NOTICE = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}
"""Ray notices the death of a machine within seconds."""


@pytest.fixture
def cluster():
    """A Ray cluster of a head that does no work and two workers with a core each."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE, **small}
    started = Cluster(initialize_head=True, head_node_args=head)
    try:
        started.workers = [started.add_node(num_cpus=1, **small) for _ in range(2)]
        yield started
    finally:
        started.shutdown()


@pytest.mark.slow
def test_every_run_is_had_though_one_of_two_ray_workers_is_killed(tmp_path, cluster):
    killed = []

    def kill():
        before = under_way(tmp_path, 2)
        cluster.remove_node(cluster.workers[1], allow_graceful=False)
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            killed.extend(name for name, pid in before.items() if not alive(pid))
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.warns(RecordWarning, match="a process has died"):
        frame = sweep(LONGER, tmp_path, backend="ray", address=cluster.address, measure=run_numbers)
    killer.join()
    assert_all_there(frame, tmp_path, killed[0], steps=900)
