"""Where a training run starts, and the files that it goes on from."""

import os
from dataclasses import dataclass

import pytest
import torch

from stability_probe import Run, StabilityProbeError
from stability_probe.probes import ProbeConfig, SensitivityConfig
from stability_probe.runs import RecordConfig, TrainConfig
from stability_probe.runs.resuming import (
    STATE_FILE,
    Start,
    discard_state,
    find_start,
    load_state,
    refuse_contradiction,
    refuse_unwritable,
    save_state,
    settings_from,
    write_whole,
)

CONFIG = TrainConfig(steps=9, scheme="ls").as_dict()
STATE = {"training": {"w": torch.arange(3.0), "n": 3}, "probe": {"steps": 3, "seconds": [0.5]}}


def a_run(folder, config=CONFIG, **probing):
    return Run(folder / "run", config, {"probing": RecordConfig(**probing).as_dict()})


@pytest.fixture
def run(tmp_path):
    """A run that has begun."""
    run = a_run(tmp_path)
    run.begin({})
    return run


class TestStart:
    @pytest.mark.parametrize("resume", [False, True])
    def test_of_a_run_that_is_not_there(self, tmp_path, resume):
        assert find_start(a_run(tmp_path), resume) == Start()
        (tmp_path / "run" / "records").mkdir(parents=True)
        (tmp_path / "run" / "run.json.partial").write_text("{")
        assert find_start(a_run(tmp_path), resume) == Start()
        (tmp_path / "run" / "records" / "part-000001.parquet").touch()
        with pytest.raises(StabilityProbeError, match="holds a run already"):
            find_start(a_run(tmp_path), resume)

    @pytest.mark.parametrize("ending", [("running", None), ("failed", "KeyboardInterrupt: ")])
    def test_of_a_run_that_stopped(self, run, ending):
        (run.path / "records" / "part-000001.parquet").touch()
        run.end(*ending, {})
        with pytest.raises(StabilityProbeError, match="holds a run already"):
            find_start(run, False)
        assert find_start(run, True) == Start(again=True)
        save_state(run, STATE)
        start = find_start(run, True)
        assert (start.finished, start.again) == (False, False)
        assert start.state["training"]["n"] == 3

    def test_of_a_run_that_is_complete(self, run):
        save_state(run, STATE)
        run.end("complete", None, {})
        assert find_start(run, True) == Start(finished=True)

    def test_of_a_run_that_diverged(self, run):
        save_state(run, STATE)
        run.end("failed", "TrainingDiverged: the loss was not finite at step 2 of 9", {})
        with pytest.raises(
            StabilityProbeError,
            match=r"run: diverged .the loss was not finite at step 2 of 9. and would do so again",
        ):
            find_start(run, True)

    def test_with_other_settings(self, run, tmp_path):
        find_start(run, True)
        for other, message in (
            (a_run(tmp_path, CONFIG | {"steps": 8}), "steps = 9, and steps = 8 was asked for"),
            (a_run(tmp_path, every=2), "every = 1, and every = 2 was asked for"),
            (a_run(tmp_path, probe=ProbeConfig()), "probe = None, and probe = "),
        ):
            with pytest.raises(StabilityProbeError, match=f"run: holds a run with {message}"):
                find_start(other, True)

    def test_settings_that_are_left_open_do_not_contradict(self, tmp_path):
        there = {"steps": 9, "probe": {"a": 1, "b": 2}}
        refuse_contradiction(tmp_path, there, {})
        refuse_contradiction(tmp_path, there, {"probe": {"b": 2}})
        with pytest.raises(StabilityProbeError, match="b = 2, and b = 1 was asked for"):
            refuse_contradiction(tmp_path, there, {"steps": 9, "probe": {"b": 1}})


