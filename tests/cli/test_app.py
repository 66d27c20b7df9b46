import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from stability_probe import Run
from stability_probe.runs import data
from tests.oracles.evidence import (
    altered,
    complete,
    ensemble,
    gradients,
    stored,
    trace,
    training,
)

PUBLIC = {
    "theorem", "claim", "status", "measured", "bound", "slack", "interval", "n", "advice",
    "confidence",
}  # fmt: skip
TINY = (
    "--steps", 2, "--sensitivity-every", 0, "--width", 16, "--n-skips", 2, "--batch-size", 4,
)  # fmt: skip
SCHEMES = (
    "unscaled", "inverse-sqrt2", "uniform:0.5", "uniform:0", "cs:0.7", "ls", "ls-non-shared",
    "sc-tuner",
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A recorded run, in a folder of its own."""
    return stored(complete(), tmp_path / "recorded" / "cs").path


def train(scheme, out, *options):
    return ("train", "--scheme", scheme, "--out", out, *TINY, *options)


class TestTrain:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_every_scheme(self, cli, tmp_path, scheme):
        result = cli(*train(scheme, tmp_path / "run"))
        assert (result.code, result.complaints) == (0, [])
        assert f"run: {tmp_path / 'run'}" in result.out and "probe overhead:" in result.out
        assert "2/2" in result.err
        run = Run.open(tmp_path / "run")
        assert run.info["state"] == "complete"
        assert (run.info["scheme"], run.info["seed"]) == (scheme, 0)
        frame = run.records()
        assert set(frame.step) == {1, 2}
        assert {"energy", "kappa", "loss", "grad_energy"} <= set(frame.metric)

    @pytest.mark.parametrize(("model", "skips"), [("unet2d", 4), ("theory-unet", 2)])
    def test_other_models(self, cli, tmp_path, model, skips):
        result = cli(*train("cs:0.7", tmp_path / "run", "--model", model, "--n-skips", skips))
        assert result.code == 0
        assert len(Run.open(tmp_path / "run").info["skips"]) == skips

    def test_a_filter_needs_feature_maps(self, cli, refused, tmp_path):
        maps = ("--model", "unet2d", "--n-skips", 4)
        assert cli(*train("freeu", tmp_path / "run", *maps)).code == 0
        line = refused(*train("freeu", tmp_path / "other"))
        assert "needs feature maps with two spatial dimensions" in line

    def test_settings_reach_the_run(self, cli, tmp_path):
        options = ("--seed", 5, "--data", "uniform", "--learning-rate", 1e-4, "--steps", 4,
                   "--every", 2)  # fmt: skip
        assert cli(*train("unscaled", tmp_path / "run", *options)).code == 0
        run = Run.open(tmp_path / "run")
        wanted = {"seed": 5, "data": "uniform", "learning_rate": 1e-4, "steps": 4, "width": 16,
                  "n_skips": 2, "batch_size": 4, "scheme": "unscaled"}  # fmt: skip
        assert {name: run.info["config"][name] for name in wanted} == wanted
        assert set(run.records().step) == {1, 2, 4}

    def test_scheduled_measurements(self, cli, tmp_path):
        assert cli(*train("cs:0.7", tmp_path / "run", "--sensitivity-every", 2)).code == 0
        taken = Run.open(tmp_path / "run").records().query("metric == 'sigma_max'")
        assert set(taken.step) == {1, 2}

    def test_a_seed_gives_the_same_records_twice(self, cli, tmp_path):
        frames = []
        for name in ("a", "b"):
            cli(*train("ls", tmp_path / name, "--seed", 3))
            frames.append(Run.open(tmp_path / name).records())
        assert frames[0].equals(frames[1])

    def test_a_training_that_diverges(self, cli, tmp_path):
        result = cli(*train("cs:0.7", tmp_path / "run", "--steps", 50, "--learning-rate", 1e9))
        assert result.code == 1
        (line,) = result.complaints
        assert line.startswith("error: the loss was not finite at step ")
        assert "what was recorded until then is kept" in line
        run = Run.open(tmp_path / "run")
        assert run.info["state"] == "failed"
        assert "TrainingDiverged" in run.info["reason"]
        assert len(run.records().query("metric == 'loss'"))

    @pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
    @pytest.mark.parametrize("command", ["verify", "plot"])
    def test_a_run_that_diverged_is_still_evidence(self, cli, tmp_path, command):
        cli(*train("cs:0.7", tmp_path / "run", "--steps", 50, "--learning-rate", 1e9))
        assert cli(command, tmp_path / "run").code == 0

    def test_an_empty_data_set(self, refused, tmp_path, monkeypatch):
        monkeypatch.setitem(data.DATASETS, "digits", lambda: torch.empty(0, 1, 8, 8))
        assert "empty" in refused(*train("cs:0.7", tmp_path / "run"))

    def test_a_folder_with_a_run_in_it(self, refused, run, contents):
        before = contents(run)
        assert "holds a run already" in refused(*train("cs:0.7", run))
        assert contents(run) == before


class TestVerify:
    def test_a_table_of_every_claim(self, cli, run):
        result = cli("verify", run)
        assert (result.code, result.err) == (0, "")
        for claim in ("Theorem 3.1: ", "Lemma 3.2: ", "Theorem 3.3: ", "Theorem 3.4: "):
            assert claim in result.out
        assert result.out.count("HOLDS") == 5

    def test_json(self, cli, run):
        result = cli("verify", run, "--json")
        rows = json.loads(result.out)
        assert [row["theorem"] for row in rows] == ["3.1", "3.2", "3.3", "3.3", "3.4"]
        for row in rows:
            assert set(row) == PUBLIC | {"run", "statistic", "estimate"}
        assert rows[-1]["interval"][0] == pytest.approx(0.025 ** (1 / 8))

    def test_json_has_null_for_what_is_not_finite(self, cli, tmp_path):
        for k in range(5):
            broken = altered(trace(scheme=str(k)), "energy", "h", float("nan"), step=90)
            stored(broken, tmp_path / str(k))
        result = cli("verify", tmp_path, "--json")
        rows = json.loads(result.out, parse_constant=pytest.fail)
        (oscillation,) = (row for row in rows if "over training" in row["claim"])
        assert oscillation["n"] == 5 and oscillation["measured"] is None  # infinite ranges

    def test_verdicts_are_stored_with_one_run(self, cli, run, contents):
        before = contents(run)
        printed = json.loads(cli("verify", run, "--json").out)
        assert json.loads((run / "verdicts.json").read_text()) == printed
        after = contents(run)
        del after["verdicts.json"]
        assert after == before  # and nothing else is touched

    def test_several_runs_are_compared_and_stored_where_it_is_said(self, cli, tmp_path):
        runs = [
            stored(trace((k,) * 3, scheme=f"uniform:{k}"), tmp_path / "runs" / str(k)).path
            for k in (0.5, 1.0)
        ]
        result = cli("verify", *runs, "--out", tmp_path / "new" / "v.json")
        assert result.code == 0 and "range of ‖h_i‖² over training" in result.out
        assert len(json.loads((tmp_path / "new" / "v.json").read_text())) == 2 * 4 + 2
        assert not any((run / "verdicts.json").exists() for run in runs)

    def test_a_folder_of_runs_stands_for_them(self, cli, tmp_path):
        stored(trace(), tmp_path / "all" / "deep" / "a")
        stored(ensemble(), tmp_path / "all" / "b")
        rows = json.loads(cli("verify", tmp_path / "all", "--json").out)
        assert len(rows) == 1 + 5
        assert (tmp_path / "all" / "verdicts.json").exists()

    @pytest.mark.parametrize(("power", "options", "code"), [
        (2.0, ["--strict"], 1), (2.0, [], 0), (0.9, ["--strict"], 0),
    ])  # fmt: skip
    def test_strict(self, cli, tmp_path, power, options, code):
        run = stored(gradients(power=power), tmp_path / "run").path
        result = cli("verify", run, *options)
        assert (result.code, result.err) == (code, "")
        assert ("VIOLATED" in result.out) == (power == 2.0)
        assert (run / "verdicts.json").exists()

    def test_runs_of_one_scheme_and_seed(self, cli, tmp_path):
        runs = [stored(trace(steps=steps), tmp_path / f"{steps}").path for steps in (20, 40)]
        assert cli("verify", *runs).code == 0

    def test_a_run_that_has_just_begun(self, cli, tmp_path):
        run = stored(training(input=complete().info["input"]), tmp_path / "run").path
        result = cli("verify", run)
        assert result.code == 0 and "INCONCLUSIVE" in result.out


class TestPlot:
    def test_one_run_is_drawn_into_its_folder(self, cli, run, contents):
        before = contents(run)
        result = cli("plot", run)
        assert (result.code, result.err) == (0, "")
        files = sorted((run / "figures").glob("*"))
        assert [file.name for file in files] == [
            "coefficients.png", "features.png", "gradients.png", "loss.png", "oscillation.png",
            "sensitivity.png",
        ]  # fmt: skip
        assert sorted(result.out.split()) == [str(file) for file in files]
        assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)
        after = contents(run)
        assert {name: after[name] for name in before} == before

    def test_several_runs_need_a_folder(self, cli, refused, tmp_path):
        runs = [stored(trace(scheme=s), tmp_path / s).path for s in ("a", "b")]
        assert "say where to draw with --out" in refused("plot", *runs)
        assert not list(tmp_path.rglob("*.png"))
        assert cli("plot", *runs, "--out", tmp_path / "new" / "figures").code == 0
        assert (tmp_path / "new" / "figures" / "features.png").exists()

    def test_nothing_to_draw(self, refused, tmp_path):
        run = stored(training(), tmp_path / "run").path
        assert "the runs hold no records to draw" in refused("plot", run)


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


HELP = """
import io, sys
from contextlib import redirect_stdout
from stability_probe.cli import main
for command in ((), ("demo",), ("train",), ("verify",), ("plot",)):
    sys.argv = ["stability-probe", *command, "--help"]
    try:
        with redirect_stdout(io.StringIO()) as out:
            main()
    except SystemExit as ended:
        assert not ended.code, command
    assert "Usage" in out.getvalue(), command
    assert all("--" + option in out.getvalue() for option in ("help",)), command
heavy = {"torch", "diffusers", "scipy", "pandas", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_of_every_command_is_quick():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_as_a_module():
    command = [sys.executable, "-m", "stability_probe", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: No such command 'nonsense'")
    assert done.stderr.count("\n") == 1
