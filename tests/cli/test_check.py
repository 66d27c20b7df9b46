"""`baseline` and `check` on the command line."""

import json
import xml.etree.ElementTree as ET

import pytest

from tests.oracles.evidence import complete, stored
from tests.oracles.seeds import seeded

LOSS = {("loss", "loss", 0): 3.0}


pytestmark = pytest.mark.usefixtures("quick_verdicts")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("then")
    seeded(folder)
    return folder


@pytest.fixture(scope="module")
def written(cli, runs, tmp_path_factory):
    file = tmp_path_factory.mktemp("baseline") / "b.json"
    result = cli("baseline", runs, "-o", file)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0].startswith("cs:0.7: 5 seeds, ")
    assert result.out.splitlines()[-1] == f"baseline: {file}"
    return file


@pytest.fixture
def file(written, tmp_path):
    copy = tmp_path / "stability-baseline.json"
    copy.write_bytes(written.read_bytes())
    return copy


@pytest.fixture
def fine(tmp_path):
    seeded(tmp_path / "fine", range(10, 15))
    return tmp_path / "fine"


@pytest.fixture
def bad(tmp_path):
    seeded(tmp_path / "bad", range(20, 25), LOSS)
    return tmp_path / "bad"


def test_runs_that_are_as_they_were_pass(cli, file, fine):
    result = cli("check", fine, "--baseline", file)
    assert (result.code, result.err) == (0, "")
    assert "cs:0.7: 5 runs against 5 of the baseline" in result.out
    assert result.out.splitlines()[-1] == "stability check: passed"


def test_a_regression_fails_and_is_named(cli, file, bad):
    result = cli("check", bad, "--baseline", file)
    assert result.code == 1
    line = next(line for line in result.out.splitlines() if line.startswith("loss"))
    assert "×3" in line and line.rstrip().endswith("worse")
    assert "likely cause: features are as they were: look at the loss" in result.out
    assert result.out.splitlines()[-1] == "stability check: FAILED"


def test_every_number_is_printed_if_asked(cli, file, fine):
    some, every = (cli("check", fine, "--baseline", file, *more).out for more in ((), ("--all",)))
    assert "not worse, as far as can be told" in some and "not worse" in every
    assert len(every.splitlines()) > len(some.splitlines()) + 5


def test_an_improvement_passes(cli, file, tmp_path):
    seeded(tmp_path / "good", range(30, 35), {("loss", "loss", 0): 0.3})
    result = cli("check", tmp_path / "good", "--baseline", file)
    assert result.code == 0
    assert any(line.startswith("loss") and "better" in line for line in result.out.splitlines())


def test_json(cli, file, bad):
    result = cli("check", bad, "--baseline", file, "--json")
    found = json.loads(result.out)
    assert (result.code, found["passed"]) == (1, False)
    assert found["groups"][0]["compared"][0]["name"] == "loss"
    written = cli("baseline", bad, "-o", file.parent / "c.json", "--json")
    assert json.loads(written.out) == json.loads((file.parent / "c.json").read_text())


