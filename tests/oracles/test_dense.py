"""The oracles themselves, on cases with known answers."""

import pytest
import torch

from stability_probe.theory import SpectralNorm
from tests.oracles.dense import assert_matches_dense, dense_jacobian, random_matrices


def test_dense_jacobian_of_squares():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    expected = torch.stack([torch.diag(2 * row) for row in x])
    assert torch.equal(dense_jacobian(lambda v: v.square(), x), expected)


def test_random_matrices_have_the_spectrum_asked_for():
    sigma = torch.linalg.svdvals(random_matrices((4, 6), [[3.0, 2.0], []]))
    expected = torch.tensor([[3.0, 2, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(sigma, expected)


@pytest.mark.parametrize(
    ("value", "upper", "right"),
    [
        (2.9, 3.1, (1.0, 0.0)),  # too low
        (3.01, 3.1, (1.0, 0.0)),  # above σ_max
        (2.99, 2.995, (1.0, 0.0)),  # the upper bound is none
        (3.0, 3.1, (0.0, 1.0)),  # another vector's value
        (float("nan"), 3.1, (1.0, 0.0)),
    ],
)
def test_the_comparator_can_fail(value, upper, right):
    matrix = torch.diag(torch.tensor([3.0, 1.0]))[None]
    numbers = (torch.tensor([v]) for v in (value, upper))
    vectors = (torch.tensor([v]) for v in (right, (1.0, 0.0)))
    with pytest.raises(AssertionError):
        assert_matches_dense(SpectralNorm(*numbers, *vectors, 1, True), matrix)


def test_the_comparator_can_pass():
    one = torch.tensor([[1.0, 0.0]])
    norm = SpectralNorm(torch.tensor([3.0]), torch.tensor([3.01]), one, one, 1, True)
    assert_matches_dense(norm, torch.diag(torch.tensor([3.0, 1.0]))[None])
