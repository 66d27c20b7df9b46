import numpy as np
import pytest

from stability_probe.theory import input_energy


@pytest.mark.parametrize(
    ("mean_alpha_squared", "second_moment", "expected"),
    [
        (0.0, 1 / 3, 12.0),  # pure noise
        (1.0, 1 / 3, 4.0),  # pure uniform data
        (0.5, 1 / 3, 8.0),
        (0.5, 1.0, 12.0),  # data of unit variance: the noise level does not matter
        (0.25, 0.0, 9.0),  # black images
        (0.5, 3.0, 24.0),
    ],
)
def test_by_hand(mean_alpha_squared, second_moment, expected):
    assert input_energy(12, mean_alpha_squared, second_moment) == pytest.approx(expected)


def test_the_papers_data_is_the_default():
    assert input_energy(12, 0.5) == input_energy(12, 0.5, 1 / 3)


def test_lemma_on_samples():
    rng = np.random.default_rng(0)
    m, n = 50, 20_000
    alpha2 = rng.uniform(0.2, 1.0, size=(n, 1))
    x0, noise = rng.uniform(-1, 1, size=(n, m)), rng.standard_normal((n, m))
    energy = ((np.sqrt(alpha2) * x0 + np.sqrt(1 - alpha2) * noise) ** 2).sum(1)
    z = (energy.mean() - input_energy(m, 0.6)) / (energy.std(ddof=1) / n**0.5)
    assert abs(z) < 4


@pytest.mark.parametrize("mean_alpha_squared", [-0.1, 1.1, float("nan")])
def test_rejects_a_mean_square_outside_the_unit_interval(mean_alpha_squared):
    with pytest.raises(ValueError, match=r"mean_alpha_squared must lie in \[0, 1\], got"):
        input_energy(4, mean_alpha_squared)


def test_rejects_a_negative_second_moment():
    with pytest.raises(
        ValueError, match=r"second_moment is a mean square, so at least 0; got -0\.1"
    ):
        input_energy(4, 0.5, second_moment=-0.1)
