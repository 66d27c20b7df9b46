"""The benchmark of a check's error rates, on few runs or made-up ones."""

import json

import pytest
import torch

from benchmarks import regression_rates
from benchmarks.regression_rates import STATES, Runs, failed, measured, rates
from stability_probe.regression import Measures
from stability_probe.runs import load_images

IMAGES = load_images("digits")


@pytest.mark.slow
def test_every_state_is_another_network_or_training():
    found = {state.name: measured(state, 3, IMAGES).tested for state in STATES}
    assert all(
        {"loss", "energy.h_0", "sensitivity.exact", "gain.skip_3"} <= set(f) for f in found.values()
    )
    assert len({f["energy.h_0"] for f in found.values()}) == len(STATES)
    doubled, before = found["doubled"], found["as it was"]
    assert doubled["gain.skip_2"] == pytest.approx(2 * before["gain.skip_2"])
    assert doubled["gain.skip_1"] == pytest.approx(before["gain.skip_1"])


def test_no_seed_is_used_twice_and_each_run_is_made_once(tmp_path, monkeypatch):
    made = []

    def invented(state, seed, images):
        made.append((state.name, seed))
        worse = 3.0 if state.name == "rate" else 1.0
        generator = torch.Generator().manual_seed(seed)
        return Measures(
            {"loss": worse * (1 + 0.05 * torch.rand((), generator=generator).item())}, {}
        )

    monkeypatch.setattr(regression_rates, "measured", invented)
    monkeypatch.setattr(regression_rates, "JOBS", 1)
    file = tmp_path / "runs.jsonl"
    assert rates(Runs(file), STATES[0], 4) == {5: 0, 2: 0, 1: 0}
    assert sorted(seed for _, seed in made) == list(range(40))
    made.clear()
    assert rates(Runs(file), STATES[2], 4) == {5: 4, 2: 4, 1: 4}
    assert {name for name, _ in made} == {"rate"}  # the others were kept
    assert len({json.loads(line)["seed"] for line in file.read_text().splitlines()}) == 40


@pytest.mark.parametrize(("seeds", "expected"), [(5, True), (1, False)])
def test_only_so_many_seeds_are_looked_at(seeds, expected):
    now = {"loss": [1.0, 9.0, 9.0, 9.0, 9.0]}
    assert failed({"loss": [1.0, 1.1, 0.9, 1.0, 1.05]}, now, seeds) is expected


def test_it_prints_a_row_a_state(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(regression_rates, "JOBS", 1)
    monkeypatch.setattr(
        regression_rates, "measured", lambda state, seed, images: Measures({"loss": 1.0 + seed}, {})
    )
    regression_rates.main(["--pairs", "2", "--powers", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert all(state.name in out for state in STATES)
    assert "0.0% [0.0%, 84.2%]" in out
