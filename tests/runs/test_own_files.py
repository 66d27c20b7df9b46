"""What a run has in its folder is not written over."""

from pathlib import Path

import pytest

from stability_probe import StabilityProbeError
from stability_probe.runs.own_files import VERDICTS, refuse_run_file

OWN = [
    "run.json", "outcome.json", "weights.pth", "training-state.pt", "attempts", "lock",
    "verdicts.json", "records/part-000001.parquet", "records/new/r.html", "figures/r.html",
    "tensorboard/r.html", "wandb/run/r.html",
]  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_a_run_is_refused_whether_it_is_there_or_not(run, name):
    with pytest.raises(StabilityProbeError, match="the report would be among a run's own files"):
        refuse_run_file(run.path / name, "the report")


def test_by_whatever_way_it_is_reached(run, monkeypatch):
    monkeypatch.chdir(run.path / "records")
    link = run.path.parent / "link.html"
    link.symlink_to(run.path / "outcome.json")
    for file in (Path("r.html"), Path("../outcome.json"), link):
        with pytest.raises(StabilityProbeError, match="own files"):
            refuse_run_file(file, "the report")


@pytest.mark.parametrize("name", ["report.html", "mine/lock", "../outcome.json", "../lock"])
def test_other_files_may_lie_there(run, name):
    refuse_run_file(run.path / name, "the report")


def test_verdicts_may_replace_verdicts(run):
    refuse_run_file(run.path / VERDICTS, "verdicts", may_be=VERDICTS)
    for name in ("run.json", "outcome.json", f"records/{VERDICTS}"):
        with pytest.raises(StabilityProbeError, match="own files"):
            refuse_run_file(run.path / name, "verdicts", may_be=VERDICTS)


def test_a_run_json_anywhere_would_make_a_run_of_the_folder(tmp_path):
    with pytest.raises(StabilityProbeError, match="own files"):
        refuse_run_file(tmp_path / "run.json", "the report")
