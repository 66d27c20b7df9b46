import pandas as pd
import pytest

from stability_probe.regression import run_numbers
from stability_probe.report.sides import (
    kappa_text,
    overhead,
    settings_of,
    side_by_side,
    state,
    swing,
)
from stability_probe.verify import Evidence
from tests.oracles.evidence import (
    bare,
    checkpoint,
    complete,
    ensemble,
    relabelled,
    stored,
    trace,
    training,
    with_paths,
    without,
)


def rows(sides, part):
    return {row.name: row.cells for row in getattr(sides, part)}


def test_what_differs_stands_apart_from_what_does_not():
    one = relabelled(trace(), config={"width": 8, "probe": {"every": 1}}, seed=0)
    two = relabelled(trace(), config={"width": 8, "probe": {"every": 5}}, seed=1)
    (sides,) = side_by_side([one, two])
    assert rows(sides, "differing") == {"seed": ["0", "1"], "probe.every": ["1", "5"]}
    assert rows(sides, "common")["width"] == ["8", "8"]
    assert [row.name for row in sides.common][:3] == ["scheme", "long skips N", "κ"]


def test_a_setting_that_one_run_has_not():
    (sides,) = side_by_side([relabelled(trace(), config={"width": 8}), trace()])
    assert rows(sides, "differing") == {"width": ["8", "–"]}


def test_each_kind_for_itself():
    kinds = side_by_side([trace(), ensemble(5), checkpoint(), trace()])
    assert [(s.kind, len(s.runs)) for s in kinds] == [
        ("training", 2), ("random networks", 1), ("checkpoint", 1),
    ]  # fmt: skip


def test_results_of_a_training():
    run = relabelled(with_paths(complete(), paths=(3, 1.5, 0.5)), state="complete")
    found = rows(side_by_side([run])[0], "results")
    assert found["state"] == ["complete"] and found["records up to"] == ["step 100"]
    assert found["sensitivity σ_max(J)"] == ["4"]
    assert found["swing of ‖h₀‖²"] == ["55.4"]  # 32 (1 + .49 + .24)
    assert float(found["final loss"][0]) == pytest.approx(
        sum(1 / t for t in range(91, 101)) / 10, rel=1e-3
    )
    assert "overhead of the probe" not in found  # none says it


def test_the_final_loss_is_the_one_of_a_sweeps_table(tmp_path):
    run = trace(steps=25)  # a tenth of which is no whole number
    found = rows(side_by_side([run])[0], "results")
    number = run_numbers(stored(run, tmp_path / "run"))["final_loss"]
    assert found["final loss"] == [f"{number:.4g}"]


def test_results_of_a_checkpoint_are_by_noise_level():
    found = rows(side_by_side([checkpoint()])[0], "results")
    assert found["sensitivity σ_max(J)"] == ["4, 4, 4"] and found["records up to"] == [
        "noise level 3"
    ]
    assert "final loss" not in found and "swing of ‖h₀‖²" not in found


def test_states():
    assert state(relabelled(trace(), state="running")) == "running, or killed"
    failed = relabelled(trace(), state="failed", reason="OSError: full")
    assert state(failed) == "failed: OSError: full"


@pytest.mark.parametrize("run", [training(), bare(trace()), without(trace(), "loss", "energy")])
def test_whatever_is_missing_is_a_dash_or_left_out(run):
    found = rows(side_by_side([run])[0], "results")
    assert {"state", "overhead of the probe", "sensitivity σ_max(J)"}.isdisjoint(found)
    assert overhead(run) == state(run) == "–"


def test_nothing_recorded():
    assert training().final_loss is None and swing(training()) is None


def test_a_diverged_run_has_an_infinite_swing():
    run = trace()
    frame = run.frame.assign(value=run.frame.value.where(run.frame.step < 90, float("nan")))
    assert swing(Evidence("run", frame, run.info)) == float("inf")


def test_kappa_that_is_learned():
    assert kappa_text(relabelled(trace(), kappa=None)) == "depends on the input, mean 1, 0.7, 0.49"


@pytest.mark.parametrize("config", [None, [], "text", {"a": {}, "b": [[1]], "c": "<b>"}])
def test_a_user_may_say_anything_of_a_run(config):
    run = Evidence("mine", pd.DataFrame(columns=trace().frame.columns), {
        "config": config, "parameters": "many", "probing": 3,
    })  # fmt: skip
    found = settings_of(run)
    assert all(isinstance(text, str) for text in found.values())
    assert found == ({"a": "{}", "b": "[[1]]", "c": "<b>"} if isinstance(config, dict) else {})
