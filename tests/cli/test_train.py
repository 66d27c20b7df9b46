"""`train --resume`, and what else of `train` is about going on."""

import signal
import subprocess
import sys

import pytest
import torch

from stability_probe import Run
from stability_probe.runs import RecordConfig, TrainConfig, tracking
from stability_probe.runs import run as run_module
from stability_probe.runs.run import STATE_FILE
from stability_probe.runs.training import Training
from tests.oracles.curves import tensorboard_curves

TINY = (
    "--model", "theory-unet", "--steps", 6, "--sensitivity-every", 0, "--n-skips", 2,
    "--batch-size", 4, "--data", "uniform", "--save-every", 2,
)  # fmt: skip


def train(out, *options):
    return ("train", "--out", out, *options)


def new(out, *options):
    return train(out, "--scheme", "ls", *TINY, *options)


@pytest.fixture
def interrupted(cli, monkeypatch):
    """Run a command line that is interrupted after so many steps."""

    def call(after, *args):
        step = Training.__next__

        def until(taken):
            if taken.step == after:
                raise KeyboardInterrupt
            return step(taken)

        with monkeypatch.context() as patch:
            patch.setattr(Training, "__next__", until)
            result = cli(*args)
        assert result.code == 130
        *before, last = result.complaints
        assert last == "error: interrupted; what was recorded is kept"
        assert all("holds no training state; it starts again from" in line for line in before)

    return call


