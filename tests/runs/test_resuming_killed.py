"""Training runs that are killed, at random moments and around every change that they make on disk.

A run that was killed is readable, misses no more than what had not been stored yet, and when it is
gone on with has the records and the weights of a run that never stopped.
"""

import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stability_probe import Run
from stability_probe.probes import ProbeConfig
from stability_probe.runs import RecordConfig, TrainConfig, record_training
from stability_probe.runs.run import STATE_FILE

LONG = TrainConfig(
    model="theory-unet", n_skips=2, data="uniform", batch_size=4, steps=30, scheme="ls", warmup=5
)
SHORT = replace(LONG, steps=5)
FLUSH = 2
PROBING = RecordConfig(
    sensitivity_every=0, probe_samples=4, save_every=8, probe=ProbeConfig(flush_every=FLUSH)
)
OFTEN = replace(PROBING, save_every=3)
KILLED = -signal.SIGKILL
OPERATIONS = ((os, "fsync"), (os, "replace"), (Path, "unlink"))
"""What changes a folder; a file is complete when it is synchronised, and there when replaced."""


def train(folder, config, probing):
    """Train or go on in a folder; a file in it has the steps that were taken in this sitting."""
    told = os.open(folder / "told", os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    record_training(
        config,
        folder / "run",
        probing,
        lambda step: os.write(told, b"%d\n" % step.step),
        folder / "weights.pth",
        resume=True,
    )


def train_up_to(folder, config, probing, last, torn):
    """The same, killed before the operation of that number; their names are in a file.

    Args:
        last: counted from 1; 0 for none.
        torn: whether what is about to be synchronised has only half of its bytes.
    """
    names = []

    def counted(name, original):
        def operate(what, *args, **options):
            names.append(name)
            if len(names) == last:
                if torn:
                    size = os.fstat(what).st_size
                    os.truncate(f"/proc/self/fd/{what}", size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(what, *args, **options)

        return operate

    for place, name in OPERATIONS:
        setattr(place, name, counted(name, getattr(place, name)))
    train(folder, config, probing)
    (folder / "operations").write_text(" ".join(names))


@dataclass(frozen=True)
class Whole:
    """What a run leaves that never stopped, and what it took."""

    config: TrainConfig
    probing: RecordConfig
    records: pd.DataFrame
    weights: dict
    seconds: float
    operations: list

    def check_stopped(self, folder):
        """What a killed run left; the last step that is recorded."""
        path = folder / "run"
        told = (folder / "told").read_text().split() if (folder / "told").exists() else []
        if not (path / "run.json").exists():
            assert not list(path.glob("records/*.parquet")) and not told
            return 0
        run = Run.open(path)
        assert run.info["state"] in ("running", "complete")
        parts = [pd.read_parquet(part) for part in sorted(path.glob("records/*.parquet"))]
        records = run.records()
        assert sum(map(len, parts)) == len(records)
        last = int(records.step.max()) if len(records) else 0
        same(records, self.records[self.records.step <= last])
        assert last > int(told[-1] if told else 0) - FLUSH
        if (path / STATE_FILE).exists():
            assert last >= torch.load(path / STATE_FILE)["training"]["step"]
        return last

    def check_finished(self, folder):
        """What a run left that has come to its end; the steps after which it was gone on with."""
        run = Run.open(folder / "run")
        assert (run.info["state"], run.info["reason"]) == ("complete", None)
        same(run.records(), self.records)
        weights = torch.load(folder / "weights.pth")
        assert weights.keys() == self.weights.keys()
        assert all(torch.equal(value, self.weights[name]) for name, value in weights.items())
        assert not list(folder.rglob("*.partial")) and not list(folder.rglob(STATE_FILE))
        return run.info.get("resumed", [])


def same(frame, expected):
    """Two frames are the same to the last bit."""
    if frame.empty and expected.empty:
        return
    expected = expected.reset_index(drop=True)
    pd.testing.assert_frame_equal(frame, expected, check_exact=True, check_categorical=False)
    assert np.array_equal(
        frame.value.to_numpy().view("i8"), expected.value.to_numpy(copy=True).view("i8")
    )


def whole(forks, folder, config, probing):
    first = forks.call(train_up_to, folder, config, probing, 0, False)
    assert first.codes == (0,), first.told
    records = Run.open(folder / "run").records()
    assert set(records.step) == set(range(1, config.steps + 1))
    return Whole(
        config, probing, records, torch.load(folder / "weights.pth"), first.seconds,
        (folder / "operations").read_text().split(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def long(forks, tmp_path_factory):
    return whole(forks, tmp_path_factory.mktemp("long"), LONG, PROBING)


@pytest.fixture(scope="module")
def short(forks, tmp_path_factory):
    return whole(forks, tmp_path_factory.mktemp("short"), SHORT, OFTEN)


def finish(forks, folder, whole):
    ended = forks.call(train, folder, whole.config, whole.probing)
    assert ended.codes == (0,), ended.told
    return whole.check_finished(folder)


@pytest.mark.parametrize("kills", [8, 50])
@pytest.mark.slow
def test_random_moments(forks, long, tmp_path, kills):
    """Every other run is killed a second time, while it goes on."""
    random = np.random.default_rng(kills)
    killed, lasts, after = 0, set(), []
    for k, moment in enumerate(random.uniform(0, long.seconds, kills)):
        folder = tmp_path / str(k)
        folder.mkdir()
        for seconds in (moment, moment / 2)[: 1 + k % 2]:
            ended = forks.call(train, folder, LONG, PROBING, kill_after=seconds)
            assert ended.codes in ((0,), (KILLED,)), ended.told
            killed += ended.codes == (KILLED,)
            lasts.add(long.check_stopped(folder))
        after += finish(forks, folder, long)
    assert killed > 0.7 * kills
    assert len(lasts) >= min(kills / 2, 8)  # they were stopped here and there
    assert any(step > 0 for step in after)  # and not all started again


def points(operations):
    """Every moment between two changes on disk, and every file half-written."""
    numbered = list(enumerate(operations, start=1))
    yield from ((number, False) for number, _ in numbered)
    yield from ((number, True) for number, name in numbered if name == "fsync")


@pytest.mark.slow
def test_every_change_on_disk(forks, short, tmp_path):
    assert short.operations.count("fsync") == short.operations.count("replace") == 7
    for number, torn in points(short.operations):
        folder = tmp_path / f"{number}{torn}"
        folder.mkdir()
        ended = forks.call(train_up_to, folder, SHORT, OFTEN, number, torn)
        assert ended.codes == (KILLED,), ended.told
        short.check_stopped(folder)
        finish(forks, folder, short)


@pytest.mark.parametrize("first", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stopped", ["before the first state", "after the last state"])
def test_every_change_on_disk_while_going_on(forks, short, tmp_path, stopped, first):
    """From a run that has records to drop."""
    renames = [n for n, name in enumerate(short.operations, start=1) if name == "replace"]
    at, last, expected = {
        "before the first state": (renames[2], 2, [0]),
        "after the last state": (renames[-1], 5, [3]),
    }[stopped]
    base = tmp_path / "base"
    base.mkdir()
    forks.call(train_up_to, base, SHORT, OFTEN, at, False)
    assert short.check_stopped(base) == last
    counted = shutil.copytree(base, tmp_path / "counted")
    ended = forks.call(train_up_to, counted, SHORT, OFTEN, 0, False)
    assert ended.codes == (0,), ended.told
    assert short.check_finished(counted) == expected
    operations = (counted / "operations").read_text().split()
    for number, torn in points(operations[:first]):
        folder = shutil.copytree(base, tmp_path / f"{number}{torn}")
        ended = forks.call(train_up_to, folder, SHORT, OFTEN, number, torn)
        assert ended.codes == (KILLED,), ended.told
        short.check_stopped(folder)
        assert finish(forks, folder, short)[0] == expected[0]