def test_files_for_other_programs(cli, file, bad, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    junit, markdown = tmp_path / "out" / "j.xml", tmp_path / "m.md"
    options = ("--baseline", file, "--junit", junit, "--markdown", markdown)
    assert cli("check", bad, *options).code == 1
    assert len(list(ET.parse(junit).iter("failure"))) >= 1
    assert markdown.read_text().startswith("## Training stability: **failed**")
    assert summary.read_text() == f"before\n{markdown.read_text()}\n"


def test_a_summary_that_cannot_be_written_is_a_note(cli, file, fine, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    result = cli("check", fine, "--baseline", file)
    assert result.code == 0
    (line,) = result.complaints
    assert line.startswith(f"note: {tmp_path}: the job's summary cannot be written (")


class TestUpdate:
    def test_prints_the_difference_and_takes_the_new_runs(self, cli, file, bad):
        result = cli("check", bad, "--baseline", file, "--update")
        assert result.code == 0
        assert any(line.startswith("loss") for line in result.out.splitlines())
        last = result.out.splitlines()[-1]
        assert last == f"{file}: written; training is worse than before, and accepted"
        assert "FAILED" not in result.out
        assert cli("check", bad, "--baseline", file).code == 0

    def test_keeps_other_schemes(self, cli, file, tmp_path):
        for seed in (0, 1):
            stored(complete("unscaled", seed=seed), tmp_path / "u" / str(seed))
        assert cli("check", tmp_path / "u", "--baseline", file, "--update").code == 0
        names = [g["name"] for g in json.loads(file.read_text())["groups"]]
        assert names == ["cs:0.7", "unscaled"]

    def test_makes_a_baseline_where_there_is_none(self, cli, fine, tmp_path):
        new = tmp_path / "new.json"
        assert cli("check", fine, "--baseline", new, "--update").code == 0
        assert cli("check", fine, "--baseline", new).code == 0

    def test_fewer_seeds_in_the_place_of_many_are_noted(self, cli, file, tmp_path):
        seeded(tmp_path / "one", [7])
        result = cli("check", tmp_path / "one", "--baseline", file, "--update")
        assert result.code == 0
        assert "the baseline now has fewer seeds, 1 in the place of 5" in result.err

    def test_takes_another_configuration(self, cli, file, tmp_path):
        seeded(tmp_path / "w", config={"width": 16})
        assert cli("check", tmp_path / "w", "--baseline", file).code == 2
        result = cli("check", tmp_path / "w", "--baseline", file, "--update")
        assert result.code == 0
        assert "config.width is 8 and 16" in result.err
        assert cli("check", tmp_path / "w", "--baseline", file).code == 0


class TestRequire:
    @pytest.mark.parametrize(
        ("requirement", "code", "word"),
        [
            ("loss<1e9", 0, "met"),
            ("loss<1e-9", 1, "BROKEN"),
            ("theorem_3_4=HOLDS", 0, "met"),
            ("theorem_3_4=VIOLATED", 1, "BROKEN"),
        ],
    )
    def test_without_a_baseline(self, cli, fine, requirement, code, word):
        result = cli("check", fine, "--require", requirement)
        assert result.code == code
        assert any(
            line.startswith(word) and requirement in line for line in result.out.splitlines()
        )

    def test_beside_a_baseline(self, cli, fine, file):
        options = ("--baseline", file, "--require", "loss<1e9", "--require", "loss>1e9")
        result = cli("check", fine, *options)
        assert result.code == 1
        assert "met" in result.out and "BROKEN" in result.out

    def test_a_fault_is_pointed_at(self, refused, fine):
        line = refused("check", fine, "--require", "loss<<1")
        assert line.startswith("--require 'loss<<1', character 6: a number is needed")

    def test_a_broken_one_is_broken_under_update_too(self, cli, fine, file):
        before = file.read_bytes()
        options = ("--baseline", file, "--update", "--require", "loss<0")
        assert cli("check", fine, *options).code == 1
        assert file.read_bytes() == before


class TestRefused:
    def test_nothing_to_check_against(self, refused, fine):
        assert refused("check", fine).startswith("check: there is nothing to check against; give")

    def test_update_of_nothing(self, refused, fine):
        line = refused("check", fine, "--update", "--require", "loss<1")
        assert line.startswith("check: --update rewrites a baseline; say which")

    def test_no_such_baseline(self, refused, fine, tmp_path):
        assert "cannot be read" in refused("check", fine, "--baseline", tmp_path / "none.json")

    @pytest.mark.parametrize("length", [0, 10, 300])
    def test_a_truncated_baseline(self, refused, fine, file, length):
        file.write_text(file.read_text()[:length])
        assert "is no JSON" in refused("check", fine, "--baseline", file)
        assert "is no JSON" in refused("check", fine, "--baseline", file, "--update")

    def test_a_hand_edited_baseline(self, refused, fine, file):
        file.write_text(file.read_text().replace('"HOLDS"', '"VIOLATED"', 1))
        assert "was changed after it was written" in refused("check", fine, "--baseline", file)

    def test_another_batch_size(self, refused, file, tmp_path):
        seeded(tmp_path / "b", config={"batch_size": 2})
        line = refused("check", tmp_path / "b", "--baseline", file)
        assert "config.batch_size is not recorded and 2, there and here" in line

    def test_no_runs(self, refused, file, tmp_path):
        assert "neither a run folder" in refused("check", tmp_path, "--baseline", file)

    def test_a_baseline_in_the_place_of_a_run(self, refused, runs):
        before = (runs / "0" / "run.json").read_bytes()
        line = refused("baseline", runs, "-o", runs / "0" / "run.json")
        assert "among a run's own files" in line
        assert (runs / "0" / "run.json").read_bytes() == before

    def test_a_report_in_the_place_of_a_run(self, refused, runs, file, contents):
        before = contents(runs)
        for option in ("--junit", "--markdown"):
            out = runs / "0" / "outcome.json"
            assert "among a run's own files" in refused(
                "check", runs, "--baseline", file, option, out
            )
        assert contents(runs) == before

    def test_a_baseline_of_runs_that_differ(self, refused, tmp_path):
        seeded(tmp_path / "a", [0])
        seeded(tmp_path / "b", [1], config={"width": 4})
        line = refused("baseline", tmp_path, "-o", tmp_path / "b.json")
        assert "have to differ by their seed alone: config.width is 8 and 4" in line

    def test_a_margin_below_nothing(self, refused, fine, file):
        assert "--margin" in refused("check", fine, "--baseline", file, "--margin", "-1")


def test_few_seeds_are_noted(cli, tmp_path):
    seeded(tmp_path / "r", [0, 1])
    result = cli("baseline", tmp_path / "r", "-o", tmp_path / "b.json")
    assert result.code == 0
    (line,) = result.complaints
    assert line == "note: cs:0.7: with 5 seeds, smaller changes would be seen"
