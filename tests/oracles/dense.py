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

    The value is σ_max within `rtol`, never above it but for rounding, and some singular value lies
    within the residual of it. NaN fails every one of these.
    """
    sigma = torch.linalg.svdvals(jacobians.double())
    value, residual = norm.value.double(), norm.residual.double()
    assert value.shape == residual.shape == sigma[:, 0].shape
    if norm.converged:
        assert ((value - sigma[:, 0]).abs() <= rtol * sigma[:, 0]).all(), (value, sigma[:, 0])
    assert (value <= sigma[:, 0] * (1 + roundoff)).all(), (value, sigma[:, 0])
    nearest = (sigma - value[:, None]).abs().amin(dim=1)
    assert (nearest <= residual + roundoff * sigma[:, 0]).all(), (nearest, residual)


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
