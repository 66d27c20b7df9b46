"""More ways to arrange a small UNet: what is done around it, between its ends, and to join them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.architectures.architecture import Architecture, noise, seeded
from tests.oracles.architectures.layers import ConvBlock, up
from tests.oracles.architectures.unets import SmallUNet


class Denormalised(SmallUNet):
    """The output is given the mean and the deviation of the input, as in Demucs."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return self.head(self.decode((x - mean) / std)) * std + mean


class Masked(SmallUNet):
    """The network makes a mask for its input, as in source separation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.head(self.decode(x)))


class Modulated(SmallUNet):
    """A code of the whole input modulates the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(1, 8)

    def decode(self, x: Tensor) -> Tensor:
        scale = self.code(x.mean((2, 3)))[:, :, None, None]
        u1 = self.enc1(x)
        u2 = self.enc2(F.max_pool2d(u1, 2))
        z = self.bottom(F.max_pool2d(u2, 2)) * scale
        z = self.dec2(torch.cat([up(z), u2], dim=1))
        return self.dec1(torch.cat([up(z), u1], dim=1)) * scale[:, :4]


class WidthAlike(SmallUNet):
    """z_i and u_i have one width, so that they can be added."""

    def __init__(self) -> None:
        super().__init__(cat=False)


class Lerp(WidthAlike):
    """A weighted mean."""

    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.lerp(z, u, 0.25)


class Learned(WidthAlike):
    """Every channel of the skip has a weight of its own, as part of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.linspace(0.2, 0.8, 4)[:, None, None])
        self.weight2 = nn.Parameter(torch.linspace(0.2, 0.8, 8)[:, None, None])

    def merge1(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.addcmul(z, u, self.weight1)

    def merge2(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.addcmul(z, u, self.weight2)


class Alpha(WidthAlike):
    """A constant as part of the sum."""

    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.add(z, u, alpha=0.5)


class HStack(SmallUNet):
    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.hstack([z, u])


class SideOutputs(SmallUNet):
    """The decoder's features of all resolutions are joined for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = nn.ModuleList([nn.Conv2d(w, 1, 1) for w in (4, 4, 8)])
        self.fuse = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        u1 = self.enc1(x)
        u2 = self.enc2(F.max_pool2d(u1, 2))
        z2 = self.bottom(F.max_pool2d(u2, 2))
        z1 = self.dec2(torch.cat([up(z2), u2], dim=1))
        z0 = self.dec1(torch.cat([up(z1), u1], dim=1))
        sides = [
            F.interpolate(side(z), size=x.shape[2:])
            for side, z in zip(self.sides, (z0, z1, z2), strict=True)
        ]
        return self.fuse(torch.cat(sides, dim=1))


class Pyramid(SmallUNet):
    """Branches of different reach over the bottom, joined by one merge, as in DeepLabV3+."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(8, 4, 1)
        self.far = nn.Sequential(nn.Conv2d(8, 4, 3, padding=2, dilation=2), nn.ReLU())
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU())
        self.project = ConvBlock(12, 8)
        self.more = nn.Sequential(*[ConvBlock(8, 8) for _ in range(5)])
        self.dec1 = ConvBlock(12, 4)
        del self.dec2, self.bottom

    def decode(self, x: Tensor) -> Tensor:
        u = self.enc1(x)
        z = self.more(self.enc2(F.max_pool2d(u, 2)))
        whole = F.interpolate(self.whole(z), size=z.shape[2:])
        z = self.project(torch.cat([self.near(z), self.far(z), whole], dim=1))
        return self.dec1(torch.cat([up(z), u], dim=1))


class SumOverTheBottom(WidthAlike):
    """The innermost skip is a sum over the bottom at its own resolution, as in DRUNet."""

    def __init__(self) -> None:
        super().__init__()
        self.enc3, self.dec3 = ConvBlock(8, 8), ConvBlock(8, 8)

    def decode(self, x: Tensor) -> Tensor:
        u1 = self.enc1(x)
        u2 = self.enc2(F.max_pool2d(u1, 2))
        u3 = self.enc3(F.max_pool2d(u2, 2))
        z = self.dec3(self.bottom(u3) + u3)
        z = self.dec2(up(z) + u2)
        return self.dec1(up(z) + u1)


class IdentityAfter(SmallUNet):
    """An identity reads what a function made of the feature; it is not where that comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()

    def decode(self, x: Tensor) -> Tensor:
        u1 = F.silu(self.enc1(x))
        u2 = F.silu(self.enc2(F.max_pool2d(self.identity(u1), 2)))
        z = self.bottom(F.max_pool2d(self.identity(u2), 2))
        z = self.dec2(torch.cat([up(z), u2], dim=1))
        return self.dec1(torch.cat([up(z), u1], dim=1))


class ReadTwice(SmallUNet):
    """Two decoder blocks in a row read each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.again2, self.again1 = ConvBlock(4 + 8, 4), ConvBlock(4 + 4, 4)

    def decode(self, x: Tensor) -> Tensor:
        u1 = self.enc1(x)
        u2 = self.enc2(F.max_pool2d(u1, 2))
        z = self.dec2(torch.cat([up(self.bottom(F.max_pool2d(u2, 2))), u2], dim=1))
        z = self.again2(torch.cat([z, u2], dim=1))
        z = self.dec1(torch.cat([up(z), u1], dim=1))
        return self.again1(torch.cat([z, u1], dim=1))


def _two(make: type[nn.Module], merge: str = "concat") -> Architecture:
    skips = (("enc1", "dec1", merge, (4, 8, 8)), ("enc2", "dec2", merge, (8, 4, 4)))
    return Architecture(seeded(make), (noise(2, 1, 8, 8),), skips=skips)


VARIATIONS = {
    "denormalised": _two(Denormalised),
    "masked": _two(Masked),
    "modulated": _two(Modulated),
    "lerp": _two(Lerp, "add"),
    "learned-sum": _two(Learned, "add"),
    "alpha": _two(Alpha, "add"),
    "hstack": _two(HStack),
    "side-outputs": _two(SideOutputs),
    "identity-after": _two(IdentityAfter),
    "pyramid": Architecture(
        seeded(Pyramid),
        (noise(2, 1, 8, 8),),
        skips=(("enc1", "dec1", "concat", (4, 8, 8)),),
    ),
    "sum-over-the-bottom": Architecture(
        seeded(SumOverTheBottom),
        (noise(2, 1, 16, 16),),
        skips=(
            ("enc1", "dec1", "add", (4, 16, 16)),
            ("enc2", "dec2", "add", (8, 8, 8)),
            ("enc3", "dec3", "add", (8, 4, 4)),
        ),
    ),
    "read-twice": Architecture(
        seeded(ReadTwice),
        (noise(2, 1, 8, 8),),
        skips=(
            ("enc1", "again1", "concat", (4, 8, 8)),
            ("enc1", "dec1", "concat", (4, 8, 8)),
            ("enc2", "again2", "concat", (8, 4, 4)),
            ("enc2", "dec2", "concat", (8, 4, 4)),
        ),
    ),
}