class TestState:
    def test_comes_back(self, run):
        assert load_state(run) is None
        for n in (3, 4):
            save_state(run, {**STATE, "training": {"w": torch.full((2,), n), "n": n}})
            state = load_state(run)
            assert (state["training"]["n"], state["probe"]) == (n, STATE["probe"])
            assert torch.equal(state["training"]["w"], torch.full((2,), n))
        assert [p.name for p in run.path.glob("*.p*t*")] == [STATE_FILE]

    def test_runs_no_code(self, run):
        save_state(run, STATE)
        torch.save({**torch.load(run.path / STATE_FILE), "training": Run(".")},
                   run.path / STATE_FILE)  # fmt: skip
        with pytest.raises(StabilityProbeError, match=r"training-state.pt: damaged"):
            load_state(run)

    @pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "other", "folder"])
    def test_that_is_damaged_is_named(self, run, damage):
        save_state(run, STATE)
        file = run.path / STATE_FILE
        data = file.read_bytes()
        if damage == "folder":
            file.unlink()
            file.mkdir()
        elif damage == "other":
            torch.save({"w": torch.ones(1)}, file)
        else:
            torn = {"empty": b"", "truncated": data[: len(data) // 2], "garbage": b"PK\x03\x04no"}
            file.write_bytes(torn[damage])
        with pytest.raises(
            StabilityProbeError, match=r"training-state.pt: damaged \(.+\); remove i"
        ):
            load_state(run)

    def test_of_another_run_is_refused(self, run):
        save_state(Run(run.path, {**CONFIG, "seed": 4}), STATE)
        with pytest.raises(StabilityProbeError, match="is of another configuration than the run"):
            load_state(run)

    def test_that_cannot_be_written_leaves_the_last_one(self, run, monkeypatch):
        save_state(run, STATE)

        def fail(state, file):
            file.write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed\nwriting file")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(
            StabilityProbeError,
            match=r"training-state.pt: the training state cannot be written \(Pyt.+ed writing file",
        ):
            save_state(run, {**STATE, "training": {}})
        assert load_state(run)["training"]["n"] == 3
        assert not list(run.path.glob("*.partial"))

    @pytest.mark.parametrize(
        ("state", "reason", "kept"),
        [
            ("running", None, True),
            ("failed", "KeyboardInterrupt: ", True),
            ("failed", "records of steps 1–2 could not be stored", True),
            ("failed", "TrainingDiverged: the loss", False),
            ("complete", None, False),
        ],
    )
    def test_is_removed_with_what_is_unfinished_once_nothing_can_follow(
        self, run, state, reason, kept
    ):
        save_state(run, STATE)
        (run.path / f"{STATE_FILE}.partial").touch()
        run.end(state, reason, {})
        discard_state(run)
        assert (load_state(run) is not None) == kept
        assert (run.path / f"{STATE_FILE}.partial").exists() == kept
        discard_state(run)

    def test_that_cannot_be_removed_is_named(self, run):
        (run.path / STATE_FILE).mkdir()
        run.end("complete", None, {})
        with pytest.raises(StabilityProbeError, match=r"training-state.pt: cannot be removed \("):
            discard_state(run)


class TestFiles:
    def test_appear_when_they_are_complete(self, tmp_path):
        file = tmp_path / "a" / "b.pth"

        def write(partial):
            assert partial.parent == file.parent and not file.exists()
            partial.write_text("all of it")

        write_whole(file, write, "it cannot be written")
        assert file.read_text() == "all of it"
        assert os.listdir(file.parent) == ["b.pth"]

    @pytest.mark.parametrize("check", [
        lambda file: refuse_unwritable(file, "it cannot be written"),
        lambda file: write_whole(file, lambda p: p.touch(), "it cannot be written"),
    ], ids=["refuse_unwritable", "write_whole"])  # fmt: skip
    @pytest.mark.parametrize("place", ["file/w.pth", "folder", f"{'a' * 255}", "taken"])
    def test_that_cannot_be_written_are_named(self, tmp_path, check, place):
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "taken.partial").mkdir()
        with pytest.raises(StabilityProbeError, match=r": it cannot be written \(.+\)$") as error:
            check(tmp_path / place)
        assert str(error.value).startswith(str(tmp_path / place))
        assert sorted(os.listdir(tmp_path)) == ["file", "folder", "taken.partial"]

    def test_that_can_be_written_are_left_alone(self, tmp_path):
        (tmp_path / "old.pth").write_text("weights")
        refuse_unwritable(tmp_path / "old.pth", "")
        refuse_unwritable(tmp_path / "new.pth", "")
        assert os.listdir(tmp_path) == ["old.pth"]
        assert (tmp_path / "old.pth").read_text() == "weights"


class TestSettings:
    @pytest.mark.parametrize("probing", [
        RecordConfig(),
        RecordConfig(every=3, save_every=0, probe=ProbeConfig(
            updates=True, sensitivity=SensitivityConfig(epsilons=(0.5, 0.1), paths=True)
        )),
    ], ids=["plain", "nested"])  # fmt: skip
    def test_come_back_from_json(self, tmp_path, probing):
        run = Run(tmp_path / "run", CONFIG, {"probing": probing.as_dict()})
        run.begin({})
        there = Run.open(run.path)
        assert settings_from(RecordConfig, there.info["probing"], there) == probing
        assert settings_from(TrainConfig, there.config, there) == TrainConfig(**CONFIG)

    @pytest.mark.parametrize("values", [
        {}, None, 3, "every", [], {**RecordConfig().as_dict(), "more": 1},
        {**RecordConfig().as_dict(), "probe": {"updates": True}},
    ], ids=repr)  # fmt: skip
    def test_that_are_none_are_refused(self, run, values):
        with pytest.raises(
            StabilityProbeError,
            match=r"run.json has no settings of a training by this version \(.+",
        ):
            settings_from(RecordConfig, values, run)

    def test_that_are_out_of_range_are_refused(self, run):
        with pytest.raises(StabilityProbeError, match="save_every must be at least 0, got -1"):
            settings_from(RecordConfig, {**RecordConfig().as_dict(), "save_every": -1}, run)

    def test_may_be_of_any_dataclass(self, run):
        @dataclass(frozen=True)
        class Inner:
            sizes: tuple

        @dataclass(frozen=True)
        class Outer:
            inner: Inner

        made = settings_from(Outer, {"inner": {"sizes": [1, 2]}}, run)
        assert made == Outer(Inner((1, 2)))
