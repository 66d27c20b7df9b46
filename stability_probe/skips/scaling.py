r"""Scaling schemes: what multiplies the encoder feature $u_i$ at the merge.

| scheme | $\kappa_i$ | source |
|---|---|---|
| `Unscaled` | $1$ | the standard UNet |
| `InverseSqrt2` | $1/\sqrt 2$ | Imagen, SR3, score-SDE; "1/√2-CS" in ScaleLong |
| `Uniform(c)` | $c \ge 0$ | c = 0 removes every long skip |
| `ConstantScaling(kappa)` | $\kappa^{i-1}$ | CS of ScaleLong; the outermost skip keeps 1 |
| `FixedScaling([...])` | any | as `stability-probe suggest` finds them |
| `LearnableScaling()` | a gate in (0, 1) computed from $u_i$ | LS of ScaleLong |

FreeU and SC-Tuner have modules of their own, `freeu` and `sc_tuner`; `names` has the names of all.
A scheme is an `nn.Module` called as `scheme(u, level)`; `scale_skips` puts it into a model.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.connection import SkipConnection


class Scaling(nn.Module):
    """Base of all schemes.

    Attributes:
        name: what the command line calls the scheme, e.g. `"cs:0.7"`.
        unmet: why the theorems do not literally apply to it, as they need a κ_i; `None` if they do.
    """

    name: str
    unmet: str | None = None

    def coefficients(self, n_skips: int) -> list[float] | None:
        """κ_1..κ_N where they are constants, `None` where they depend on the input."""
        raise NotImplementedError

    def prepare(self, skips: Sequence[SkipConnection]) -> None:
        """Make the scheme's parameters, now that the skips' shapes are known."""

    def forward(self, u: Tensor, level: int) -> Tensor:
        """The scaled u_i, i = `level`."""
        raise NotImplementedError

    def backbone(self, z: Tensor, level: int) -> Tensor:
        """What becomes of z_i, the other operand of the merge: nothing, but in FreeU."""
        return z


class _Constant(Scaling):
    """Schemes whose κ_i depends on the level alone."""

    def kappa(self, level: int) -> float:
        """κ_i at a level."""
        raise NotImplementedError

    def coefficients(self, n_skips: int) -> list[float] | None:
        """κ_1..κ_N."""
        return [self.kappa(level) for level in range(1, n_skips + 1)]

    def forward(self, u: Tensor, level: int) -> Tensor:
        """κ_i u_i; u_i itself, untouched, where κ_i is 1."""
        kappa = self.kappa(level)
        return u if kappa == 1 else u * kappa


class Uniform(_Constant):
    """The same κ_i = c at every level.

    Raises:
        StabilityProbeError: if c is negative or not finite.

    >>> Uniform(0.5).coefficients(3)
    [0.5, 0.5, 0.5]
    """

    def __init__(self, c: float) -> None:
        super().__init__()
        if not (math.isfinite(c) and c >= 0):
            raise StabilityProbeError(f"uniform scaling: κ must be a finite number ≥ 0, got {c:g}")
        self.c = c
        self.name = f"uniform:{c:g}"

    def kappa(self, level: int) -> float:
        """C at every level."""
        return self.c


class Unscaled(Uniform):
    """The standard network, κ_i = 1."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.name = "unscaled"


class InverseSqrt2(Uniform):
    """κ_i = 1/√2, which keeps the variance of a sum of two equal variances."""

    def __init__(self) -> None:
        super().__init__(2**-0.5)
        self.name = "inverse-sqrt2"


class ConstantScaling(_Constant):
    """CS: κ_i = κ^(i-1), so that deeper skips are scaled more and the outermost not at all.

    Args:
        kappa: the base κ ∈ (0, 1]; ScaleLong advises 0.5 to 0.95.

    Raises:
        StabilityProbeError: if κ is outside (0, 1].

    >>> ConstantScaling(kappa=0.5).coefficients(3)
    [1.0, 0.5, 0.25]
    """

    def __init__(self, kappa: float) -> None:
        super().__init__()
        if not 0 < kappa <= 1:
            raise StabilityProbeError(f"cs scaling: κ must lie in (0, 1], got {kappa:g}")
        self.base = kappa
        self.name = f"cs:{kappa:g}"

    def kappa(self, level: int) -> float:
        """κ^(level - 1)."""
        return float(self.base ** (level - 1))


