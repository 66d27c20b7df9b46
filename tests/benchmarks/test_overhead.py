from pathlib import Path

import pytest

from benchmarks.contention import Taken
from benchmarks.overhead import main, measure, note, plan_of, row
from benchmarks.paired import Pair, ratios
from benchmarks.report import write_csv
from benchmarks.twins import Workload
from benchmarks.variants import VARIANTS
from stability_probe.runs import TrainConfig

TINY = Workload("tiny", TrainConfig(model="theory-unet", n_skips=2), (4, 1, 2, 2))
OURS = [v for v in VARIANTS if v.needs is None]
(PEER, *_) = (v for v in VARIANTS if v.needs is not None)


@pytest.mark.parametrize("variant", OURS, ids=lambda variant: variant.name)
def test_every_variant_watches_both_twins_and_leaves_no_hook(variant, tmp_path: Path, monkeypatch):
    made = []
    monkeypatch.setattr(Workload, "twin", lambda self, twin=Workload.twin: keep(made, twin(self)))
    pairs = measure(TINY, variant, 4, tmp_path)
    assert sum(pair.steps for pair in pairs) >= 4
    assert all(pair.ratio > 0 for pair in pairs)
    assert len(made) == 2
    for module in (m for twin in made for m in twin.model.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(twin.forward is twin.model for twin in made)


def keep(made, twin):
    made.append(twin)
    return twin


def test_each_half_has_half_of_the_pairs():
    assert plan_of(200, 1).pairs == 100
    assert plan_of(200, 10).pairs * 10 == 100
    assert plan_of(200, 1000).pairs == 2


def test_a_row_says_what_is_missing_or_disturbed():
    absent = row(TINY, PEER, [])
    assert (absent["median"], absent["note"]) == (None, f"{PEER.needs} is not installed")
    assert note(PEER, ratios([Pair(1.0, 2.0, taken=Taken(1.0, 0.0, 0.0))])) == "disturbed"
    assert note(PEER, ratios([Pair(1.0, 2.0)])) == ""


def test_the_goal_is_held_against_the_median():
    assert row(TINY, OURS[0], [Pair(1.0, 1.01), Pair(1.0, 1.0)])["verdict"] == "met"
    assert row(TINY, OURS[0], [Pair(1.0, 1.5)])["verdict"] == "MISSED"


def test_the_readme_table_is_printed_without_measuring(tmp_path, capsys):
    write_csv(tmp_path / "overhead.csv", [row(TINY, OURS[0], [Pair(1.0, 1.25)] * 2)])
    main(["--markdown", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"| {OURS[0].name} | 1.250 ± .000 |" in printed
    assert "torch" in printed.splitlines()[-1]
