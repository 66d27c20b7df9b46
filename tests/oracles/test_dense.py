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
    ("value", "residual"), [(2.9, 1.0), (3.01, 1.0), (2.99, 1e-4), (float("nan"), 1.0)]
)
def test_the_comparator_can_fail(value, residual):
    norm = SpectralNorm(torch.tensor([value]), torch.tensor([residual]), 1, True)
    with pytest.raises(AssertionError):
        assert_matches_dense(norm, torch.diag(torch.tensor([3.0, 1.0]))[None])
