"""`sweep` on the command line."""

import json
from importlib import import_module

import pandas as pd
import pytest

from stability_probe.runs.training import Training
from stability_probe.runs.workers import hire
from tests.oracles.workers import hire_nobody

TEXT = """
base: {model: theory-unet, steps: 3, n_skips: 2, batch_size: 4, data: uniform}
grid: {scheme: [unscaled, cs], kappa: [0.5], learning_rate: [1e-3, 1e30]}
probing: {sensitivity_every: 0}
"""
FAILED = ["scheme=unscaled,learning_rate=1e+30", "scheme=cs-0.5,learning_rate=1e+30"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Runs are done in this process."""
    monkeypatch.setattr(import_module("stability_probe.runs.sweep"), "hire", hire_nobody)


@pytest.fixture
def grid(tmp_path):
    """A grid of four runs, two of which diverge."""
    file = tmp_path / "grid.yaml"
    file.write_text(TEXT)
    return file


@pytest.fixture
def calm(tmp_path):
    """A grid of two runs that do not diverge."""
    file = tmp_path / "calm.yaml"
    file.write_text(TEXT.replace(", 1e30", ""))
    return file


class TestSweep:
    def test_lists_what_failed_and_says_where_results_are(self, cli, grid, tmp_path):
        out = tmp_path / "sweep"
        for progress in ("4/4", ""):
            result = cli("sweep", grid, "--out", out)
            assert (result.code, result.complaints) == (1, [])
            assert progress in result.err
            header, *failures, counts, hint, results, runs = result.out.splitlines()
            assert header.split() == ["run", "state", "reason"]
            assert [line.split()[:2] for line in failures] == [[n, "failed"] for n in FAILED]
            assert all("TrainingDiverged: the loss was not finite" in line for line in failures)
            assert counts == "4 runs: 2 complete, 2 failed" and "--retry" in hint
            assert (results, runs) == (f"results: {out}/results.csv", f"runs: {out}/runs")
        table = pd.read_csv(out / "results.csv")
        assert {"scheme", "kappa", "learning_rate", "state", "reason", "seconds", "final_loss",
                "oscillation.h_0", "oscillation.h_1", "gradient.mid", "gain.skip_1",
                "probe_overhead"} <= set(table)  # fmt: skip
        numbers = (
            table[table.state == "complete"]
            .select_dtypes("number")
            .drop(columns=["kappa", "warnings"])
        )
        assert numbers.notna().all(axis=None) and table.final_loss.notna().sum() == 2

    def test_is_done_when_all_is(self, cli, calm, tmp_path):
        result = cli("sweep", calm, "--out", tmp_path / "sweep")
        assert (result.code, result.complaints) == (0, [])
        assert result.out.splitlines()[0] == "2 runs: 2 complete"
        assert "2/2" in result.err

    def test_prints_json(self, cli, grid, tmp_path):
        result = cli("sweep", grid, "--out", tmp_path / "sweep", "--json")
        assert result.code == 1
        said = json.loads(result.out)
        assert (said["complete"], said["failed"], said["open"]) == (2, 2, 0)
        assert said["results"] == f"{tmp_path}/sweep/results.csv"
        first, second, *_ = said["runs"]
        assert (first["scheme"], first["kappa"], first["learning_rate"]) == ("unscaled", None, 1e-3)
        assert first["final_loss"] > 0 and second["final_loss"] is None

    def test_can_be_looked_at_first(self, cli, grid, tmp_path):
        result = cli("sweep", grid, "--out", tmp_path / "sweep", "--dry-run")
        assert result.code == 0 and not (tmp_path / "sweep").exists()
        lines = result.out.splitlines()
        assert len(lines) == 6 and lines[-1] == "4 runs: 4 open"
        assert all(line.split()[1] == "open" for line in lines[1:-1])
        cli("sweep", grid, "--out", tmp_path / "sweep")
        result = cli("sweep", grid, "--out", tmp_path / "sweep", "--dry-run", "--json")
        assert result.code == 0 and json.loads(result.out)["failed"] == 2

    def test_that_is_interrupted_says_how_to_go_on(self, cli, calm, tmp_path, monkeypatch):
        step = Training.__next__

        def until(taken):
            if taken.config.scheme == "cs:0.5":
                raise KeyboardInterrupt
            return step(taken)

        with monkeypatch.context() as patch:
            patch.setattr(Training, "__next__", until)
            result = cli("sweep", calm, "--out", tmp_path / "sweep")
        assert result.code == 130
        assert result.complaints == [
            "note: 1 of 2 runs are complete; the same command goes on with the others",
            "error: interrupted; what was recorded is kept",
        ]
        assert pd.read_csv(tmp_path / "sweep/results.csv").state.tolist() == ["complete", "open"]
        assert cli("sweep", calm, "--out", tmp_path / "sweep").code == 0


class TestRefused:
    def test_grids(self, refused, grid, tmp_path):
        grid.write_text("grid: {sed: [1]}")
        line = refused("sweep", grid, "--out", tmp_path / "sweep")
        assert line.startswith(f"{grid}: sed: is unknown; choose from scheme, steps, seed")
        assert "cannot be read" in refused("sweep", tmp_path / "none", "--out", tmp_path / "sweep")

    def test_another_grid_for_the_folder(self, cli, refused, calm, tmp_path):
        cli("sweep", calm, "--out", tmp_path / "sweep")
        calm.write_text(calm.read_text().replace("steps: 3", "steps: 4"))
        line = refused("sweep", calm, "--out", tmp_path / "sweep")
        assert "holds a run with steps = 3, and steps = 4 was asked for" in line

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--jobs", 0), "jobs must be at least 1, got 0"),
            (("--threads", -1), "threads must be at least 1, got -1"),
            (("--backend", "slurm"), "unknown backend 'slurm'; choose from local, ray, dask"),
            (("--address", "auto"), "the address auto is of no use to local processes; choose"),
        ],
    )
    def test_workers(self, refused, calm, tmp_path, options, message):
        line = refused("sweep", calm, "--out", tmp_path / "sweep", *options)
        assert message in line
        assert not (tmp_path / "sweep").exists()

    def test_a_cluster_that_is_not_there(self, refused, calm, tmp_path, monkeypatch):
        monkeypatch.setattr(import_module("stability_probe.runs.sweep"), "hire", hire)
        options = ("--backend", "ray", "--address", "127.0.0.1:9")
        line = refused("sweep", calm, "--out", tmp_path / "sweep", *options)
        assert line.startswith("sweep: no Ray cluster at 127.0.0.1:9 (")
