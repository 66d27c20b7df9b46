"""Runs held against a baseline."""

from dataclasses import replace

import pytest

from stability_probe.errors import StabilityProbeError
from stability_probe.regression import Baseline, check, collect, group_runs
from tests.oracles.evidence import complete, stored
from tests.oracles.seeds import seeded

TOGETHER = range(10, 15)


pytestmark = pytest.mark.usefixtures("quick_verdicts")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return collect(seeded(tmp_path_factory.mktemp("then")))


def now(folder, seeds=TOGETHER, factors=None, **info):
    return group_runs(seeded(folder, seeds, factors, **info))


def test_other_seeds_pass(tmp_path, baseline):
    found = check(now(tmp_path), baseline)
    assert found.passed
    (group,) = found.groups
    assert (group.name, group.seeds, group.cause, group.worse) == ("cs:0.7", (5, 5), "", [])
    assert group.notes == []


@pytest.mark.parametrize(
    ("quantity", "name"),
    [
        (("energy", "h", 2), "energy.h_2"),
        (("loss", "loss", 0), "loss"),
        (("sigma_max", "J", 0), "sensitivity.exact"),
    ],
)
def test_what_rises_is_found_where_it_rose(tmp_path, baseline, quantity, name):
    found = check(now(tmp_path, factors={quantity: 1.5}), baseline)
    (group,) = found.groups
    assert not found.passed and group.cause
    names = {c.name for c in group.worse}
    assert name in names and names <= {name, "oscillation.h_2"}
    (c,) = [c for c in group.worse if c.name == name]
    assert c.ratio == pytest.approx(1.5, rel=0.1)


def test_what_falls_is_told_and_passes(tmp_path, baseline):
    found = check(now(tmp_path, factors={("loss", "loss", 0): 0.5}), baseline)
    assert found.passed
    assert [c.name for c in found.groups[0].compared if c.change == "better"] == ["loss"]


@pytest.mark.parametrize(("margin", "passed"), [(0.1, False), (0.6, True)])
def test_the_margin_is_a_rise_that_may_be(tmp_path, baseline, margin, passed):
    found = check(now(tmp_path, factors={("loss", "loss", 0): 1.5}), baseline, margin=margin)
    assert found.passed is passed


def test_one_seed_is_said_to_be_held_against_a_band(tmp_path, baseline):
    little, much = (
        check(now(tmp_path / str(f), [9], {("loss", "loss", 0): f}), baseline) for f in (1.1, 9.0)
    )
    assert little.passed and not much.passed
    (note,) = little.groups[0].notes
    assert note.startswith("there is one seed here: it is held against a tolerance band from the b")
    alone = Baseline(group_runs(seeded(tmp_path / "alone", [0])))
    (note,) = check(now(tmp_path / "five"), alone).groups[0].notes
    assert note.startswith("the baseline has one seed: it is held against a tolerance band from th")
    (note,) = check(now(tmp_path / "one", [3]), alone).groups[0].notes
    assert note.startswith("one seed there and one here: nothing is known of the spread")


def held(baseline, claim="3.4: a claim"):
    """The baseline with a claim that held in all its runs."""
    return Baseline([replace(baseline.groups[0], verdicts={claim: ["HOLDS"] * 5})])


def test_a_verdict_that_flips_fails(tmp_path, baseline):
    (group,) = now(tmp_path)
    group = replace(group, verdicts={"3.4: a claim": ["VIOLATED"] * 5})
    found = check([group], held(baseline))
    assert not found.passed
    assert [f.claim for f in found.groups[0].flips] == ["3.4: a claim"]
    assert found.groups[0].worse == []


def test_a_flip_of_a_single_run_is_a_note(tmp_path, baseline):
    (group,) = now(tmp_path, [7])
    found = check([replace(group, verdicts={"3.4: a claim": ["VIOLATED"]})], held(baseline))
    assert found.passed
    assert any("was HOLDS, is VIOLATED; with so few" in note for note in found.groups[0].notes)


