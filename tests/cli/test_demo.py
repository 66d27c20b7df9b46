import json
from functools import partial

import pytest

from stability_probe.cli import demo
from stability_probe.runs import EnsembleConfig, RecordConfig, TrainConfig

OPTIONS = ("--steps", 6)


@pytest.fixture(scope="module")
def small():
    """The demo with small networks and small probe batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "EnsembleConfig", partial(EnsembleConfig, networks=3, m=8))
        patch.setattr(demo, "TrainConfig", partial(TrainConfig, n_skips=2, width=16, batch_size=8))
        patch.setattr(
            demo, "RecordConfig", partial(RecordConfig, probe_samples=6, sensitive_samples=1)
        )
        yield


@pytest.fixture(scope="module")
def finished(cli, small, tmp_path_factory):
    """A demo that has run, and its folder."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return cli("demo", "--out", folder, *OPTIONS), folder


def test_the_folder(finished):
    _, folder = finished
    assert {path.name for path in folder.iterdir()} == set(demo.PARTS)
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "features.png", "oscillation.png", "coefficients.png", "gradients.png",
        "sensitivity.png", "loss.png", "law.png",
    }  # fmt: skip
    names = {scheme.replace(":", "-") for scheme in demo.SCHEMES}
    assert {path.name for path in (folder / "runs").iterdir()} == {f"{n}-seed0" for n in names}
    assert {path.name for path in (folder / "ensemble").iterdir()} == names
    for file in folder.rglob("run.json"):
        assert json.loads(file.read_text())["state"] == "complete"


def test_the_table_has_all_theorems_and_every_scheme(finished):
    result, folder = finished
    assert result.code == 0
    for claim in ("Theorem 3.1: ", "Lemma 3.2: ", "Theorem 3.3: ", "Theorem 3.4: "):
        assert claim in result.out
    for scheme in demo.SCHEMES:
        assert sum(line.startswith(f"{scheme} ") for line in result.out.splitlines()) == 6
    for part in ("figures", "verdicts.json", "runs", "report.html"):
        assert str(folder / part) in result.out


def test_progress_goes_to_stderr_and_nothing_else_does(finished):
    result, _ = finished
    assert result.complaints == []
    assert "random networks" in result.err and "3/3" in result.err and "30/30" in result.err


def test_the_verdicts(finished):
    _, folder = finished
    rows = json.loads((folder / "verdicts.json").read_text())
    assert {row["theorem"] for row in rows} == {"3.1", "3.2", "3.3", "3.4"}
    assert len(rows) == 5 * (2 + 4) + 2
    assert {row["run"] for row in rows} == {*demo.SCHEMES, "5 runs"}


def test_an_earlier_demo_is_not_lost(finished, refused, contents):
    _, folder = finished
    before = contents(folder)
    line = refused("demo", "--out", folder, *OPTIONS)
    assert "holds an earlier demo" in line and "--overwrite" in line
    assert contents(folder) == before


@pytest.mark.parametrize("options", [("--steps", 0), ("--seeds", 0)])
def test_bad_settings_lose_nothing_either(finished, refused, contents, options):
    _, folder = finished
    before = contents(folder)
    refused("demo", "--out", folder, *OPTIONS, "--overwrite", *options)
    assert contents(folder) == before


@pytest.mark.parametrize("part", demo.PARTS)
def test_any_part_of_an_earlier_demo_is_enough_to_refuse(refused, tmp_path, part):
    (tmp_path / part).write_text("mine")
    assert "holds an earlier demo" in refused("demo", "--out", tmp_path, *OPTIONS)
    assert (tmp_path / part).read_text() == "mine"


@pytest.fixture
def brief(small, monkeypatch):
    """One scheme, and a figure and a report that take no time."""

    def save_figures(runs, folder):
        folder.mkdir()
        (folder / "all.png").write_text(", ".join(run.name for run in runs))

    def write_report(runs, file, verdicts):
        file.write_text(f"{len(verdicts)} verdicts on {len(runs)} runs")

    monkeypatch.setattr(demo, "SCHEMES", ("cs:0.7",))
    monkeypatch.setattr(demo, "save_figures", save_figures)
    monkeypatch.setattr(demo, "write_report", write_report)


def test_overwrite_deletes_its_own_parts_alone(cli, brief, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "notes.txt").write_text("keep")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "old.txt").write_text("from an earlier demo")
    (tmp_path / "verdicts.json").write_text("old")
    result = cli("demo", "--out", tmp_path, *OPTIONS, "--overwrite")
    assert (result.code, result.complaints) == (0, [])
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert (tmp_path / "notes.txt").read_text() == "keep"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["cs-0.7-seed0"]
    assert (tmp_path / "figures" / "all.png").read_text() == "cs-0.7, cs-0.7-seed0"
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert (tmp_path / "report.html").read_text() == f"{len(verdicts)} verdicts on 2 runs"
    assert {path.name for path in tmp_path.iterdir()} == {*demo.PARTS, "mine", "notes.txt"}


def test_every_seed_is_trained(cli, brief, tmp_path):
    assert cli("demo", "--out", tmp_path / "new", "--steps", 2, "--seeds", 2).code == 0
    folders = sorted(path.name for path in (tmp_path / "new" / "runs").iterdir())
    assert folders == ["cs-0.7-seed0", "cs-0.7-seed1"]


@pytest.mark.slow
def test_a_training_that_diverges_does_not_end_the_demo(cli, small, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SCHEMES", ("cs:0.7",))
    wild = partial(TrainConfig, n_skips=2, width=16, batch_size=8, learning_rate=1e9)
    monkeypatch.setattr(demo, "TrainConfig", wild)
    result = cli("demo", "--out", tmp_path / "new", "--steps", 50)
    assert result.code == 0
    assert len([line for line in result.complaints if "the loss was not finite" in line]) == 1
    assert (tmp_path / "new" / "verdicts.json").exists()
    states = [
        json.loads(file.read_text())["state"] for file in (tmp_path / "new/runs").rglob("run.json")
    ]
    assert states == ["failed"]
