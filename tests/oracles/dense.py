"""Dense float64 oracles for matrix-free norms, and the one comparator that uses them."""

from collections.abc import Callable

import torch
from torch import Tensor

from stability_probe.theory import SpectralNorm


def dense_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of every sample, (batch, m, n), for a function that keeps samples apart.

    Copies of one sample at a time, one for each output number, go through `fn` together.
    """
    jacobians = []
    for sample in x.detach():
        m = fn(sample[None]).numel()
        copies = sample.expand(m, *sample.shape).clone().requires_grad_()
        rows = fn(copies).reshape(m, m).diagonal()
        jacobians.append(torch.autograd.grad(rows.sum(), copies)[0].reshape(m, -1).double())
    return torch.stack(jacobians)


def assert_matches_dense(
    norm: SpectralNorm, jacobians: Tensor, *, rtol: float = 1e-2, roundoff: float = 1e-9
) -> None:
    """What `SpectralNorm` promises, against the singular values of dense matrices (batch, m, n).

    σ_max lies between the value and the upper bound but for rounding, the value is within `rtol` of
    it, and the vectors are unit ones between which the matrix takes the value. NaN fails each.
    """
    sigma = torch.linalg.svdvals(jacobians.double())
    value, upper = norm.value.double(), norm.upper.double()
    assert value.shape == upper.shape == sigma[:, 0].shape
    if norm.converged:
        assert ((value - sigma[:, 0]).abs() <= rtol * sigma[:, 0]).all(), (value, sigma[:, 0])
    assert (value <= sigma[:, 0] * (1 + roundoff)).all(), (value, sigma[:, 0])
    assert (upper >= sigma[:, 0] * (1 - roundoff)).all(), (upper, sigma[:, 0])
    left, right = norm.left.double(), norm.right.double()
    reached = torch.einsum("bm,bmn,bn->b", left, jacobians.double(), right)
    assert ((reached - value).abs() <= 10 * roundoff * sigma[:, 0]).all(), (reached, value)
    for vectors in (left, right):
        lengths = vectors.norm(dim=1)[sigma[:, 0] > 0]
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-4, atol=0)


def random_matrices(
    shape: tuple[int, int], spectra: list[list[float]], seed: int = 0
) -> torch.Tensor:
    """Float64 matrices (batch, *shape) with given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(shape)

    def orthonormal(n: int) -> Tensor:
        normal = torch.randn(n, rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal).Q

    sigma = [torch.tensor(s + [0.0] * (rank - len(s)), dtype=torch.float64) for s in spectra]
    return torch.stack([(orthonormal(shape[0]) * s) @ orthonormal(shape[1]).T for s in sigma])
