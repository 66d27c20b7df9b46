r"""Largest singular values of Jacobians, matrix-free and for every sample at once.

A network that treats samples independently (no batch statistics) has a block-diagonal Jacobian
over the batch, so one product with $J$ or $J^\top$ serves all samples, and the Golub–Kahan–Lanczos
recurrence runs on each of them side by side.

**Estimate.** Golub–Kahan bidiagonalisation with full reorthogonalisation builds
$J V_k = U_k B_k$. The largest singular value $\theta$ of the small bidiagonal $B_k$ never exceeds
$\sigma_{\max}(J)$.

**Certificate** (derived; after Hochstenbach 2013, *Probabilistic upper bounds for the matrix
two-norm*). The recurrence defines polynomials with $v_{j+1} = p_j(J^\top J)\,v_1$, orthonormal
with respect to the spectrum as $v_1$ weighs it. With $\gamma$ the component of $v_1$ along the
leading right singular vector, any $q$ of degree at most $k$ has
$\gamma^2 q(\sigma_{\max}^2)^2 \le \|q(J^\top J)v_1\|^2$; the sharpest choice,
$q = \sum_j p_j(\sigma_{\max}^2)\,p_j$, gives

$$K(\sigma_{\max}^2) := \sum_{j=0}^{k} p_j(\sigma_{\max}^2)^2 \le 1/\gamma^2.$$

$K$ rises steeply beyond $\theta^2$. For $v_1$ uniform on the sphere of $\mathbb{R}^n$, $\gamma^2$
is $Beta(\tfrac12, \tfrac{n-1}2)$, so $\gamma^2 \ge \delta^2$, its quantile at `failure`, with
probability $1 -$ `failure`; then $\sigma_{\max}$ is at most the root of $K(t^2) = 1/\delta^2$. The
probability is over the start alone and holds for every matrix; rounding is left out. Iteration
stops when that root is within `rtol` of $\theta$. That an estimate has stopped changing, or that
its residual is small (some singular value is near, not the largest), says neither.

**Products.** On one retained graph, $J^\top w$ is a backward pass and $J v$ a backward pass through
that backward pass ($J^\top w$ is linear in $w$). No forward-mode rule is needed, which fused
attention and some normalisation layers lack, and the pass itself is not repeated; fused attention
lacks a second derivative too, so build the graph under
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`. Where only products with $J$ are to be had,
`golub_kahan_norm` takes any pair of functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import betaincinv
from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]

FAILURE = 1e-3
"""Probability, over the start, that an upper bound lies below the true value."""
BISECTIONS = 24
"""Halvings of the logarithm of an upper bound that is searched for."""


@dataclass(frozen=True)
class SpectralNorm:
    """Largest singular values, enclosed.

    Attributes:
        value: the estimates, shape (batch,); each at most the true value.
        upper: upper bounds, shape (batch,), each right with probability 1 - `failure`.
        right: unit right singular vectors of the estimates, shape (batch, n).
        left: unit left singular vectors, shape (batch, m).
        products: pairs of products with J and its transpose that were spent.
        converged: whether every upper bound is within the tolerance of its estimate.
    """

    value: Float[Tensor, " batch"]
    upper: Float[Tensor, " batch"]
    right: Float[Tensor, "batch n"]
    left: Float[Tensor, "batch m"]
    products: int
    converged: bool


def golub_kahan_norm(
    matvec: LinearMap,
    rmatvec: LinearMap,
    start: Float[Tensor, "batch n"],
    *,
    rtol: float = 1e-2,
    failure: float = FAILURE,
    max_products: int = 100,
    noise: Float[Tensor, " batch"] | float = 0.0,
) -> SpectralNorm:
    r"""$\sigma_{\max}$ of a batch of linear maps by Golub–Kahan–Lanczos, with a certificate.

    Args:
        matvec: $v \mapsto A v$, from (batch, n) to (batch, m).
        rmatvec: $u \mapsto A^\top u$, from (batch, m) to (batch, n).
        start: the starting vectors, drawn from a standard normal distribution for the certificate
            to mean what it says.
        rtol: stop when every upper bound is at most 1 + `rtol` times its estimate.
        failure: probability with which an upper bound may be too small.
        max_products: the largest number of product pairs to spend.
        noise: what rounding alone may make of products with unit vectors.

    Returns:
        Estimates and upper bounds. A map that yields NaN or Inf gives NaN for its sample.

    Raises:
        ValueError: if the two maps are not each other's transpose.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    >>> apply = lambda v: (A @ v[..., None])[..., 0]
    >>> norm = golub_kahan_norm(apply, apply, torch.ones(1, 3))
    >>> round(float(norm.value), 4), round(float(norm.upper), 4)
    (3.0, 3.0)
    """
    n, given = start.shape[1], start.dtype
    dtype = torch.promote_types(given, torch.float32)  # half precision would end it too early
    start = start.to(dtype)
    nothing = torch.zeros_like(start[:, 0])
    right = [_unit(start, nothing)[0]]
    left: list[Tensor] = []
    small = _Bidiagonal(certain=_component_quantile(n, failure))
    scale = nothing
    for k in range(1, min(max_products, n) + 1):
        u, alpha = _unit(_orthogonal(matvec(right[-1].to(given)).to(dtype), left), scale)
        scale = torch.maximum(scale, alpha)
        back = rmatvec(u.to(given)).to(dtype)
        if k == 1:
            _check_adjoint(back, right[0], alpha, torch.finfo(given).eps, noise)
        v, beta = _unit(_orthogonal(back, right), scale)
        left.append(u)
        small.add(alpha, beta if k < n else nothing)  # n directions leave no other
        if small.settled(rtol):
            break
        right.append(v)
    upper = small.upper(rtol)
    p, sigma, q = small.leading()
    return SpectralNorm(
        value=torch.as_tensor(sigma).to(nothing),
        upper=torch.as_tensor(upper).to(nothing),
        right=_combined(right[:k], q),
        left=_combined(left, p),
        products=k,
        converged=small.settled(rtol),
    )


def jacobian_norm(
    output: Tensor,
    input: Tensor,
    *,
    generator: torch.Generator,
    via: Tensor | None = None,
    samples: int | None = None,
    rtol: float = 1e-2,
    failure: float = FAILURE,
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
        rtol: how far an upper bound may lie above its estimate, relatively.
        failure: probability with which an upper bound may be too small.
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
    samples = len(input) if samples is None else samples
    matvec, rmatvec = jacobian_products(output, input, via=via, samples=samples)
    start: Tensor = torch.randn(input.shape, generator=generator, dtype=input.dtype).to(
        input.device
    )
    start = start.reshape(samples, -1)
    # A derivative can be finite where the function is not (a ReLU's at NaN): that is no norm.
    for tensor in (input, output):
        lost = ~tensor.detach().reshape(samples, -1).isfinite().all(dim=1)
        start = start.masked_fill(lost[:, None], torch.nan)
    # Where large derivatives cancel, what is left is known to the rounding of those.
    sizes = [t.detach().reshape(samples, -1).norm(dim=1) for t in (output, input)]
    noise = 4 * torch.finfo(start.dtype).eps * sizes[0] / sizes[1]
    return golub_kahan_norm(
        matvec, rmatvec, start, rtol=rtol, failure=failure, max_products=max_products,
        noise=noise.nan_to_num(0.0, 0.0),
    )  # fmt: skip


def jacobian_products(
    output: Tensor, input: Tensor, *, via: Tensor | None = None, samples: int | None = None
) -> tuple[LinearMap, LinearMap]:
    r"""$v \mapsto Jv$ and $w \mapsto J^\top w$ for every sample of a retained graph.

    Args:
        output: see `jacobian_norm`.
        input: see there.
        via: see there.
        samples: see there.

    Returns:
        Two functions, from (samples, n) to (samples, m) and back.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> push, pull = jacobian_products(x.sum(dim=1, keepdim=True), x)
    >>> push(torch.ones(2, 3)).tolist(), pull(torch.ones(2, 1)).tolist()
    ([[3.0], [3.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    """
    stops = (output, input) if via is None else (output, via, input)
    rows = len(input) if samples is None else samples

    def pulled(covector: Tensor, create_graph: bool) -> Tensor:
        for later, earlier in pairwise(stops):
            (covector,) = torch.autograd.grad(
                later, earlier, covector, retain_graph=True, create_graph=create_graph
            )
        return covector

    covector = torch.zeros_like(output, requires_grad=True)
    pullback = pulled(covector, True)

    def push(v: Tensor) -> Tensor:
        (jv,) = torch.autograd.grad(pullback, covector, v.view_as(input), retain_graph=True)
        return jv.reshape(rows, -1)

    def pull(w: Tensor) -> Tensor:
        return pulled(w.view_as(output), False).reshape(rows, -1)

    return push, pull


def _check_adjoint(
    back: Tensor, v: Tensor, alpha: Tensor, eps: float, noise: Tensor | float
) -> None:
    r"""Compare $\langle A^\top u, v\rangle$ with $\langle u, Av\rangle$, for $u = Av / \alpha$."""
    found = (back * v).sum(dim=1)
    tolerance = 4 * eps**0.5
    if ((found - alpha).abs() > tolerance * alpha + noise).any():
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


def _combined(basis: list[Tensor], weights: np.ndarray) -> Tensor:
    """Σ_j weights_j basis_j, per sample."""
    q = torch.stack(basis, dim=1)
    return torch.einsum("bkn,bk->bn", q, torch.as_tensor(weights).to(q))


def _component_quantile(n: int, failure: float) -> float:
    r"""δ²: what $\gamma^2$ of a uniform direction in $\mathbb{R}^n$ exceeds but for `failure`.

    >>> round(_component_quantile(2, 0.5), 4)  # the angle is uniform: cos² of 45°
    0.5
    """
    return float(betaincinv(0.5, (n - 1) / 2, failure)) if n > 1 else 1.0


class _Bidiagonal:
    """The matrices B_k of all samples as they grow, and what they say of the largest value.

    Args:
        certain: δ², which γ² is taken to exceed.
    """

    def __init__(self, certain: float) -> None:
        self._enough = 1 / certain
        self._alphas: list[np.ndarray] = []
        self._betas: list[np.ndarray] = []
        self._value = np.empty(0)

    def add(self, alpha: Tensor, beta: Tensor) -> None:
        """One more product pair."""
        self._alphas.append(alpha.double().cpu().numpy())
        self._betas.append(beta.double().cpu().numpy())
        self._value = self.leading()[1]

    def leading(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Left vectors (batch, k), largest singular values (batch,), right vectors (batch, k)."""
        diagonal, above = np.stack(self._alphas, axis=1), np.stack(self._betas, axis=1)[:, :-1]
        k = diagonal.shape[1]
        matrix = np.zeros((len(diagonal), k, k))
        matrix[:, range(k), range(k)] = diagonal
        matrix[:, range(k - 1), range(1, k)] = above
        finite = np.isfinite(matrix).all(axis=(1, 2)) & np.isfinite(self._betas[-1])
        p, sigma, q = np.linalg.svd(np.where(finite[:, None, None], matrix, 0.0))
        return p[:, :, 0], np.where(finite, sigma[:, 0], np.nan), q[:, 0, :]

    def settled(self, rtol: float) -> bool:
        """Whether every upper bound is within `rtol` of its estimate, or there is none."""
        return bool((self._certified((1 + rtol) * self._value) | np.isnan(self._value)).all())

    def upper(self, rtol: float) -> np.ndarray:
        r"""The roots of $K(t^2) = 1/\delta^2$, from above, (batch,); infinite beyond e³⁰θ."""
        low = np.zeros_like(self._value)  # logarithms of t/θ
        high = np.where(self._certified((1 + rtol) * self._value), np.log1p(rtol), 30.0)
        known = self._certified(np.exp(high) * self._value)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = self._certified(np.exp(middle) * self._value)
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return np.where(known | np.isnan(self._value), np.exp(high) * self._value, np.inf)

    def _certified(self, t: np.ndarray) -> np.ndarray:
        r"""Whether $K(t^2) \ge 1/\delta^2$, for t above the estimate."""
        total, p, before = np.ones_like(t), np.ones_like(t), np.zeros_like(t)
        scale = np.maximum(self._value, np.finfo(float).tiny)
        came, last = np.zeros_like(t), np.zeros_like(t)
        for alpha, beta in zip(self._alphas, self._betas, strict=True):
            a, b = alpha / scale, beta / scale
            on = a * b
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                ahead = (((t / scale) ** 2 - a**2 - last**2) * p - came * before) / on
                total = np.where((on == 0) | np.isinf(total), np.inf, total + ahead**2)
            p, before, came, last = np.clip(ahead, 0, 1e150), p, on, b
        return np.asarray(total >= self._enough)
