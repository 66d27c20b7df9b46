"""`stability-probe report`, from run folders to a file."""

import pytest

from stability_probe import StabilityProbeError
from stability_probe.cli.report import refuse_run_file
from tests.oracles.evidence import complete, ensemble, stored
from tests.oracles.pages import Parsed


@pytest.fixture
def run(tmp_path):
    """A run without much to draw, in a folder of its own."""
    return stored(ensemble(20), tmp_path / "runs" / "random")


def test_a_folder_of_runs_and_the_file_by_default(cli, run, tmp_path, monkeypatch, contents):
    before = contents(run.path)
    monkeypatch.chdir(tmp_path)
    result = cli("report", tmp_path / "runs")
    assert (result.code, result.out, result.complaints) == (0, "report: report.html\n", [])
    page = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "One run was held against the theorems" in page.text and len(page.of("img")) == 1
    assert contents(run.path) == before  # runs are only read


def test_an_earlier_report_is_replaced(cli, run, tmp_path):
    (tmp_path / "r.html").write_text("earlier")
    assert cli("report", run.path, "-o", tmp_path / "r.html").code == 0
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_no_run(refused, tmp_path):
    assert "Missing argument" in refused("report")
    assert "neither a run folder" in refused("report", tmp_path, "-o", tmp_path / "r.html")
    assert "neither a run folder" in refused("report", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(refused, run, tmp_path):
    assert "it is a folder" in refused("report", run.path, "-o", tmp_path / "runs")
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in refused("report", run.path, "-o", tmp_path / "file" / "r.html")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["run.json", "verdicts.json", "training-state.pt", "records/part-000001.parquet"]
)
def test_a_file_of_a_run_is_not_replaced(refused, run, contents, name):
    before = contents(run.path)
    assert "among a run's own files" in refused("report", run.path, "-o", run.path / name)
    assert contents(run.path) == before


def test_a_report_may_lie_beside_the_records(run, tmp_path):
    refuse_run_file(run.path / "report.html", [run])
    with pytest.raises(StabilityProbeError, match="among a run's own files"):
        refuse_run_file(tmp_path / "elsewhere" / "run.json", [run])


def test_a_damaged_run_is_one_line(refused, tmp_path):
    run = stored(complete(), tmp_path / "run")
    next((run.path / "records").iterdir()).write_text("no parquet")
    assert "damaged" in refused("report", run.path, "-o", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
