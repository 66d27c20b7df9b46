"""Where records go, and what becomes of them while the disk is full."""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from stability_probe import Run
from stability_probe.errors import StabilityProbeError
from stability_probe.probes import Key
from stability_probe.probes.ranks import RecordWarning
from stability_probe.probes.records import Column, Layout
from stability_probe.probes.store import WAITING, Store


def frame(*steps):
    layout = Layout([Column(Key("loss", "loss", 0, "mean"))])
    return layout.frame(list(steps), np.array(steps, dtype=float).reshape(-1, 1))


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.begin({})
    return run


class Disk:
    """Lets a run's writes through, or not."""

    def __init__(self, run, monkeypatch):
        self.full, self.tries = False, 0
        for name in ("append", "end"):
            monkeypatch.setattr(run, name, self.guarded(getattr(run, name)))

    def guarded(self, write):
        def guarded(*args):
            self.tries += 1
            if self.full:
                raise StabilityProbeError("run/x: cannot be written (No space left on device)")
            write(*args)

        return guarded


def test_in_memory(tmp_path):
    store = Store(None)
    assert store.frame().empty
    store.put(frame(1, 2))
    store.put(frame())
    store.put(frame(3))
    assert store.frame().value.tolist() == [1.0, 2.0, 3.0]
    assert store.missing is None
    store.end(None, {})  # there is nothing to write it into


def test_who_else_is_told(run, monkeypatch):
    """Of every part once, whatever becomes of the folder; and no more after an error."""
    told = []

    def tell(part):
        told.extend(part.step)
        if 4 in told:
            raise RuntimeError("gone\n away")

    store, disk = Store(run, tell), Disk(run, monkeypatch)
    store.put(frame(1, 2))
    store.put(frame())
    disk.full = True
    with pytest.warns(RecordWarning, match="cannot be written"):
        store.put(frame(3))
    disk.full = False
    with pytest.warns(RecordWarning, match="failed .RuntimeError: gone away.*told of no"):
        store.put(frame(4))
    store.put(frame(5))
    assert told == [1, 2, 3, 4]
    assert run.records().step.tolist() == [1, 2, 3, 4, 5] and store.missing is None


def test_in_a_folder(run):
    store = Store(run)
    for steps in ((1, 2), (), (3,)):
        store.put(frame(*steps))
    assert run.records().value.tolist() == [1.0, 2.0, 3.0]
    assert len(list((run.path / "records").iterdir())) == 2  # nothing makes no part
    store.end(None, {"probe": {"overhead": 0.5}})
    assert (run.info["state"], run.info["reason"]) == ("complete", None)
    assert run.info["probe"] == {"overhead": 0.5}


def test_a_reason_is_a_failure(run):
    Store(run).end("ValueError: no", {})
    assert (run.info["state"], run.info["reason"]) == ("failed", "ValueError: no")


def test_parts_wait_for_the_disk_and_come_in_order(run, monkeypatch):
    store, disk = Store(run), Disk(run, monkeypatch)
    store.put(frame(1))
    disk.full = True
    with pytest.warns(RecordWarning, match="cannot be written.*training goes on") as warned:
        store.put(frame(2))
        store.put(frame(3, 4))
    assert len(warned) == 1
    assert run.records().step.tolist() == [1]
    assert store.frame().step.tolist() == [1, 2, 3, 4]
    assert store.missing.startswith("records of steps 2, 3–4 could not be stored: run/x: cannot be")
    disk.full = False
    store.put(frame())  # nothing new, and what waits is written all the same
    assert run.records().step.tolist() == [1, 2, 3, 4]
    store.put(frame(5))
    assert run.records().step.tolist() == [1, 2, 3, 4, 5]
    assert store.missing is None
    store.end(None, {})
    assert run.info["state"] == "complete"


