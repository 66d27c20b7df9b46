"""A run folder that is gone on with, or begun again."""

import os
from pathlib import Path

import pandas as pd
import pytest

from stability_probe import Run, StabilityProbeError
from tests.oracles.runs import rows


class TestResume:
    @pytest.fixture
    def stopped(self, run):
        """Four parts of two steps each, as they are after a failure."""
        for step in (1, 3, 5, 7):
            run.append(rows(step, step + 1))
        run.end("failed", "KeyboardInterrupt: ", {"probe": {"overhead": 0.1}})
        return Run.open(run.path)

    def parts(self, run):
        return sorted(p.name for p in (run.path / "records").iterdir())

    @pytest.mark.parametrize(
        ("step", "parts"), [(8, 4), (9, 4), (7, 4), (6, 3), (5, 3), (2, 1), (1, 1)]
    )
    def test_drops_what_is_later(self, stopped, step, parts):
        stopped.resume(step)
        assert stopped.records().step.tolist() == [
            s for s in range(1, min(step, 8) + 1) for _ in range(2)
        ]
        assert self.parts(stopped) == [f"part-{k:06d}.parquet" for k in range(1, parts + 1)]
        expected = rows(*range(1, min(step, 8) + 1))
        pd.testing.assert_frame_equal(
            stopped.records(), expected, check_categorical=False, check_dtype=False
        )

    def test_the_next_part_has_the_next_number(self, stopped):
        stopped.append(rows(9))  # so that a number is known
        stopped.resume(4)
        stopped.append(rows(5))
        assert self.parts(stopped) == [f"part-{k:06d}.parquet" for k in (1, 2, 3)]
        assert set(Run.open(stopped.path).records().step) == {1, 2, 3, 4, 5}

    def test_run_json_says_so(self, stopped):
        before = stopped.info
        stopped.resume(6)
        assert stopped.info == {**before, "state": "running", "reason": None, "resumed": [6]}
        stopped.resume(6)
        stopped.resume(2)
        assert stopped.info["resumed"] == [6, 6, 2]

    def test_leftovers_go(self, stopped):
        for name in ("run.json.partial", "records/part-000005.partial", "other.pt.partial"):
            (stopped.path / name).write_bytes(b"half")
        stopped.resume(8)
        assert not list(stopped.path.rglob("*.partial"))

    def test_a_part_that_is_cut_is_whole_at_every_moment(self, stopped, monkeypatch):
        def fail(*names):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(StabilityProbeError, match=r"run.json: cannot be written"):
                stopped.resume(5)
        assert set(stopped.records().step) == set(range(1, 9))
        with monkeypatch.context() as patch:
            patch.setattr(stopped, "update", lambda info: None)
            patch.setattr(os, "replace", fail)
            with pytest.raises(StabilityProbeError, match=r"part-000003.parquet: cannot be writ"):
                stopped.resume(5)
        assert set(stopped.records().step) == set(range(1, 7))
        stopped.resume(5)
        assert set(stopped.records().step) == set(range(1, 6))

    def test_the_last_parts_go_first(self, stopped, monkeypatch):
        """Whenever that is cut short, what is left is the beginning of the records."""
        unlink, gone = Path.unlink, []

        def unlink_twice(path, **options):
            if len(gone) == 2:
                raise OSError(30, "Read-only file system")
            gone.append(path.name)
            unlink(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink_twice)
            with pytest.raises(
                StabilityProbeError, match=r"cannot be written \(Read-only file system\), and so no"
            ):
                stopped.resume(1)
        assert set(stopped.records().step) == {1, 2, 3, 4}

    @pytest.mark.parametrize("cleared", [False, True])
    def test_a_cleared_run_begins_again(self, run, cleared):
        run.append(rows(1))
        (run.path / "records" / "part-000001.partial").write_bytes(b"half")
        again = Run(run.path, {"seed": 4}, {"kind": "training"})
        if not cleared:
            with pytest.raises(StabilityProbeError, match="holds a run already"):
                again.begin({})
            return
        before = run.info
        again.clear()
        assert again.records().empty and list((run.path / "records").iterdir()) == []
        assert run.info == before  # until it does
        again.begin({"skips": []})
        info = again.info
        assert (info["state"], info["kind"], info["resumed"]) == ("running", "training", [0])
        assert (info["config"], info["skips"]) == ({"seed": 4}, [])
        again.append(rows(1))
        assert self.parts(run) == ["part-000001.parquet"]