def test_a_run_that_diverged_fails(tmp_path, baseline):
    runs = seeded(tmp_path, TOGETHER)
    broken = seeded(tmp_path / "bad", [20], {("loss", "loss", 0): float("nan")})
    broken[0].end("failed", "TrainingDiverged: the loss was not finite", {})
    found = check(group_runs([*runs, *broken]), baseline)
    assert not found.passed
    assert found.groups[0].cause == "training diverged with seed 20: see its loss"


def test_signed_losses_are_said_not_to_be_compared(tmp_path, baseline):
    (group,) = now(tmp_path)
    group.tested["loss"][0] = -1.0
    notes = check([group], baseline).groups[0].notes
    assert notes == ["cannot be compared, as some are negative: loss"]


class TestOtherConfigurations:
    def test_are_refused_with_a_remedy(self, tmp_path, baseline):
        other = now(tmp_path, config={"batch_size": 4})
        match = (
            "b.json: is of another configuration than runs of cs:0.7: config.batch_size is not r"
        )
        with pytest.raises(StabilityProbeError, match=match) as error:
            check(other, baseline, source="b.json")
        assert "--anyway" in str(error.value) and "--update" in str(error.value)

    def test_another_kappa_under_the_same_name(self, tmp_path, baseline):
        other = now(tmp_path, kappa=(1.0, 0.7, 0.5))
        with pytest.raises(StabilityProbeError, match=r"kappa 3 is 0.49 and 0.5"):
            check(other, baseline)

    def test_another_number_of_skips(self, tmp_path, baseline):
        other = now(tmp_path, kappa=(1.0, 0.7))
        with pytest.raises(StabilityProbeError, match="kappa is 3 entries and 2 entries"):
            check(other, baseline)

    def test_are_compared_all_the_same_if_asked_and_told(self, tmp_path, baseline):
        found = check(now(tmp_path, config={"batch_size": 4}), baseline, anyway=True)
        assert found.groups[0].notes == [
            "not as in the baseline: config.batch_size is not recorded and 4, there and here"
        ]

    def test_another_scheme(self, tmp_path, baseline):
        runs = [stored(complete("unscaled", seed=s), tmp_path / str(s)) for s in (0, 1)]
        with pytest.raises(StabilityProbeError, match=r"is of cs:0.7 and has no runs of unscaled"):
            check(group_runs(runs), baseline)
        assert check(group_runs(runs), baseline, anyway=True).groups[0].name == "unscaled"

    def test_another_machine_is_compared_and_told(self, tmp_path, baseline):
        (group,) = now(tmp_path)
        group.context["device"] = "cuda"
        (note,) = check([group], baseline).groups[0].notes
        assert note == "not as in the baseline: device is not recorded and cuda, there and here"


def test_what_only_one_side_has_is_told(tmp_path, baseline):
    (group,) = now(tmp_path)
    group.tested["new"] = group.tested.pop("loss")
    notes = check([group], baseline).groups[0].notes
    assert notes == [
        "not compared, as no longer recorded: loss", "not compared, as not in the baseline: new"
    ]  # fmt: skip
    group.tested.clear()
    with pytest.raises(StabilityProbeError, match="have no number in common with the baseline"):
        check([group], baseline)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"margin": -0.1}, "--margin is a relative rise of at least 0, got -0.1"),
        ({"margin": float("nan")}, "--margin"),
        ({"alpha": 0.0}, "--alpha is the rate of false alarms, in .0, 0.5.; got 0.0"),
        ({"alpha": 0.7}, "--alpha"),
    ],
)
def test_settings_out_of_range(tmp_path, baseline, setting, match):
    with pytest.raises(StabilityProbeError, match=match):
        check(now(tmp_path), baseline, **setting)


def test_as_a_dictionary(tmp_path, baseline):
    found = check(now(tmp_path, factors={("loss", "loss", 0): 3.0}), baseline).as_dict()
    assert found["passed"] is found["groups"][0]["passed"] is False
    first = found["groups"][0]["compared"][0]
    assert (first["name"], first["change"], len(first["now"])) == ("loss", "worse", 5)
