"""Noise levels, and noise on clean samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.noise import (
    Schedule,
    default_levels,
    load_schedule,
    noised,
)

FOUR = Schedule(torch.tensor([0.99, 0.64, 0.36, 0.01]), None, "")


def test_alpha_and_sigma_by_hand():
    assert FOUR.alpha_sigma(1, unit=False) == (pytest.approx(0.8), pytest.approx(0.6))
    assert FOUR.alpha_sigma(2.0, unit=False) == (pytest.approx(0.6), pytest.approx(0.8))
    assert FOUR.alpha_sigma(1.0, unit=True) == FOUR.alpha_sigma(3, unit=False)
    assert FOUR.alpha_sigma(0.0, unit=True) == FOUR.alpha_sigma(0, unit=False)


@pytest.mark.parametrize(("t", "unit", "most"), [(4, False, 3), (-1, False, 3), (1.01, True, 1)])
def test_levels_out_of_range(t, unit, most):
    with pytest.raises(StabilityProbeError, match=rf"must lie in 0\.\.{most}"):
        FOUR.alpha_sigma(t, unit)


def test_default_levels():
    assert default_levels(load_schedule_of_nothing(), unit=False) == [50, 500, 950]
    assert default_levels(FOUR, unit=True) == (0.05, 0.5, 0.95)
    assert default_levels(FOUR, unit=False) == [0, 2, 3]


def load_schedule_of_nothing():
    return load_schedule(Path("/nowhere/model.pt"))


def test_ddpm_where_the_checkpoint_says_nothing():
    schedule = load_schedule_of_nothing()
    beta = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - beta), rtol=1e-4)
    assert "the checkpoint has none" in schedule.note


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_pipeline_says(tmp_path, part):
    (tmp_path / "scheduler").mkdir()
    config = {"beta_start": 0.1, "beta_end": 0.1, "num_train_timesteps": 5,
              "prediction_type": "v_prediction"}  # fmt: skip
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (tmp_path / "unet").mkdir()
    schedule = load_schedule(tmp_path / part)
    np.testing.assert_allclose(schedule.alphas_cumprod, 0.9 ** np.arange(1, 6), rtol=1e-6)
    assert schedule.prediction == "v_prediction"
    assert "scheduler_config.json" in schedule.note


@pytest.mark.parametrize("text", ["{", '{"beta_schedule": "odd"}', '{"num_train_timesteps": -1}'])
def test_a_damaged_pipeline(tmp_path, text):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(StabilityProbeError, match=r"scheduler_config\.json: cannot be read"):
        load_schedule(tmp_path)


class TestNoised:
    X0 = torch.tensor([[2.0, -1.0]])

    def epsilon(self):
        return torch.randn(1, 2, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("target", [None, "epsilon", "sample", "v_prediction"])
    def test_by_hand(self, target):
        x, found = noised(self.X0, 0.8, 0.6, torch.Generator().manual_seed(1), target)
        e = self.epsilon()
        torch.testing.assert_close(x, 0.8 * self.X0 + 0.6 * e)
        expected = {"epsilon": e, "sample": self.X0, "v_prediction": 0.8 * e - 0.6 * self.X0}
        assert found is None if target is None else torch.equal(found, expected[target])

    def test_gaussian_data_has_unit_energy_at_every_level(self):
        generator = torch.Generator().manual_seed(0)
        x0 = torch.randn(200, 500, generator=generator)
        for t in (0, 500, 999):
            alpha, sigma = load_schedule_of_nothing().alpha_sigma(t, unit=False)
            x, _ = noised(x0, alpha, sigma, generator, None)
            assert x.square().mean().item() == pytest.approx(1, abs=0.02)

    def test_an_unknown_target(self):
        with pytest.raises(StabilityProbeError, match="must be one of epsilon, sample"):
            noised(self.X0, 1.0, 0.0, torch.Generator(), "noise")
