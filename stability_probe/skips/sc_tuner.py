r"""SC-Tuner of SCEdit (Jiang et al., CVPR 2024, arXiv:2312.11392) as a scaling scheme.

A small residual network edits each skip, at every position by itself:

    T(u) = u + τ (W_2 GELU(W_1 u + c_1) + c_2),    W_1: C → C//r,   W_2: C//r → C

$W_2 = c_2 = 0$ at the start, so that T is the identity until it has learned; the gradient of W_2 is
not zero there. τ ∈ [0, 1] is the strength of the edit. T is no multiplication by a number: its gain
‖T(u)‖/‖u‖ is measured.

With r = 1, the default, the tuners of Stable Diffusion's twelve skips have 19.68 million numbers,
the count that the authors report.

Feature maps (C, H, W), and volumes, are edited along their channels; tokens (L, D) and vectors (m,)
along their last dimension. Limit: a sequence (C, L), as in a 1-D convolutional UNet, looks like
tokens and is edited along L.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.connection import SkipConnection
from stability_probe.skips.scaling import Scaling, linear_layer, seed_from


class SCTuner(Scaling):
    """SC-Tuner: one residual two-layer network a skip, the identity at the start.

    The parameter names are `1.layer1`, `1.layer2`, `2.layer1`, ..., by level.

    Args:
        strength: τ ∈ [0, 1]; 0 leaves every skip as it is.
        reduction: r, the ratio of a skip's width to the hidden width.
        generator: source of the initial weights; `None` is seeded with 0.

    Raises:
        StabilityProbeError: if `strength` is outside [0, 1] or `reduction` is below 1.

    >>> from stability_probe import TheoryUNet, find_skips, scale_skips
    >>> net, x = TheoryUNet(m=8, n_skips=2), torch.ones(1, 8)
    >>> before = net(x)
    >>> with scale_skips(net, find_skips(net, x), SCTuner(strength=0.5)):
    ...     torch.equal(net(x), before)
    True
    """

    unmet = "it edits u_i by a network, which is no multiplication by a number"

    def __init__(
        self,
        strength: float = 1.0,
        reduction: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= strength <= 1:
            raise StabilityProbeError(f"sc-tuner: strength must lie in [0, 1], got {strength:g}")
        if reduction < 1:
            raise StabilityProbeError(f"sc-tuner: reduction must be at least 1, got {reduction}")
        self.strength, self.reduction = strength, reduction
        self.name = "sc-tuner"
        self._seed = seed_from(generator)
        self._widths: dict[int, int] = {}

    def coefficients(self, n_skips: int) -> list[float] | None:
        """`None`: the gain depends on the input."""
        return None

    def prepare(self, skips: Sequence[SkipConnection]) -> None:
        """Make the tuners; those that exist already are kept.

        Raises:
            StabilityProbeError: if the scheme was made for skips of other sizes.
        """
        generator = torch.Generator().manual_seed(self._seed)
        widths = {s.level: s.shape[0] if len(s.shape) > 2 else s.shape[-1] for s in skips}
        if self._widths == widths:
            return
        if self._widths:
            raise StabilityProbeError(
                "sc-tuner: this scheme has tuners for other skips; make one for each model"
            )
        self._widths = widths
        for level, width in widths.items():
            tuner: Any = nn.Module()
            hidden = max(1, width // self.reduction)
            tuner.layer1 = linear_layer(width, hidden, generator)
            tuner.layer2 = linear_layer(hidden, width, generator)
            for parameter in tuner.layer2.parameters():
                nn.init.zeros_(parameter)
            self.add_module(str(level), tuner)

    def forward(self, u: Tensor, level: int) -> Tensor:
        """T(u_i); u_i itself where τ is 0.

        Raises:
            StabilityProbeError: if there is no tuner for this level.
        """
        if level not in self._widths:
            raise StabilityProbeError(
                f"sc-tuner: level {level} has no tuner; call prepare(skips), as scale_skips does, "
                "first"
            )
        if self.strength == 0:
            return u
        tuner: Any = self.get_submodule(str(level))
        channel = 1 if u.ndim > 3 else -1
        hidden = F.gelu(tuner.layer1(u.movedim(channel, -1)))
        edit: Tensor = tuner.layer2(hidden).movedim(-1, channel)
        return u + self.strength * edit
