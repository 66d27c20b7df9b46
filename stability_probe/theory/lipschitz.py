r"""Global Lipschitz constants of layers: what Theorem 3.4 needs to hold everywhere.

A constant is *certified* here if it is proved for every pair of inputs, in the Euclidean norm of a
whole feature (all channels and positions of a sample), up to float64 rounding. Such constants
multiply along a composition, add over a sum, and the root of their squares' sum is that of a
concatenation.

**Linear maps.** The constant is the spectral norm.

**Convolutions.** A convolution with zero padding is the crop of a circular one, applied to its
input with zeros around it. Neither crop nor zeros increase a norm, so the circular convolution's
norm is an upper bound; and it is known exactly (Sedghi, Gupta & Long, *The Singular Values of
Convolutional Layers*, ICLR 2019): the Fourier transform makes it block-diagonal, one matrix

$$\hat W(f) = \sum_k W_k\,e^{2\pi i\langle f, k\rangle}, \qquad C_{out} \times C_{in},$$

for each frequency of the grid, and the norm is the largest of theirs. A grid of n + padding
positions a dimension is enough for what is cropped away to be all that wraps around.

* A stride s takes the input's $s^d$ phases apart: as channels of their own, the convolution has
  stride 1 (polyphase form).
* A dilation puts zeros between the entries of the kernel.
* Groups are independent, so the norm is the largest of theirs.

The bound is exact where nothing is cropped and no zeros are read (a kernel as large as its stride,
1×1 kernels among them). Elsewhere the border makes the true norm smaller, the more so the smaller
the input: for random 3×3 kernels the bound was too large by 1 % at 16×16, 2–7 % at 8×8, 10–20 % at
4×4, and by a factor of 1.5 at 2×2 and 3–4 at 1×1.

**Not here.** Normalisation by the sample's own statistics and attention have no global constant;
SiLU and GELU have one, but above 1.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Sizes = int | Sequence[int]
"""One number for every dimension, or one for each."""

ACTIVATION_CONSTANTS: Mapping[str, float] = MappingProxyType(
    {
        "abs": 1.0,  # |d| = 1
        "clamp": 1.0,  # projections onto an interval: d is 0 or 1
        "clamp_max": 1.0,
        "clamp_min": 1.0,
        "hardtanh": 1.0,
        "relu": 1.0,
        "relu6": 1.0,
        "sigmoid": 0.25,  # d = s(1 - s) with s in (0, 1), largest at s = 1/2
        "tanh": 1.0,  # d = 1 - tanh² <= 1
    }
)
"""sup|d|, d the derivative, of functions that act on every entry by itself."""

_CHUNK = 2**22
"""Complex numbers that the matrices of some frequencies together may have (64 MiB)."""


def leaky_relu_constant(slope: float) -> float:
    """Lipschitz constant of max(0, x) + slope · min(0, x).

    >>> leaky_relu_constant(0.01), leaky_relu_constant(-2.0)
    (1.0, 2.0)
    """
    return max(1.0, abs(slope))


def elu_constant(alpha: float, scale: float = 1.0, input_scale: float = 1.0) -> float:
    """Lipschitz constant of scale · x for x > 0, scale · alpha (exp(input_scale x) − 1) below.

    The derivative is `scale` above 0 and `scale · alpha · input_scale · exp(input_scale x)` below,
    which is largest next to 0 if `input_scale` is not negative.

    Raises:
        ValueError: if `input_scale` is negative, which leaves the function without a constant.

    >>> elu_constant(1.0), elu_constant(2.0)
    (1.0, 2.0)
    """
    if input_scale < 0:
        raise ValueError(f"elu: input_scale must not be negative, got {input_scale}")
    return max(abs(scale), abs(scale * alpha * input_scale))


def linear_norm(weight: Float[Tensor, "*batch out in"]) -> float:
    r"""$\sigma_{\max}(W)$, by a dense singular value decomposition in float64.

    Args:
        weight: the matrix; of several, the largest norm is returned. NaN if it is not finite.

    >>> linear_norm(torch.diag(torch.tensor([3.0, -4.0])))
    4.0
    """
    if not weight.numel():
        return 0.0
    if not weight.isfinite().all():
        return math.nan
    return float(torch.linalg.matrix_norm(weight.detach().double().cpu(), ord=2).max())


def convolution_norm(
    weight: Float[Tensor, "out in_per_group *kernel"],
    input_size: Sequence[int],
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> float:
    r"""An upper bound of the norm of a convolution with zero padding, in 1, 2 or 3 dimensions.

    A transposed convolution is the adjoint of a convolution, with the same norm: pass its weight
    as it is, and the size of its *output*.

    Args:
        weight: as `torch.nn.functional.conv2d` takes it.
        input_size: the spatial size of the input, without padding.
        stride: one number or one a dimension; so are the next two.
        padding: zeros on each side, the larger number where the sides differ.
        dilation: distance of kernel entries.
        groups: number of groups.

    Raises:
        ValueError: if the number of dimensions does not fit the weight.

    A difference of neighbours at most doubles; on a ring of 4 it does, on a line it falls short:

    >>> difference = torch.tensor([[[1.0, -1.0]]])
    >>> convolution_norm(difference, [4])
    2.0
    """
    if not weight.isfinite().all():
        return math.nan
    d = weight.ndim - 2
    stride, padding, dilation = (_each(v, d) for v in (stride, padding, dilation))
    if len(input_size) != d or d < 1:
        raise ValueError(
            f"convolution_norm: a weight of shape {tuple(weight.shape)} needs {d} input sizes, "
            f"got {tuple(input_size)}"
        )
    kernel = _stuffed(weight.detach().double().cpu(), dilation)
    grid = [
        max(math.ceil((n + p) / s), (n + 2 * p - k) // s + 1)
        for n, k, s, p in zip(input_size, kernel.shape[2:], stride, padding, strict=True)
    ]
    return _circular_norm(_polyphase(kernel, stride).unflatten(0, (groups, -1)), grid)


def average_pooling_norm(kernel: Sequence[int], stride: Sequence[int]) -> float:
    r"""An upper bound of the norm of average pooling, exact where windows tile the input.

    The entries of its matrix are $1/\prod k$, each row has at most $\prod k$ of them and each
    column at most $\prod\lceil k/s\rceil$, and $\|A\|^2 \le \|A\|_1\|A\|_\infty$.

    >>> average_pooling_norm([2, 2], [2, 2])
    0.5
    """
    return math.sqrt(_overlap(kernel, stride) / math.prod(kernel))


def max_pooling_constant(kernel: Sequence[int], stride: Sequence[int]) -> float:
    r"""A Lipschitz constant of maximum pooling, the smallest one where windows do not overlap.

    Two maxima differ by no more than some pair of entries of the window, and an entry lies in at
    most $\prod\lceil k/s\rceil$ windows.

    >>> max_pooling_constant([2, 2], [2, 2]), max_pooling_constant([3, 3], [2, 2])
    (1.0, 2.0)
    """
    return math.sqrt(_overlap(kernel, stride))


def _overlap(kernel: Sequence[int], stride: Sequence[int]) -> int:
    """The most windows that an entry lies in."""
    return math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True))


def _each(value: Sizes, d: int) -> Sequence[int]:
    return (value,) * d if isinstance(value, int) else value


def _stuffed(kernel: Tensor, dilation: Sequence[int]) -> Tensor:
    """A kernel with dilation − 1 zeros between its entries."""
    sizes = [step * (k - 1) + 1 for k, step in zip(kernel.shape[2:], dilation, strict=True)]
    stuffed = kernel.new_zeros(*kernel.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, step) for step in dilation))
    stuffed[places] = kernel
    return stuffed


def _polyphase(kernel: Tensor, stride: Sequence[int]) -> Tensor:
    """The kernel of the same map with stride 1 on the phases of the input as channels."""
    missing = [-k % s for k, s in zip(kernel.shape[2:], stride, strict=True)]
    padded = F.pad(kernel, [n for m in reversed(missing) for n in (0, m)])
    for axis, s in enumerate(stride, start=2):  # each phase joins the channels
        phases = padded.unflatten(axis, (-1, s)).movedim(axis + 1, 2)
        padded = phases.flatten(1, 2)
    return padded


def _circular_norm(kernel: Float[Tensor, "groups out in *kernel"], grid: Sequence[int]) -> float:
    """The largest norm over frequencies; real kernels have the same one at f and −f."""
    sizes = kernel.shape[3:]
    used = [n if k > 1 else 1 for n, k in zip(grid, sizes, strict=True)]  # others change nothing
    used[-1] = used[-1] // 2 + 1
    axes = [torch.arange(n, dtype=torch.float64) / full for n, full in zip(used, grid, strict=True)]
    frequencies = torch.cartesian_prod(*axes).reshape(-1, len(grid))
    positions = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(grid)).double()
    flat = kernel.flatten(3).to(torch.complex128)
    chunk = max(1, _CHUNK // flat[..., 0].numel())
    norms = [
        _largest_norm(torch.einsum("goik,fk->fgoi", flat, _phases(some, positions)))
        for some in frequencies.split(chunk)
    ]
    return max(norms, default=0.0)


def _phases(frequencies: Tensor, positions: Tensor) -> Tensor:
    angles = 2 * math.pi * frequencies @ positions.T
    return torch.polar(torch.ones_like(angles), angles)


def _largest_norm(matrices: Float[Tensor, "*batch out in"] | Tensor) -> float:
    """The largest spectral norm, from the smaller of the two Gram matrices."""
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    gram = matrices @ matrices.mH
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram).max())))
