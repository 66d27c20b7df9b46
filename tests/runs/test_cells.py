"""One run of a sweep: by how many processes and threads it is done, and how often."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from filelock import FileLock, Timeout

from stability_probe.runs import RecordConfig, TrainConfig, cells

CONFIG = TrainConfig(model="theory-unet", steps=2, n_skips=2, batch_size=4, data="uniform")


@pytest.fixture
def cell(tmp_path):
    """A run that has not been started."""
    return cells.Cell(tmp_path / "run", CONFIG, RecordConfig(sensitivity_every=0))


def test_is_done_by_one_process_at_a_time(cell, monkeypatch):
    cell.folder.mkdir()
    alone, train = [], cells.record_training

    def look(*arguments, **named):
        try:
            FileLock(cell.folder / "lock", is_singleton=False).acquire(timeout=0)
        except Timeout:
            alone.append(True)
        return train(*arguments, **named)

    monkeypatch.setattr(cells, "record_training", look)
    waiting = threading.Thread(target=cells.work, args=(cell, 1, False))
    with FileLock(cell.folder / "lock", is_singleton=False):
        waiting.start()
        time.sleep(0.3)
        assert not cell.attempts, "it waits"
    waiting.join()
    assert alone == [True] and cell.outcome().state == "complete"


def test_has_the_threads_of_its_worker(cell, monkeypatch):
    found, train = [], cells.record_training

    def look(*arguments, **named):
        found.append(torch.get_num_threads())
        return train(*arguments, **named)

    monkeypatch.setattr(cells, "record_training", look)
    cells.work(replace(cell, threads=3), 1, False)
    assert found == [3] and torch.get_num_threads() == 1


def test_is_left_alone_once_it_has_ended(cell, monkeypatch):
    cells.work(cell, 1, False)
    monkeypatch.setattr(cells, "record_training", lambda *_, **__: pytest.fail("is trained again"))
    cells.work(cell, 1, False)
    assert cell.outcome().state == "complete"
