"""Runs that belong together, and what they have to agree in."""

import json
import math

import pytest

from stability_probe.errors import StabilityProbeError
from stability_probe.regression.groups import differences, group_runs, side_by_side
from stability_probe.runs import Run, TrainConfig
from tests.oracles.evidence import complete, stored, training
from tests.oracles.seeds import seeded


def test_runs_of_a_scheme_in_the_order_of_their_seeds(tmp_path):
    runs = seeded(tmp_path, [10, 2, 1])
    (group,) = group_runs(runs)
    assert (group.name, group.seeds) == ("cs:0.7", ["1", "2", "10"])
    by_seed = {str(r.info["seed"]): r for r in runs}
    for place, seed in enumerate(group.seeds):
        (alone,) = group_runs([by_seed[seed]])
        assert {k: v[place] for k, v in group.tested.items()} == {
            k: v[0] for k, v in alone.tested.items()
        }
    assert group.tested["gain.skip_1"] and set(group.verdicts)
    assert all(len(v) == 3 for v in (*group.tested.values(), *group.verdicts.values()))


def test_verdicts_are_the_statuses_of_each_run_alone(tmp_path):
    (group,) = group_runs(seeded(tmp_path, [0]))
    theorems = {claim[:3] for claim in group.verdicts}
    assert theorems >= {"3.3", "3.4"}
    assert {s for statuses in group.verdicts.values() for s in statuses} <= {
        "HOLDS", "VIOLATED", "INCONCLUSIVE", "ASSUMPTION_UNMET"
    }  # fmt: skip


def test_schemes_make_groups(tmp_path):
    runs = [
        stored(complete(scheme, seed=s), tmp_path / f"{scheme[:2]}{s}")
        for scheme in ("unscaled", "cs:0.7")
        for s in (0, 1)
    ]
    assert [(g.name, g.seeds) for g in group_runs(runs)] == [
        ("cs:0.7", ["0", "1"]), ("unscaled", ["0", "1"])
    ]  # fmt: skip


def test_runs_without_a_scheme_or_a_seed(tmp_path):
    evidence = complete()
    for name in ("scheme", "seed"):
        del evidence.info[name]
    a, b = (stored(evidence, tmp_path / n) for n in "ab")
    (group,) = group_runs([a])
    assert (group.name, group.seeds) == ("runs", ["none"])
    with pytest.raises(StabilityProbeError, match="the runs: a and b say no seed, so that they m"):
        group_runs([a, b])


def test_skips_that_do_not_say_where_they_are(tmp_path, quick_verdicts):
    run = stored(complete(skips=[{"kappa": 1.0}] * 3), tmp_path / "run")
    assert group_runs([run])[0].about["skips"] == ["None -> None (None)"] * 3


class TestRefused:
    def test_no_runs(self):
        with pytest.raises(StabilityProbeError, match="at least one run is needed, got none"):
            group_runs([])

    def test_other_settings_under_one_name(self, tmp_path):
        runs = seeded(tmp_path, [0]) + seeded(tmp_path, [1], config={"width": 16})
        match = r"runs of cs:0.7 have to differ by their seed alone: config.width is 8 and 16 in 0"
        with pytest.raises(StabilityProbeError, match=match):
            group_runs(runs)

    def test_a_seed_twice(self, tmp_path):
        runs = seeded(tmp_path / "a", [0]) + seeded(tmp_path / "b", [0])
        with pytest.raises(StabilityProbeError, match="a/0 and b/0 have the seed 0, and are no in"):
            group_runs(runs)

    @pytest.mark.parametrize("state", ["running", "failed"])
    def test_a_run_that_is_not_complete(self, tmp_path, state):
        (run,) = seeded(tmp_path, [0])
        run.end(state, "KeyboardInterrupt: ", {})
        with pytest.raises(
            StabilityProbeError, match=rf"0: is {state} \(KeyboardInterrupt: \); onl"
        ):
            group_runs([run])

    def test_no_records(self, tmp_path):
        with pytest.raises(StabilityProbeError, match=r"cs:0.7: have no records in common"):
            group_runs([stored(training(), tmp_path / "run")])


def test_a_run_that_diverged_is_let_in_unless_it_may_not(tmp_path):
    (run,) = seeded(tmp_path, [0])
    run.end("failed", "TrainingDiverged: the loss was not finite at step 3", {})
    (group,) = group_runs([run, *seeded(tmp_path / "more", [1])])
    assert group.seeds == ["0", "1"]
    lost, kept = zip(*group.tested.values(), strict=True)
    assert set(lost) == {math.inf} and all(map(math.isfinite, kept))  # whatever it had recorded
    with pytest.raises(StabilityProbeError, match=r"is failed .TrainingDiverged"):
        group_runs([run], failed=False)


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {}, ["a is 1 and not recorded"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b 2 is 2 and 3"]),
        ({"k": [1.0]}, {"k": [1.0, 0.5]}, ["k is 1 entries and 2 entries"]),
        ({"b": 0.1, "a": "x"}, {"b": 0.25, "a": "y"}, ["a is x and y", "b is 0.1 and 0.25"]),
    ],
)
def test_differences(one, other, found):
    assert differences(one, other) == found


def test_the_seed_is_no_difference_and_what_is_known_of_the_machine_is_context(tmp_path):
    one, two = (group_runs(seeded(tmp_path / str(s), [s]))[0] for s in (0, 1))
    assert one.about == two.about
    assert one.about["config"] == {"width": 8}
    assert one.context["torch"] and "torch" not in json.dumps(one.about)


def test_the_command_that_makes_a_run_again(tmp_path):
    config = TrainConfig(scheme="cs:0.7", steps=7, width=32, learning_rate=0.01).as_dict()
    run = stored(complete(), tmp_path / "run", config)
    command = group_runs([run])[0].command
    assert command == (
        "stability-probe train --scheme cs:0.7 --steps 7 --width 32 --learning-rate 0.01 "
        "--seed SEED --out RUN"
    )
    (own,) = group_runs(seeded(tmp_path, [0]))
    assert own.command.startswith("the program that recorded the runs")


def test_numbers_that_not_all_have_are_left_out():
    assert side_by_side("g", [{"a": 1.0}, {"a": 2.0, "b": 3.0}]) == {"a": [1.0, 2.0]}
    with pytest.raises(StabilityProbeError, match=r"runs of g: have no records in common"):
        side_by_side("g", [{"a": 1.0}, {"b": 3.0}])
    assert side_by_side("g", [{}], must=False) == {}


def test_runs_are_only_read(tmp_path):
    runs = seeded(tmp_path, [0, 1])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    group_runs([Run.open(r.path) for r in runs])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
