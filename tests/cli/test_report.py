"""`stability-probe report`, from run folders to a file."""

import pytest

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


@pytest.mark.parametrize("name", ["run.json", "outcome.json", "records/part-000001.parquet"])
def test_a_file_of_a_run_is_not_replaced(refused, run, contents, name):
    before = contents(run.path)
    assert "among a run's own files" in refused("report", run.path, "-o", run.path / name)
    assert contents(run.path) == before


def test_a_damaged_run_is_one_line(refused, tmp_path):
    run = stored(complete(), tmp_path / "run")
    next((run.path / "records").iterdir()).write_text("no parquet")
    assert "damaged" in refused("report", run.path, "-o", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(("field", "value", "said"), [
    ("probe", 3, "`probe`: an object is needed, got 3"),
    ("probe", {"overhead": "x"}, '`probe.overhead`: a number is needed, got "x"'),
    ("skips", [1], "`skips[0]`: an object is needed, got 1"),
    ("skips", {}, "`skips`: a list is needed, got {}"),
    ("config", [1], "`config`: an object is needed, got [1]"),
    ("versions", 3, "`versions`: an object is needed, got 3"),
    ("seed", {}, "`seed`: a number or a text is needed, got {}"),
    ("probing", "x", '`probing`: an object is needed, got "x"'),
])  # fmt: skip
def test_a_field_of_another_type_is_one_line(refused, run, tmp_path, field, value, said):
    run.update({field: value})
    line = refused("report", run.path, "-o", tmp_path / "r.html")
    assert line == f"{run.path / 'run.json'}: {said}"
    assert not (tmp_path / "r.html").exists()
