r"""The network of Eq. 4 of Huang et al. (2023), exactly: an MLP UNet of constant width.

    u_0 = x,  u_j = a_j(u_{j-1}),  z_N = f_N(u_N),  z_{j-1} = b_j(merge(z_j, κ_j u_j)),  output z_0

Every block is $W_2\,relu(W_1 v)$ without biases, so it is positively homogeneous and ends in a
zero-mean Gaussian linear map: the premises of the explicit law of `theory.huang2023_features`.
All weights are $\mathcal{N}(0, 2/m)$ (Kaiming), which gives a block mean-square gain 2; with
`unit_gain` the last layer is $\mathcal{N}(0, 1/m)$ and the gain is 1. A concatenating decoder
block reads $2m$ numbers with weights of the same variance $2/m$, so its gain per unit of merged
energy is the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from stability_probe.errors import StabilityProbeError


class MLPBlock(nn.Module):
    """W_2 relu(W_1 v), optionally with a final ReLU, which breaks a premise of the law."""

    def __init__(
        self, fan_in: int, m: int, unit_gain: bool, final_relu: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.layer1 = skip_init(nn.Linear, fan_in, m, bias=False)
        self.layer2 = skip_init(nn.Linear, m, m, bias=False)
        self.final_relu = final_relu
        with torch.no_grad():
            self.layer1.weight.normal_(0, (2 / m) ** 0.5, generator=generator)
            self.layer2.weight.normal_(0, ((1 if unit_gain else 2) / m) ** 0.5, generator=generator)

    def forward(self, v: Float[Tensor, "batch fan_in"]) -> Float[Tensor, "batch m"]:
        """Apply the block."""
        out: Tensor = self.layer2(self.layer1(v).relu())
        return out.relu() if self.final_relu else out


class DecoderBlock(nn.Module):
    """b_j applied to the merge of z_j with (a scaled) u_j."""

    def __init__(self, block: MLPBlock, concat: bool) -> None:
        super().__init__()
        self.block = block
        self.concat = concat

    def forward(
        self, z: Float[Tensor, "batch m"], u: Float[Tensor, "batch m"]
    ) -> Float[Tensor, "batch m"]:
        """Merge and apply the block."""
        merged: Tensor = self.block(torch.cat([z, u], dim=1) if self.concat else z + u)
        return merged


class TheoryUNet(nn.Module):
    """Eq. 4 with two-layer ReLU blocks of width m and N long skips.

    Args:
        m: feature width; inputs have m numbers a sample in any shape, e.g. (m,) or (1, 8, 8).
        n_skips: N, the number of long skip connections, at least 1.
        merge: `"add"` as Eq. 4, or `"concat"` as real UNets do.
        unit_gain: give every block mean-square gain 1 instead of 2.
        final_relu: end each block with a ReLU (for tests: it makes the cross terms positive).
        generator: source of the weights; the default is seeded with 0.

    Raises:
        StabilityProbeError: if a size is not positive or the merge is unknown.

    >>> net = TheoryUNet(m=8, n_skips=2)
    >>> net(torch.ones(3, 8)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        m: int = 256,
        n_skips: int = 5,
        *,
        merge: str = "add",
        unit_gain: bool = False,
        final_relu: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("m", m), ("n_skips", n_skips)):
            if number < 1:
                raise StabilityProbeError(f"TheoryUNet: {name} must be at least 1, got {number}")
        if merge not in ("add", "concat"):
            raise StabilityProbeError(f'TheoryUNet: merge must be "add" or "concat", got {merge!r}')
        generator = generator or torch.Generator().manual_seed(0)
        self.m, self.n_skips, self.merge = m, n_skips, merge

        def block(fan_in: int) -> MLPBlock:
            return MLPBlock(fan_in, m, unit_gain, final_relu, generator)

        concat = merge == "concat"
        self.encoder = nn.ModuleList(block(m) for _ in range(n_skips))
        self.middle = block(m)
        self.decoder = nn.ModuleList(
            DecoderBlock(block(2 * m if concat else m), concat) for _ in range(n_skips)
        )  # decoder[i - 1] is b_i

    def forward(
        self, x: Float[Tensor, "batch *shape"], t: Tensor | None = None
    ) -> Float[Tensor, "batch *shape"]:
        """UNet(x); the noise level `t` is accepted and ignored, as in Eq. 4."""
        z: Tensor = x.flatten(1)
        skips = []
        for a in self.encoder:
            z = a(z)
            skips.append(z)
        z = self.middle(z)
        for b, u in zip(reversed(self.decoder), reversed(skips), strict=True):
            z = b(z, u)
        return z.view_as(x)