class FixedScaling(_Constant):
    """Any κ_1..κ_N, the outermost first.

    Args:
        kappa: one number a skip.

    Raises:
        StabilityProbeError: if one is negative or not finite, there is none, or, when the scheme
            is put into a model, it has another number of skips.

    >>> FixedScaling([1.0, 0.8, 0.5]).name
    'kappa:1,0.8,0.5'
    """

    def __init__(self, kappa: Sequence[float]) -> None:
        super().__init__()
        if not kappa or not all(math.isfinite(k) and k >= 0 for k in kappa):
            raise StabilityProbeError(
                f"kappa scaling: needs finite numbers ≥ 0, one a skip, got {list(kappa)}"
            )
        self.values = list(kappa)
        self.name = "kappa:" + ",".join(f"{k:g}" for k in kappa)

    def prepare(self, skips: Sequence[SkipConnection]) -> None:
        """Check that there is one κ for every skip."""
        self.coefficients(len(skips))

    def coefficients(self, n_skips: int) -> list[float] | None:
        """κ_1..κ_N."""
        if n_skips != len(self.values):
            raise StabilityProbeError(
                f"{self.name}: has {len(self.values)} numbers for {n_skips} skips; give one each, "
                "the outermost first"
            )
        return self.values

    def kappa(self, level: int) -> float:
        """κ_i at a level."""
        return self.values[level - 1]


class LearnableScaling(Scaling):
    r"""LS: κ_i is the output of a small calibration network on u_i itself, and is learned.

    The network squeezes and excites: $sigmoid(W_2\,relu(W_1 p + c_1) + c_2)$ with $p$ the pooled
    u_i, $W_1$ from n to n//r numbers and $W_2$ back.

    Tokens (batch, L, D) are averaged over D and gated per token, as ScaleLong does for U-ViT;
    feature maps (batch, C, ...) are averaged over positions and gated per channel, as in SENet.
    The parameter names are those of ScaleLong's code under `se`: `layer1`, `layer2` when one
    network serves all skips; `0.layer1`, ... when each skip has its own, the deepest skip being 0.

    Args:
        shared: one network for all skips. Where skips differ in size (conv UNets), one for each
            size, named by it: `size32.layer1`, ....
        reduction: r, the ratio of the gate's size to its hidden size.
        generator: source of the initial weights; `None` is seeded with 0.

    Raises:
        StabilityProbeError: if `reduction` is below 1.
    """

    def __init__(
        self,
        shared: bool = True,
        reduction: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if reduction < 1:
            raise StabilityProbeError(f"ls scaling: reduction must be at least 1, got {reduction}")
        self.shared, self.reduction = shared, reduction
        self.name = "ls" if shared else "ls-non-shared"
        self._seed = seed_from(generator)
        self._network_of: dict[int, str] = {}
        self._sizes: dict[int, int] = {}

    def coefficients(self, n_skips: int) -> list[float] | None:
        """`None`: the gates depend on the input."""
        return None

    def prepare(self, skips: Sequence[SkipConnection]) -> None:
        """Make the calibration networks; those that exist already are kept.

        Raises:
            StabilityProbeError: if the scheme was made for skips of other sizes.
        """
        generator = torch.Generator().manual_seed(self._seed)
        sizes = {s.level: s.shape[0] for s in skips}  # L of (L, D), or C of (C, ...)
        if self._sizes not in ({}, sizes):
            raise StabilityProbeError(
                "ls scaling: this scheme has gates for other skips; make one for each model"
            )
        self._sizes = sizes
        one_size = len(set(sizes.values())) == 1
        for level, size in sizes.items():
            shared = "" if one_size else f"size{size}"  # "": the layers are the scheme's own
            name = shared if self.shared else str(len(sizes) - level)
            known = dict(self.named_modules())
            network: Any = known[name] if name in known else nn.Module()
            self._network_of[level] = name
            if not hasattr(network, "layer1"):
                hidden = max(1, size // self.reduction)
                network.layer1 = linear_layer(size, hidden, generator)
                network.layer2 = linear_layer(hidden, size, generator)
            if network is not self:
                self.add_module(name, network)

    def gate(self, u: Tensor, level: int) -> Tensor:
        """κ_i(u), broadcastable to `u`."""
        pooled = u.flatten(2).mean(dim=2) if u.ndim > 2 else u
        network: Any = self.get_submodule(self._network_of[level])
        gate = torch.sigmoid(network.layer2(F.relu(network.layer1(pooled))))
        return gate.view(*gate.shape, *(1,) * (u.ndim - 2))

    def forward(self, u: Tensor, level: int) -> Tensor:
        """κ_i(u_i) u_i."""
        return u * self.gate(u, level)


def seed_from(generator: torch.Generator | None) -> int:
    """A seed to keep instead of a generator, which can be neither copied nor pickled."""
    return int(torch.randint(2**31, (), generator=generator)) if generator else 0


def linear_layer(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with PyTorch's own initial distribution, drawn from `generator`."""
    layer: nn.Linear = skip_init(nn.Linear, n_in, n_out)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(n_in**-0.5), n_in**-0.5, generator=generator)
    return layer
