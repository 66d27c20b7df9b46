import json
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
