r"""FreeU (Si, Huang, Jiang, Liu, CVPR 2024, arXiv:2309.11497) as a scaling scheme.

At the two coarsest resolutions of a decoder FreeU changes both operands of the merge, the skip
$u_i$ and the main operand $z_i$:

    u_i ↦ F_s(u_i)            s = s1 at the coarsest resolution, s2 at the next coarser
    z_i ↦ [b ⊙ z_i[: C/2], z_i[C/2 :]]        b = b1, b2; version 1: constant, version 2: a map

**The filter.** The published code multiplies the spectrum, zero frequency in the centre, by s on
the box of half width 1, and by 1 elsewhere, and keeps the real part of the way back. The box has
2×2 entries, the frequencies {-1, 0}×{-1, 0}: it is not symmetric, and taking the real part of a
real input's response replaces the gain g(k) by

    ĝ(k) = (g(k) + g(-k)) / 2:    s at (0,0),  (1+s)/2 at (0,±1), (±1,0), ±(1,1),  1 elsewhere

The seven entries are named once: -1 and 1 are one frequency on an axis of length 2, and -1, 0 and 1
are one on an axis of length 1. ĝ is what is applied here, on half the spectrum.

**Operator norm** on real inputs (**derived**; F_s is diagonal with eigenvalues ĝ): max_k |ĝ(k)|. It
is s for s ≥ 1, reached by constant maps. For s < 1 it is 1 on every map of 3×3 or more and on
those of 1×n and 2×n with n ≥ 4, even or odd, because some frequency is outside the box: there
FreeU damps the smooth part of a skip but not the worst case, and no s < 1 makes the bound of
Theorem 3.4 smaller. It is (1+s)/2 on 1×3 and 2×3, and s on 1×1, 1×2 and 2×2.

**Backbone.** Version 1 is the paper's first: b is a number. Version 2 is the later published one:
b(p) = (b-1) m(p) + 1, with m(p) the mean of z over channels at position p, moved and scaled to
[0, 1] in each sample. The boost has no place in Eq. 4, so theorems that speak of κ alone do not
cover it.

**Stages** are told apart by resolution, which the skips' shapes give. `enable_freeu` of diffusers,
which has version 1 alone, takes the first two decoder blocks instead: the same skips and the same
numbers where every block has a resolution of its own, as in Stable Diffusion. The published code
boosts where z has 1280 or 640 channels: in Stable Diffusion that reaches into the two finer blocks
as well, so that its numbers differ from those of diffusers and from these. A factor of 0 is 0 here;
diffusers turns FreeU off where a factor is 0.

Limits: feature maps with two spatial dimensions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.connection import SkipConnection
from stability_probe.skips.scaling import Scaling


class FreeU(Scaling):
    """FreeU: a Fourier filter on the skip, and a boost of the main operand, at two resolutions.

    The defaults are the authors' values for Stable Diffusion 1.5; for 1.4 and XL they give b1 = 1.3
    and b2 = 1.4, for 2.1 b1 = 1.4 and b2 = 1.6, with the same s1 and s2.

    Args:
        b1: boost of the main operand at the coarsest resolution.
        b2: boost at the next coarser one.
        s1: gain of the skip's low frequencies at the coarsest resolution.
        s2: gain at the next coarser one.
        version: 1, a constant boost, or 2, a boost that follows the feature map.

    Raises:
        StabilityProbeError: if a factor is negative or not finite, or the version is neither.

    >>> scheme = FreeU(s1=0.25)
    >>> scheme.s, scheme.coefficients(3)
    ((0.25, 0.2), None)
    >>> constant = torch.ones(1, 1, 4, 4)  # all of it is at zero frequency
    >>> torch.allclose(fourier_filter(constant, 0.25), 0.25 * constant)
    True
    """

    unmet = "its gain depends on frequency, and it boosts the decoder features as well"

    def __init__(
        self,
        b1: float = 1.5,
        b2: float = 1.6,
        s1: float = 0.9,
        s2: float = 0.2,
        version: int = 1,
    ) -> None:
        super().__init__()
        for name, factor in (("b1", b1), ("b2", b2), ("s1", s1), ("s2", s2)):
            if not (math.isfinite(factor) and factor >= 0):
                raise StabilityProbeError(
                    f"freeu: {name} must be a finite number ≥ 0, got {factor:g}"
                )
        if version not in (1, 2):
            raise StabilityProbeError(f"freeu: version must be 1 or 2, got {version}")
        self.b, self.s, self.version = (b1, b2), (s1, s2), version
        self.name = "freeu"
        self._stages: dict[int, int | None] = {}

    def coefficients(self, n_skips: int) -> list[float] | None:
        """`None`: the gain depends on the frequency."""
        return None

    def prepare(self, skips: Sequence[SkipConnection]) -> None:
        """Find which skips have the coarsest and the next coarser resolution.

        Raises:
            StabilityProbeError: if a skip is no feature map with two spatial dimensions, or the
                scheme was made for skips at other stages.
        """
        for skip in skips:
            if len(skip.shape) != 3:
                raise StabilityProbeError(
                    "freeu: needs feature maps with two spatial dimensions, shape (C, H, W); "
                    f"skip {skip.level} has shape {skip.shape}: choose another scheme"
                )
        sizes = sorted({s.shape[1:] for s in skips}, key=lambda size: (math.prod(size), size))
        number = {size: stage for stage, size in enumerate(sizes[:2])}
        stages = {s.level: number.get(s.shape[1:]) for s in skips}
        if self._stages not in ({}, stages):
            raise StabilityProbeError(
                "freeu: this scheme was prepared for other skips; make one for each model"
            )
        self._stages = stages

    def stage(self, level: int) -> int | None:
        """0 for a skip of the coarsest resolution, 1 of the next coarser, `None` for the others.

        Raises:
            StabilityProbeError: if the scheme was not prepared for this level.
        """
        if level not in self._stages:
            raise StabilityProbeError(
                f"freeu: level {level} is unknown; call prepare(skips), as scale_skips does, first"
            )
        return self._stages[level]

    def forward(self, u: Tensor, level: int) -> Tensor:
        """F_s(u_i); u_i itself where s is 1 and at the finer resolutions."""
        stage = self.stage(level)
        return u if stage is None else fourier_filter(u, self.s[stage])

    def backbone(self, z: Tensor, level: int) -> Tensor:
        """z_i with its first half of channels boosted; z_i itself where b is 1 and at the finer."""
        stage = self.stage(level)
        return z if stage is None else boost(z, self.b[stage], self.version)

    def operator_norm(self, level: int, spatial: tuple[int, int]) -> float:
        """max ‖F_s(u)‖/‖u‖ over real maps u of this height and width; 1 at finer stages."""
        stage = self.stage(level)
        return 1.0 if stage is None else float(real_gain(*spatial, self.s[stage]).abs().max())


def real_gain(height: int, width: int, s: float) -> Tensor:
    """ĝ of the module's docstring, float64, zero frequency first.

    >>> real_gain(4, 4, 0.0)
    tensor([[0.0000, 0.5000, 1.0000, 0.5000],
            [0.5000, 0.5000, 1.0000, 1.0000],
            [1.0000, 1.0000, 1.0000, 1.0000],
            [0.5000, 1.0000, 1.0000, 0.5000]], dtype=torch.float64)
    """
    low = [torch.arange(n) % n >= n - 1 for n in (height, width)]  # the frequency -1
    for axis in low:
        axis[0] = True
    gain = torch.ones(height, width, dtype=torch.float64)
    gain[torch.outer(*low)] = s
    mirrored = gain.flip(0, 1).roll((1, 1), (0, 1))  # g(-k)
    return (gain + mirrored) / 2


def fourier_filter(u: Tensor, s: float) -> Tensor:
    """F_s(u) over the last two dimensions, in the dtype of `u`; u itself if s is 1.

    Half precisions are filtered in float32: their transforms exist for few sizes and devices.
    """
    if s == 1:
        return u
    height, width = u.shape[-2:]
    work = u if u.dtype in (torch.float32, torch.float64) else u.float()
    gain = real_gain(height, width, s)[:, : width // 2 + 1].to(work)
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(work) * gain, s=(height, width))
    return filtered.to(u.dtype)


def boost(z: Tensor, b: float, version: int) -> Tensor:
    """Z with the first half of its channels times b (version 1) or b(p) (version 2).

    Where the channel mean is the same at every position, m is 0 and z keeps its values; the
    published code divides 0 by 0 there.

    >>> boost(torch.ones(1, 3, 1, 1), 2.0, version=1).flatten()
    tensor([2., 1., 1.])
    """
    if b == 1:
        return z
    half = z.shape[1] // 2
    factor: Tensor | float = b if version == 1 else (b - 1) * _relative_mean(z) + 1
    return torch.cat([z[:, :half] * factor, z[:, half:]], dim=1)


def _relative_mean(z: Tensor) -> Tensor:
    """m: the mean over channels, moved and scaled to [0, 1] in each sample."""
    mean = z.mean(dim=1, keepdim=True)
    positions = tuple(range(1, z.ndim))
    low, high = mean.amin(positions, keepdim=True), mean.amax(positions, keepdim=True)
    width = high - low
    return (mean - low) / torch.where(width > 0, width, torch.ones_like(width))
