"""One small UNet, written in the many ways that its skips can be joined and its code arranged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.oracles.architectures.architecture import Architecture, noise, seeded
from tests.oracles.architectures.layers import ConvBlock, up

Block = Callable[[int, int], nn.Module]


class SmallUNet(nn.Module):
    """Two resolutions and a bottom; subclasses say how u_i reaches z_i.

    With `cat` the decoder blocks read twice the width, otherwise z_i and u_i have one width.
    """

    widths = (4, 8)

    def __init__(self, cat: bool = True, block: Block = ConvBlock) -> None:
        super().__init__()
        w1, w2 = self.widths
        self.enc1, self.enc2, self.bottom = block(1, w1), block(w1, w2), block(w2, w2)
        self.dec2 = block(2 * w2 if cat else w2, w1)
        self.dec1 = block(2 * w1 if cat else w1, w1)
        self.head = nn.Conv2d(w1, 1, 1)

    def merge1(self, z: Tensor, u: Tensor) -> Tensor:
        return self.merge(z, u)

    def merge2(self, z: Tensor, u: Tensor) -> Tensor:
        return self.merge(z, u)

    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([z, u], dim=1)

    def decode(self, x: Tensor) -> Tensor:
        """The last features, z_0."""
        u1 = self.enc1(x)
        u2 = self.enc2(F.max_pool2d(u1, 2))
        z = self.bottom(F.max_pool2d(u2, 2))
        z = self.dec2(self.merge2(up(z), u2))
        return self.dec1(self.merge1(up(z), u1))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.decode(x))


class SkipFirst(SmallUNet):
    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([u, z], dim=1)


class SkipFirstAndLast(SmallUNet):
    def merge1(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([u, z], dim=1)


class Additive(SmallUNet):
    def __init__(self) -> None:
        super().__init__(cat=False)

    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.add(u, z)


class InPlace(SmallUNet):
    def __init__(self) -> None:
        super().__init__(cat=False)

    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        z += u
        return z


class Scaled(SmallUNet):
    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([z, u * 2**-0.5], dim=1)


class ScaledAdditive(SmallUNet):
    def __init__(self) -> None:
        super().__init__(cat=False)

    def merge(self, z: Tensor, u: Tensor) -> Tensor:
        return (z + u) / 2**0.5


class Projected(SmallUNet):
    """The skips pass 1x1 convolutions on their way."""

    def __init__(self) -> None:
        super().__init__()
        w1, w2 = self.widths
        self.proj1, self.proj2 = nn.Conv2d(w1, w1, 1), nn.Conv2d(w2, w2, 1)

    def merge1(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([z, self.proj1(u)], dim=1)

    def merge2(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([z, self.proj2(u)], dim=1)


class Normalised(SmallUNet):
    """The skips are normalised on their way, by a module and by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, self.widths[0])

    def merge1(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([z, self.norm1(u)], dim=1)

    def merge2(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([z, F.normalize(u, dim=1)], dim=1)


class DictOutput(SmallUNet):
    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Conv2d(self.widths[0], 1, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.decode(x)
        return {"mask": self.head(z), "edge": self.edge(z)}


@dataclass
class Prediction:
    """The output of `DataclassOutput`."""

    sample: Tensor
    variance: Tensor | None = None


class DataclassOutput(SmallUNet):
    def forward(self, x: Tensor) -> Prediction:
        return Prediction(sample=super().forward(x))


class Stages(nn.Module):
    """Three resolutions of one width, so that blocks can be shared."""

    width = 4

    def __init__(self, share_encoder: bool, share_decoder: bool) -> None:
        super().__init__()
        w = self.width
        self.stem = nn.Conv2d(1, w, 3, padding=1)
        self.encoders = nn.ModuleList(ConvBlock(w, w) for _ in range(1 if share_encoder else 3))
        self.middle = ConvBlock(w, w)
        self.decoders = nn.ModuleList(ConvBlock(2 * w, w) for _ in range(1 if share_decoder else 3))
        self.head = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for i in range(3):
            x = self.encoders[i % len(self.encoders)](x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for i in range(3):
            x = torch.cat([up(x), skips.pop()], dim=1)
            x = self.decoders[i % len(self.decoders)](x)
        return self.head(x)


class GlobalResidual(nn.Module):
    """x + UNet(x): nothing is computed from the sum, so it is no long skip."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = SmallUNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x) + x


def noisy_block(fan_in: int, fan_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(fan_out),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.2),
    )


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.body = ConvBlock(fan_in, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


def _small(make: Callable[..., nn.Module], merge: str = "concat", prefix: str = "") -> Architecture:
    return Architecture(
        seeded(make),
        (noise(2, 1, 8, 8),),
        skips=(
            (f"{prefix}enc1", f"{prefix}dec1", merge, (4, 8, 8)),
            (f"{prefix}enc2", f"{prefix}dec2", merge, (8, 4, 4)),
        ),
    )


def _stages(sources: tuple[int, ...], sinks: tuple[int, ...]) -> Architecture:
    return Architecture(
        seeded(Stages, len(set(sources)) == 1, len(set(sinks)) == 1),
        (noise(2, 1, 16, 16),),
        skips=tuple(
            (f"encoders.{source}", f"decoders.{sink}", "concat", (4, size, size))
            for source, sink, size in zip(sources, sinks, (16, 8, 4), strict=True)
        ),
    )


UNETS = {
    "skip-last": _small(SmallUNet),
    "skip-first": _small(SkipFirst),
    "skip-first-and-last": _small(SkipFirstAndLast),
    "additive": _small(Additive, "add"),
    "additive-in-place": _small(InPlace, "add"),
    "scaled": _small(Scaled),
    "scaled-additive": _small(ScaledAdditive, "add"),
    # What is joined is proj(u) or norm(u); u itself is the output of the encoder's block.
    "projected": _small(Projected),
    "normalised": _small(Normalised),
    "dict-output": _small(DictOutput),
    "dataclass-output": _small(DataclassOutput),
    "unshared-blocks": _stages((0, 1, 2), (2, 1, 0)),
    "shared-decoder": _stages((0, 1, 2), (0, 0, 0)),
    "shared-encoder": _stages((0, 0, 0), (2, 1, 0)),
    "shared-both": _stages((0, 0, 0), (0, 0, 0)),
    "global-residual": _small(GlobalResidual, prefix="unet."),
    "noisy": _small(lambda: SmallUNet(block=noisy_block)),
    "checkpointed": _small(lambda: SmallUNet(block=Checkpointed)),
}