def test_no_more_than_some_parts_wait_and_the_rest_is_named(run, monkeypatch):
    store, disk = Store(run), Disk(run, monkeypatch)
    disk.full = True
    with pytest.warns(RecordWarning) as warned:
        for step in range(1, WAITING + 4):
            store.put(frame(step))
        disk.full = False
        store.put(frame(99))
    assert len(warned) == 1
    kept = run.records().step.tolist()
    assert kept == [*range(4, WAITING + 4), 99]
    assert store.missing.startswith("records of steps 1, 2, 3 could not be stored: run/x")


def test_an_end_that_cannot_be_written_is_a_warning(run, monkeypatch):
    store, disk = Store(run), Disk(run, monkeypatch)
    disk.full = True
    with pytest.warns(RecordWarning, match="its run.json does not say how it ended"):
        store.end(None, {})
    assert run.info["state"] == "running"


def test_an_interrupt_leaves_a_part_for_the_next_time(run, monkeypatch):
    store = Store(run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.put(frame(1))
    assert store.missing == "records of steps 1 could not be stored: interrupted"
    store.put(frame())
    assert (run.records().step.tolist(), store.missing) == ([1], None)


def test_other_errors_are_not_hidden(run, monkeypatch):
    monkeypatch.setattr(run, "append", lambda frame: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Store(run).put(frame(1))


FULL = """
import resource, signal, sys, warnings
import torch
from stability_probe import Run, StabilityProbe, TheoryUNet, find_skips
from stability_probe.probes import ProbeConfig
torch.set_num_threads(1)
net, x = TheoryUNet(8, 2), torch.randn(4, 8)
run = Run(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    options = dict(every=1, sensitivity_every=0, run=run, config=ProbeConfig(flush_every=2))
    with StabilityProbe(net, find_skips(net, x), **options) as probe:
        for step in range(1, 9):
            if step == 3:  # from here on no file can grow: as good as a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            if step == 7 and sys.argv[2] == "freed":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            net(x).square().mean().backward()
            probe.step()
            net.zero_grad()
print(probe.steps, len([w for w in seen if "StabilityProbe" in str(w.message)]))
"""


@pytest.mark.parametrize("ending", ["full", pytest.param("freed", marks=pytest.mark.slow)])
def test_a_disk_that_is_really_full(tmp_path, ending):
    """The system refuses to write, as it does on a full disk; the training makes all its steps."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "run"), ending],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["8", "1"], done.stderr[-2000:]
    run = Run.open(tmp_path / "run")
    steps = sorted(run.records().step.unique())
    if ending == "freed":
        assert (run.info["state"], steps) == ("complete", list(range(1, 9)))
    else:  # not even run.json can be written
        assert (run.info["state"], steps) == ("running", [1, 2])


@contextmanager
def read_only(folder):
    """The folder takes no new files for a while; root, whom modes do not stop, is somebody else."""
    mode, root = folder.stat().st_mode, os.geteuid() == 0
    folder.chmod(0o555)
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(mode)


def test_a_folder_that_becomes_read_only():
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # so that anybody may look in
        run = Run(Path(place) / "run")
        run.begin({})
        store = Store(run)
        store.put(frame(1))
        with (
            pytest.warns(RecordWarning, match="part-000002.*Permission denied.*training goes on"),
            read_only(run.path / "records"),
        ):
            store.put(frame(2))
        assert run.records().step.tolist() == [1]
        store.put(frame(3))
        assert run.records().step.tolist() == [1, 2, 3]


def test_a_records_folder_that_has_gone(run):
    """What root sees of a read-only folder: a part that cannot be made."""
    store = Store(run)
    (run.path / "records").rmdir()
    (run.path / "records").write_text("in the way")
    with pytest.warns(RecordWarning, match="part-000001.parquet: cannot be written"):
        store.put(frame(1))
    (run.path / "records").unlink()
    (run.path / "records").mkdir()
    store.put(frame(2))
    assert run.records().step.tolist() == [1, 2]
