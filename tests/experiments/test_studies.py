"""Trainings that claims rest on."""

import math

import pandas as pd
import pytest

from experiments import studies
from experiments.measures import final_loss
from experiments.studies import conduct, grid_file
from stability_probe import StabilityProbeError
from stability_probe.runs import Run
from stability_probe.runs.grid import Grid

NAME = "digits-eq4"


def swept(monkeypatch, folder, **ended):
    """A sweep all of whose runs are complete but the first, which has ended so."""
    names = [name for name, _ in Grid.from_yaml(grid_file(NAME, "cpu")).cells()]
    asked = {}

    def sweep(grid, out, **options):
        asked.update(options)
        for name in names:
            Run(out / "runs" / name).begin({"skips": []})
        rows = [
            {"run": name, "state": "complete", "reason": None, "final_loss": float(number)}
            for number, name in enumerate(names)
        ]
        return pd.DataFrame([{**rows[0], **ended}, *rows[1:]])

    monkeypatch.setattr(studies, "sweep", sweep)
    return conduct(NAME, "cpu", folder), asked


def test_every_run_is_a_member_and_has_one_thread(monkeypatch, tmp_path):
    study, asked = swept(monkeypatch, tmp_path)
    assert len(study.members) == 25 and study.schemes[0] == "unscaled"
    assert asked["threads"] == 1
    for member in study.members:
        name = member.run.path.name
        assert name == f"scheme={member.config.scheme.replace(':', '-')},seed={member.config.seed}"


def test_a_run_that_diverged_is_a_result(monkeypatch, tmp_path):
    reason = "TrainingDiverged: loss is nan at step 3"
    study, _ = swept(monkeypatch, tmp_path, state="failed", reason=reason, final_loss=math.nan)
    assert [member.diverged for member in study.members] == [True, *24 * [False]]
    assert [final_loss(member) for member in study.members] == [math.inf, *range(1, 25)]
    assert study.members[0].numbers == {}


@pytest.mark.parametrize(
    "ended",
    [{"state": "failed", "reason": "OSError: No space left on device"}, {"state": "open"}],
)
def test_a_run_that_failed_otherwise_is_none(monkeypatch, tmp_path, ended):
    with pytest.raises(StabilityProbeError, match=r"1 of 25 runs have not ended.*--retry"):
        swept(monkeypatch, tmp_path, **ended)


def test_a_grid_that_is_not_there_names_those_that_are():
    with pytest.raises(StabilityProbeError, match="digits-uvit"):
        grid_file("nothing", "cpu")