@pytest.fixture
def stopped(interrupted, tmp_path):
    """The folder of a run that was interrupted after five of six steps."""
    interrupted(5, *new(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(cli, tmp_path_factory):
    """The folder of a run that never stopped, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli(*new(folder / "run", "--weights", folder / "w.pth")).code == 0
    return folder / "run", torch.load(folder / "w.pth")


class TestGoingOn:
    def test_an_interrupted_run_is_kept(self, stopped):
        run = Run.open(stopped)
        assert run.info["state"] == "failed" and "KeyboardInterrupt" in run.info["reason"]
        assert set(run.records().step) == {1, 2, 3, 4, 5}

    def test_needs_nothing_but_the_folder(self, cli, whole, stopped):
        assert (stopped / STATE_FILE).exists()
        result = cli(*train(stopped, "--resume", "--weights", stopped.parent / "w.pth"))
        assert (result.code, result.complaints) == (0, [])
        assert "6/6" in result.err
        assert result.out.startswith(f"run: {stopped}\nresumed after step 4 of 6\nprobe overhead: ")
        run = Run.open(stopped)
        assert run.info["state"] == "complete"
        assert run.records().equals(Run.open(whole[0]).records())
        weights = torch.load(stopped.parent / "w.pth")
        assert all(torch.equal(weights[name], value) for name, value in whole[1].items())
        assert not (stopped / STATE_FILE).exists()

    def test_one_command_does_for_every_sitting(self, cli, interrupted, whole, tmp_path):
        command = new(tmp_path / "run", "--resume")
        for after in (1, 3, 5):
            interrupted(after, *command)
        assert cli(*command).code == 0
        run = Run.open(tmp_path / "run")
        assert run.info["resumed"] == [0, 2, 4]
        assert run.records().equals(Run.open(whole[0]).records())
        result = cli(*command)
        assert (result.code, result.err) == (0, "")
        assert result.out == f"run: {run.path}\nthe run was complete, and nothing was done\n"

    def test_a_complete_run_is_not_touched(self, cli, whole, contents):
        before = contents(whole[0])
        result = cli(*train(whole[0], "--resume"))
        assert (result.code, result.err) == (0, "")
        assert "the run was complete, and nothing was done" in result.out
        assert contents(whole[0]) == before

    def test_before_the_first_saving(self, cli, interrupted, whole, tmp_path):
        interrupted(1, *new(tmp_path / "run"))
        result = cli(*train(tmp_path / "run", "--resume"))
        assert result.code == 0 and "resumed after step 0 of 6" in result.out
        assert Run.open(tmp_path / "run").records().equals(Run.open(whole[0]).records())

    def test_options_that_say_the_same_are_taken(self, cli, stopped):
        given = ("--scheme", "ls", "--steps", 6, "--every", 1, "--save-every", 2)
        assert cli(*train(stopped, "--resume", *given)).code == 0

    @pytest.mark.slow
    def test_a_run_that_is_killed(self, cli, whole, tmp_path):
        """In a process of its own, at some moment after a state was saved."""
        command = [sys.executable, "-m", "stability_probe", *map(str, new(tmp_path / "run"))]
        command += ["--steps", "100000"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while not (tmp_path / "run" / STATE_FILE).exists():
                assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
        assert Run.open(tmp_path / "run").info["state"] == "running"
        saved = torch.load(tmp_path / "run" / STATE_FILE)["training"]["step"]
        assert saved % 2 == 0 and saved <= Run.open(tmp_path / "run").records().step.max()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--steps", 7), "steps = 6, and steps = 7 was asked for"),
            (("--scheme", "cs:0.7"), "scheme = ls, and scheme = cs:0.7 was asked for"),
            (("--seed", 1, "--scheme", "ls"), "seed = 0, and seed = 1 was asked for"),
            (("--model", "unet2d"), "model = theory-unet, and model = unet2d was asked for"),
            (("--every", 2), "every = 1, and every = 2 was asked for"),
            (("--save-every", 50), "save_every = 2, and save_every = 50 was asked for"),
            (("--sensitivity-every", 100), "sensitivity_every = 0, and sensitivity_every = 100"),
            (("--learning-rate", 0.5), "learning_rate = 0.001, and learning_rate = 0.5 was"),
        ],
        ids=str,
    )  # fmt: skip
    def test_options_that_contradict_the_run(self, refused, stopped, contents, options, message):
        before = contents(stopped)
        line = refused(*train(stopped, "--resume", *options))
        assert line.startswith(f"{stopped}: holds a run with {message}")
        assert line.endswith("leave it as it was to go on, or choose another folder")
        assert contents(stopped) == before

    def test_nothing_to_go_on_with(self, refused, tmp_path):
        line = refused(*train(tmp_path / "run", "--resume"))
        assert line == f"{tmp_path / 'run'}: holds no run to resume; start one with --scheme"
        assert not (tmp_path / "run").exists()

    def test_no_scheme(self, refused, tmp_path):
        line = refused(*train(tmp_path / "run"))
        assert line.startswith("train: a new run needs --scheme, got none")
        assert not (tmp_path / "run").exists()

    def test_a_run_without_resume(self, refused, stopped, contents):
        before = contents(stopped)
        assert "holds a run already" in refused(*new(stopped))
        assert contents(stopped) == before

    def test_a_run_that_diverged(self, cli, refused, tmp_path, contents):
        assert cli(*new(tmp_path / "run", "--steps", 50, "--learning-rate", 1e9)).code == 1
        before = contents(tmp_path / "run")
        line = refused(*train(tmp_path / "run", "--resume"))
        assert f"{tmp_path / 'run'}: diverged (the loss was not finite at step " in line
        assert "would do so again" in line
        assert contents(tmp_path / "run") == before

    def test_a_run_of_another_kind(self, refused, tmp_path):
        Run(tmp_path / "run", {"scheme": "ls"}).begin({"kind": "checkpoint"})
        line = refused(*train(tmp_path / "run", "--resume"))
        assert "its run.json has no settings of a training by this version" in line

    def test_a_damaged_run_json(self, refused, stopped):
        (stopped / "run.json").write_text("{")
        assert "run.json: cannot be read as JSON" in refused(*train(stopped, "--resume"))

    def test_a_damaged_state(self, cli, refused, stopped):
        (stopped / STATE_FILE).write_bytes(b"PK\x03\x04")
        line = refused(*train(stopped, "--resume"))
        assert f"{stopped / STATE_FILE}: damaged (" in line
        assert "remove it to start again from the first step" in line
        (stopped / STATE_FILE).unlink()
        assert cli(*train(stopped, "--resume")).code == 0

    def test_weights_of_a_run_that_is_complete(self, refused, whole, tmp_path, contents):
        before = contents(whole[0])
        line = refused(*train(whole[0], "--resume", "--weights", tmp_path / "w.pth"))
        assert line.startswith(f"{whole[0]}: is complete, and its weights were not kept; to have")
        assert not (tmp_path / "w.pth").exists() and contents(whole[0]) == before

    def test_a_run_without_a_training_state_says_that_it_starts_again(self, cli, stopped):
        (stopped / STATE_FILE).unlink()
        result = cli(*train(stopped, "--resume"))
        assert result.code == 0
        (line,) = result.complaints
        assert line == (
            f"warning: {stopped}: holds no training state; it starts again from the first step"
        )

    def test_weights_that_cannot_be_written(self, refused, tmp_path):
        """Before anything is trained."""
        (tmp_path / "file").touch()
        line = refused(*new(tmp_path / "run", "--weights", tmp_path / "file" / "w.pth"))
        assert line.startswith(f"{tmp_path / 'file' / 'w.pth'}: the weights cannot be written (")
        assert not (tmp_path / "run").exists()

    def test_a_tracker_that_is_not_known(self, refused, tmp_path):
        line = refused(*new(tmp_path / "run", "--track", "aim"))
        assert line == "unknown tracker 'aim'; choose from tensorboard, wandb"
        assert not (tmp_path / "run").exists()

    def test_a_tracker_that_is_not_installed(self, refused, tmp_path, monkeypatch):
        monkeypatch.setattr(tracking, "find_spec", lambda name: None)
        line = refused(*new(tmp_path / "run", "--track", "wandb"))
        assert line == (
            "tracker 'wandb' needs the package wandb, which is not installed; "
            "install stability_probe[wandb]"
        )
        assert not (tmp_path / "run").exists()

    def test_save_every(self, refused, tmp_path):
        line = refused(*new(tmp_path / "run", "--save-every", -1))
        assert "save_every must be at least 0, got -1" in line


def test_track(cli, refused, tmp_path):
    """Into the run folder, which is what it was to all commands."""
    result = cli(*new(tmp_path / "run", "--track", "tensorboard"))
    assert (result.code, result.complaints) == (0, [])
    assert result.out.endswith(f"curves: tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}\n")
    curves = tensorboard_curves(tmp_path / "run" / "tensorboard")
    assert list(curves["energy/h_0"]) == list(curves["learning_rate"]) == [1, 2, 3, 4, 5, 6]
    assert cli("verify", tmp_path).code == 0
    assert cli("check", tmp_path, "--require", "loss<1e9").code == 0
    assert "was complete" in cli(*train(tmp_path / "run", "--resume", "--track", "wandb")).out
    assert not (tmp_path / "run" / "wandb").exists()


def test_records_that_could_not_be_stored(cli, tmp_path, monkeypatch):
    """The run ends, says what is missing, and is completed later."""

    def full(self, part, frame):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write_part", full)
        result = cli(*new(tmp_path / "run"))
    assert result.code == 1
    assert f"run: {tmp_path / 'run'}" in result.out
    assert "not complete (records of steps " in result.complaints[-1]
    assert "`train --resume` may complete it" in result.complaints[-1]
    assert cli(*train(tmp_path / "run", "--resume")).code == 0
    assert set(Run.open(tmp_path / "run").records().step) == set(range(1, 7))


def test_a_folder_that_cannot_be_written_any_more(cli, tmp_path, monkeypatch):
    """The training ends all the same; the folder is as it was at the last moment."""
    step = Training.__next__

    def until(taken):
        if taken.step == 3:
            monkeypatch.setattr(run_module, "put_in_place", full)
        return step(taken)

    def full(partial, final):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Training, "__next__", until)
    result = cli(*new(tmp_path / "run"))
    assert result.code == 1
    assert result.complaints[-1].endswith(
        "not complete (its run.json could not be written); `train --resume` may complete it"
    )
    monkeypatch.undo()
    result = cli(*train(tmp_path / "run", "--resume"))
    assert result.code == 0 and "resumed after step 2 of 6" in result.out


def test_help_tells_the_defaults(cli):
    """Which are those of the settings themselves."""
    words = " ".join(cli("train", "--help").out.split())
    defaults = {**vars(TrainConfig()), **vars(RecordConfig())}
    for name in (
        "steps", "seed", "data", "model", "n_skips", "width", "batch_size", "learning_rate",
        "every", "sensitivity_every", "save_every",
    ):  # fmt: skip
        _, _, text = words.partition(f" --{name.replace('_', '-')} ")
        assert text.partition("[default: ")[2].startswith(f"{defaults[name]}]"), name
