"""Bad input ends in one line and exit code 2, and nothing already recorded is lost."""

import json
import os
import shutil

import pytest

from tests.cli.test_app import train
from tests.oracles.evidence import complete, stored


@pytest.fixture
def run(tmp_path):
    """A recorded run, in a folder of its own."""
    return stored(complete(), tmp_path / "recorded" / "cs").path


class TestBadInput:
    @pytest.mark.parametrize(
        ("scheme", "message"),
        [
            ("nonsense", "unknown scheme 'nonsense'; choose from unscaled"),
            ("", "unknown scheme ''"),
            ("unscaled:1", "unknown scheme 'unscaled:1'"),
            ("uniform:-1", "κ must be a finite number ≥ 0, got -1"),
            ("uniform:nan", "κ must be a finite number ≥ 0, got nan"),
            ("uniform:inf", "κ must be a finite number ≥ 0, got inf"),
            ("uniform", "a number must follow 'uniform'"),
            ("cs:0", r"κ must lie in (0, 1], got 0"),
            ("cs:1.5", r"κ must lie in (0, 1], got 1.5"),
            ("cs:nan", r"κ must lie in (0, 1], got nan"),
            ("cs:x", "a number must follow 'cs', as in cs:0.7"),
        ],
    )
    def test_schemes(self, refused, tmp_path, scheme, message):
        assert message in refused(*train(scheme, tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--n-skips", 0), "n_skips must be at least 1, got 0"),
            (("--n-skips", -2), "n_skips must be at least 1, got -2"),
            (("--steps", 0), "steps must be at least 1, got 0"),
            (("--width", 0), "width must be at least 1, got 0"),
            (("--width", 6), "embed_dim must be a multiple of num_heads, got 6 and 4"),
            (("--batch-size", 0), "batch_size must be at least 1, got 0"),
            (("--probe-samples", 0), "probe_samples must be at least 1, got 0"),
            (("--every", 0), "every must be at least 1"),
            (("--sensitivity-every", -1), "sensitivity_every at least 0"),
            (("--learning-rate", 0), "learning_rate must be positive, got 0"),
            (("--learning-rate", "nan"), "learning_rate must be positive, got nan"),
            (("--data", "cats"), "unknown data 'cats'; choose from digits"),
            (("--model", "vgg"), "unknown model 'vgg'; choose from uvit"),
            (("--model", "unet2d", "--n-skips", 5), "n_skips of a unet2d must be 4, 6, 8"),
            (("--steps", "many"), "Invalid value for '--steps'"),
            (("--nonsense", 1), "No such option: --nonsense"),
        ],
    )
    def test_settings_of_a_training(self, refused, tmp_path, options, message):
        assert message in refused(*train("cs:0.7", tmp_path / "run", *options))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((), "Missing command"),
            (("nonsense",), "No such command 'nonsense'"),
            (("train",), "Missing option '--out'"),
            (("train", "--scheme", "cs:0.7"), "Missing option '--out'"),
            (("demo",), "Missing option '--out'"),
            (("verify",), "Missing argument"),
            (("plot",), "Missing argument"),
            (("verify", "--nonsense"), "No such option: --nonsense"),
            (("verify", "/no/such/folder"), "neither a run folder (no run.json) nor a folder with"),
            (("plot", "/no/such/folder"), "neither a run folder (no run.json) nor a folder with"),
        ],
    )
    def test_commands(self, refused, args, message):
        assert message in refused(*args)

    @pytest.mark.parametrize(
        ("args", "command"),
        [
            (("nonsense",), "stability-probe"),
            (("verify",), "stability-probe verify"),
            (("train", "--nonsense"), "stability-probe train"),
        ],
    )
    def test_where_help_is(self, refused, args, command):
        assert refused(*args).endswith(f" See `{command} --help`.")

    @pytest.mark.parametrize("command", ["verify", "plot"])
    def test_a_folder_that_is_no_run(self, refused, tmp_path, command):
        (tmp_path / "records").mkdir()
        assert "neither a run folder" in refused(command, tmp_path)
        assert os.listdir(tmp_path) == ["records"]

    @pytest.mark.parametrize("command", ["train", "verify", "plot", "demo"])
    def test_a_place_below_a_file(self, refused, tmp_path, run, contents, command):
        before = contents(run)
        place = run / "run.json" / "below"
        args = {
            "train": train("cs:0.7", place),
            "verify": ("verify", run, "--out", place),
            "plot": ("plot", run, "--out", place),
            "demo": ("demo", "--out", place),
        }[command]
        assert "cannot be written" in refused(*args)
        assert contents(run) == before

    @pytest.mark.parametrize("command", ["train", "plot", "demo"])
    def test_a_file_in_the_place_of_a_folder(self, refused, tmp_path, run, contents, command):
        before = contents(run)
        place = run / "run.json"
        args = {
            "train": train("cs:0.7", place),
            "plot": ("plot", run, "--out", place),
            "demo": ("demo", "--out", place),
        }[command]
        assert "cannot be written" in refused(*args)
        assert contents(run) == before

    @pytest.mark.parametrize("command", ["verify", "plot"])
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read as JSON"),
            ("", "cannot be read as JSON"),
            ("[1]", "a JSON object is needed, got list"),
            ("{}", "run.json has schema None and this version reads 1"),
            ('{"schema": 99}', "run.json has schema 99 and this version reads 1"),
            ("\udcff", "cannot be read as JSON"),
        ],
    )
    def test_a_damaged_run_json(self, refused, run, contents, command, text, message):
        (run / "run.json").write_bytes(text.encode(errors="surrogateescape"))
        before = contents(run)
        assert message in refused(command, run)
        assert contents(run) == before

    @pytest.mark.parametrize("command", ["verify", "plot"])
    @pytest.mark.parametrize("kept", [0, 100, -8])
    def test_a_truncated_part(self, refused, run, contents, command, kept):
        (part,) = (run / "records").glob("*.parquet")
        whole = part.read_bytes()
        part.write_bytes(whole[:kept])
        before = contents(run)
        line = refused(command, run)
        assert f"{part}: damaged" in line and "move it away to read the rest" in line
        assert contents(run) == before

    def test_one_damaged_run_among_several(self, refused, run, contents):
        shutil.copytree(run, run.parent / "other")
        (run / "run.json").write_text("{")
        before = contents(run.parent)
        assert str(run / "run.json") in refused("verify", run.parent)
        assert contents(run.parent) == before

    def test_a_name_too_long_for_the_file_system(self, refused, tmp_path):
        refused(*train("cs:0.7", tmp_path / ("a" * 300)))

    def test_a_seed_too_large_for_torch(self, refused, tmp_path):
        refused(*train("cs:0.7", tmp_path / "run", "--seed", 10**25))

    @pytest.mark.parametrize("wrong", [{"kappa": [1.0]}, {"kappa": "abc"}, {"input": {"m": 64}}])
    def test_a_run_json_whose_values_do_not_fit(self, refused, run, wrong):
        info = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**info, **wrong}))
        refused("verify", run)

    def test_a_folder_in_the_place_of_a_file(self, refused, run, contents):
        before = contents(run.parent)
        refused("verify", run, "--out", run / "records")
        assert contents(run.parent) == before

    def test_verdicts_do_not_replace_a_runs_own_files(self, refused, run, contents):
        before = contents(run)
        refused("verify", run, "--out", run / "run.json")
        assert contents(run) == before
