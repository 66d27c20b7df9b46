r"""Largest singular values of Jacobians, matrix-free and for every sample at once.

A network that treats samples independently (no batch statistics) has a block-diagonal Jacobian
over the batch, so one product with $J$ or $J^\top$ serves all samples, and the Golub–Kahan–Lanczos
recurrence runs on each of them side by side.

**Method.** Golub–Kahan bidiagonalisation with full reorthogonalisation builds
$J V_k = U_k B_k$; the largest singular value $\theta$ of the small bidiagonal $B_k$ never exceeds
$\sigma_{\max}(J)$. With $p$ the left singular vector of $B_k$ that goes with $\theta$, the
residual $\|J^\top\tilde u - \theta\tilde v\| = \beta_k|p_k|$ is known for free, and some singular
value of $J$ lies within it of $\theta$. Iteration stops when residual $\le$ `rtol`
$\cdot\,\theta$, which says more than "the estimate stopped changing", and not before
`FEWEST_PRODUCTS`: a start that happens to be nearly orthogonal to the leading singular vector can
settle on another one for a few products, with a small residual.

**Products.** On one retained graph, $J^\top w$ is a backward pass and $J v$ a backward pass through
that backward pass ($J^\top w$ is linear in $w$). No forward-mode rule is needed, which fused
attention and some normalisation layers lack; fused attention lacks a second derivative too, so
build the graph under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]

FEWEST_PRODUCTS = 12
"""Product pairs before an estimate may count as settled, unless the map is smaller than that."""


@dataclass(frozen=True)
class SpectralNorm:
    """Largest singular values with what is known of their error.

    Attributes:
        value: the estimates, shape (batch,); each a lower bound of the true value.
        residual: the residual norms, shape (batch,), in the units of `value`.
        products: pairs of products with J and its transpose that were spent.
        converged: whether every residual met the tolerance.
    """

    value: Float[Tensor, " batch"]
    residual: Float[Tensor, " batch"]
    products: int
    converged: bool


def golub_kahan_norm(
    matvec: LinearMap,
    rmatvec: LinearMap,
    start: Float[Tensor, "batch n"],
    *,
    rtol: float = 1e-3,
    max_products: int = 100,
) -> SpectralNorm:
    r"""$\sigma_{\max}$ of a batch of linear maps by Golub–Kahan–Lanczos.

    Args:
        matvec: $v \mapsto A v$, from (batch, n) to (batch, m).
        rmatvec: $u \mapsto A^\top u$, from (batch, m) to (batch, n).
        start: the starting vectors, any non-zero length.
        rtol: stop when every residual is at most `rtol` times its estimate.
        max_products: the largest number of product pairs to spend.

    Returns:
        Estimates with residuals. A map that yields NaN or Inf gives NaN for its sample.

    Raises:
        ValueError: if the two maps are not each other's transpose.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    >>> apply = lambda v: (A @ v[..., None])[..., 0]
    >>> norm = golub_kahan_norm(apply, apply, torch.ones(1, 3))
    >>> round(float(norm.value), 4)
    3.0
    """
    right = [_unit(start, torch.zeros_like(start[:, 0]))[0]]
    left: list[Tensor] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    most = min(max_products, start.shape[1])
    value = torch.zeros_like(start[:, 0])
    while True:
        u, alpha = _unit(_orthogonal(matvec(right[-1]), left), value)
        left.append(u)
        alphas.append(alpha)
        back = rmatvec(u)
        if not betas:
            _check_adjoint(back, right[0], alpha)
        v, beta = _unit(_orthogonal(back, right), torch.maximum(value, alpha))
        right.append(v)
        value, residual = _ritz(alphas, betas, beta)
        betas.append(beta)
        settled = (residual <= rtol * value) | value.isnan()
        grown = len(alphas) >= min(FEWEST_PRODUCTS, most)
        if (grown and settled.all()) or len(alphas) >= most:
            return SpectralNorm(value, residual, len(alphas), bool(settled.all()))


def jacobian_norm(
    output: Tensor,
    input: Tensor,
    *,
    generator: torch.Generator,
    via: Tensor | None = None,
    samples: int | None = None,
    rtol: float = 1e-3,
    max_products: int = 100,
) -> SpectralNorm:
    r"""$\sigma_{\max}(\partial\,output/\partial\,input)$ for every sample of a retained graph.

    Args:
        output: a tensor (batch, ...) that depends on `input` through a differentiable graph.
        input: a tensor (batch, ...) of that graph; sample s of `output` may depend on sample s
            of `input` alone.
        via: a tensor of that graph, to take only the paths through it:
            $(\partial\,output/\partial\,via)(\partial\,via/\partial\,input)$.
        samples: how many samples the tensors' first dimension holds, one after the other, if each
            of them takes several entries of it (the frames of a video); `None`: one entry each.
        generator: CPU generator for the starting vectors.
        rtol: relative tolerance on the residual.
        max_products: the largest number of product pairs to spend.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> norm = jacobian_norm(2 * x, x, generator=torch.Generator().manual_seed(0))
    >>> norm.value.round(decimals=4).tolist()
    [2.0, 2.0]
    >>> part = 3 * x
    >>> norm = jacobian_norm(part + x, x, via=part, generator=torch.Generator().manual_seed(0))
    >>> norm.value.round(decimals=4).tolist()
    [3.0, 3.0]
    """
    stops = (output, input) if via is None else (output, via, input)

    def pull(covector: Tensor, create_graph: bool) -> Tensor:
        for later, earlier in pairwise(stops):
            (covector,) = torch.autograd.grad(
                later, earlier, covector, retain_graph=True, create_graph=create_graph
            )
        return covector

    covector = torch.zeros_like(output, requires_grad=True)
    pullback = pull(covector, True)

    samples = len(input) if samples is None else samples

    def matvec(v: Tensor) -> Tensor:
        (jv,) = torch.autograd.grad(pullback, covector, v.view_as(input), retain_graph=True)
        return jv.reshape(samples, -1)

    def rmatvec(u: Tensor) -> Tensor:
        jtu = pull(u.view_as(output), False)
        return jtu.reshape(samples, -1)

    start: Tensor = torch.randn(input.shape, generator=generator, dtype=input.dtype).to(
        input.device
    )
    start = start.reshape(samples, -1)
    # A derivative can be finite where the function is not (a ReLU's at NaN): that is no norm.
    for tensor in (input, output):
        lost = ~tensor.detach().reshape(samples, -1).isfinite().all(dim=1)
        start = start.masked_fill(lost[:, None], torch.nan)
    return golub_kahan_norm(matvec, rmatvec, start, rtol=rtol, max_products=max_products)


def _check_adjoint(back: Tensor, v: Tensor, alpha: Tensor) -> None:
    r"""Compare $\langle A^\top u, v\rangle$ with $\langle u, Av\rangle$, for $u = Av / \alpha$."""
    found = (back * v).sum(dim=1)
    tolerance = 4 * torch.finfo(v.dtype).eps ** 0.5
    if ((found - alpha).abs() > tolerance * alpha).any():
        raise ValueError(
            "products with a Jacobian and with its transpose do not belong together: an operation "
            "of the network has no derivative of its derivative, or a wrong one"
        )


def _unit(v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(v / |v|, |v|) per sample; what is rounding error beside `scale` counts as zero.

    A subspace that the map leaves alone ends the recurrence with a residue of rounding errors;
    normalised, it would be one more direction, and not orthogonal to the others.
    """
    floats = torch.finfo(v.dtype)
    largest = v.abs().amax(dim=1, keepdim=True).clamp_min(floats.tiny)
    scaled = v / largest  # so that no square underflows
    norm = torch.linalg.vector_norm(scaled, dim=1)
    unit = scaled / norm.clamp_min(floats.tiny)[:, None]
    length = norm * largest[:, 0]
    nothing = length <= floats.eps * scale
    return unit.masked_fill(nothing[:, None], 0.0), length.masked_fill(nothing, 0.0)


