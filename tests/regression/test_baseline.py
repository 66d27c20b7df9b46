"""The baseline's file: what it holds, how it reads, and what is refused."""

import json
import re

import pytest

from stability_probe.errors import StabilityProbeError
from stability_probe.regression import Baseline, collect
from tests.oracles.evidence import complete, stored
from tests.oracles.seeds import seeded

pytestmark = pytest.mark.usefixtures("quick_verdicts")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return seeded(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def file(runs, tmp_path):
    collect(runs, "the command").write(tmp_path / "b.json")
    return tmp_path / "b.json"


def test_what_is_written_is_read_again(runs, file):
    found = Baseline.read(file)
    (group,), (written,) = found.groups, collect(runs).groups
    assert found.command == "the command"
    assert (group.name, group.seeds, group.about) == (written.name, written.seeds, written.about)
    assert group.verdicts == written.verdicts
    for name, values in written.tested.items():
        assert group.tested[name] == pytest.approx(values, rel=1e-5)


def test_it_has_the_whole_distribution_the_machine_the_schema_and_the_command(file):
    content = json.loads(file.read_text())
    (group,) = content["groups"]
    assert content["schema"] == 1
    assert all(len(values) == 5 for values in group["tested"].values())
    assert {"python", "torch", "stability_probe"} <= set(group["context"])
    assert group["command"] and content["command"]


def test_it_is_small_sorted_and_has_a_line_a_number(runs, file, tmp_path):
    text = file.read_text()
    assert len(text) < 8000
    names = re.findall(r'^ +"(energy\.h_\d+)": \[.*\],?$', text, re.M)
    assert names == [f"energy.h_{i}" for i in range(4)]
    collect(list(reversed(runs)), "the command").write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text


def test_a_changed_number_is_a_changed_line(runs, file, tmp_path):
    other = seeded(tmp_path, factors={("loss", "loss", 0): 2.0})
    collect(other, "the command").write(tmp_path / "other.json")
    lines = [set(f.read_text().splitlines()) for f in (file, tmp_path / "other.json")]
    changed = {re.search(r'"([^"]+)"', line)[1] for line in lines[0] ^ lines[1]}
    assert "loss" in changed and "digest" in changed
    assert not any(name.startswith(("energy", "path")) for name in changed)


def test_groups_are_put_in_the_place_of_those_of_their_name(runs, tmp_path):
    more = [stored(complete("unscaled", seed=s), tmp_path / str(s)) for s in (0, 1)]
    both = collect(runs).with_groups(collect(more).groups, "new")
    assert [g.name for g in both.groups] == ["cs:0.7", "unscaled"]
    fewer = both.with_groups(collect(runs[:2]).groups, "new")
    assert [len(g.seeds) for g in fewer.groups] == [2, 2]
    assert both.group("unscaled").seeds == ["0", "1"] and both.group("ls") is None


class TestRefused:
    @pytest.mark.parametrize("length", [0, 1, 100, -20, -2])
    def test_a_truncated_file(self, file, length):
        file.write_text(file.read_text()[:length])
        with pytest.raises(StabilityProbeError, match=r"b.json: is no JSON .*perhaps cut"):
            Baseline.read(file)

    @pytest.mark.parametrize(
        ("old", "new"),
        [('"seeds": ["0"', '"seeds": ["9"'), ("HOLDS", "VIOLATED"), ('"cs:0.7"', '"cs:0.5"')],
    )
    def test_a_hand_edited_file(self, file, old, new):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(StabilityProbeError, match="was changed after it was written"):
            Baseline.read(file)

    def test_a_changed_number(self, file):
        text = re.sub(r'("loss": \[)[\d.]+', r"\g<1>0.5", file.read_text())
        file.write_text(text)
        with pytest.raises(StabilityProbeError, match="was changed after it was written"):
            Baseline.read(file)

    def test_another_layout_of_the_same_content_is_no_change(self, file):
        file.write_text(json.dumps(json.loads(file.read_text())))
        assert len(Baseline.read(file).groups) == 1

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("[]", "is no baseline .it has no schema"),
            ('{"a": 1}', "is no baseline .it has no schema"),
            ('{"schema": 2}', "has schema 2 and this version reads 1"),
            ('{"schema": 1}', "was changed after it was written"),
        ],
    )
    def test_something_else(self, tmp_path, content, match):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(StabilityProbeError, match=match):
            Baseline.read(tmp_path / "b.json")

    def test_fields_that_are_not_there(self, file, monkeypatch):
        """With a digest that is right, as a program that is not this one may write it."""
        from stability_probe.regression import baseline

        content = json.loads(file.read_text())
        del content["groups"][0]["seeds"], content["digest"]
        content["digest"] = baseline._digest(content)
        file.write_text(json.dumps(content))
        with pytest.raises(StabilityProbeError, match=r"is no baseline .*seeds"):
            Baseline.read(file)

    def test_no_file(self, tmp_path):
        with pytest.raises(StabilityProbeError, match=r"b.json: cannot be read .*; write one with"):
            Baseline.read(tmp_path / "b.json")

    def test_a_folder(self, tmp_path):
        with pytest.raises(StabilityProbeError, match="cannot be read"):
            Baseline.read(tmp_path)

    def test_text_that_is_none(self, tmp_path):
        (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(StabilityProbeError, match="is no JSON"):
            Baseline.read(tmp_path / "b.json")

    def test_numbers_that_are_not_finite(self, tmp_path):
        runs = seeded(tmp_path, [0], factors={("loss", "loss", 0): float("inf")})
        with pytest.raises(StabilityProbeError, match=r"cs:0.7: loss is not finite in one of them"):
            collect(runs).write(tmp_path / "b.json")
        assert not (tmp_path / "b.json").exists()

    def test_an_old_baseline_stays_if_the_new_one_cannot_be_written(self, file, tmp_path):
        before = file.read_text()
        runs = seeded(tmp_path / "r", [0], factors={("loss", "loss", 0): float("nan")})
        with pytest.raises(StabilityProbeError, match="not finite"):
            collect(runs).write(file)
        assert file.read_text() == before