def _orthogonal(v: Tensor, basis: list[Tensor]) -> Tensor:
    """V less its projections on `basis`, twice, which is enough to working precision."""
    if not basis:
        return v
    q = torch.stack(basis, dim=1)
    for _ in range(2):
        v = v - torch.einsum("bkn,bk->bn", q, torch.einsum("bkn,bn->bk", q, v))
    return v


def _ritz(alphas: list[Tensor], betas: list[Tensor], last: Tensor) -> tuple[Tensor, Tensor]:
    """The largest singular value of the bidiagonal matrix, and its residual, per sample."""
    dtype = alphas[0].dtype
    bidiagonal = torch.diag_embed(torch.stack(alphas, 1))
    if betas:
        bidiagonal = bidiagonal + torch.diag_embed(torch.stack(betas, 1), offset=1)
    bidiagonal, end = bidiagonal.double().cpu(), last.double().cpu()
    finite = bidiagonal.isfinite().all(dim=(1, 2)) & end.isfinite()
    p, sigma, _ = torch.linalg.svd(torch.where(finite[:, None, None], bidiagonal, 0.0))
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    value = torch.where(finite, sigma[:, 0], nan)
    residual = torch.where(finite, end * p[:, -1, 0].abs(), nan)
    return value.to(last.device, dtype), residual.to(last.device, dtype)
