"""Networks whose long skips cross: a merge joins more than one feature, a feature many merges."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.architectures.architecture import Architecture, noise, seeded
from tests.oracles.architectures.layers import ConvBlock, up


class UNetPlusPlus(nn.Module):
    """x_{i,j} reads every x_{i,k} before it and the upsampled x_{i+1,j-1}."""

    def __init__(self, widths: tuple[int, ...] = (4, 6, 8)) -> None:
        super().__init__()
        self.depth = len(widths)
        self.blocks = nn.ModuleDict()
        for i, (fan_in, width) in enumerate(zip((1, *widths), widths, strict=False)):
            self.blocks[f"x{i}0"] = ConvBlock(fan_in, width)
            for j in range(1, self.depth - i):
                self.blocks[f"x{i}{j}"] = ConvBlock(j * width + widths[i + 1], width)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        x: list[list[Tensor]] = [[] for _ in range(self.depth)]
        for i in range(self.depth):
            below = image if i == 0 else F.max_pool2d(x[i - 1][0], 2)
            x[i].append(self.blocks[f"x{i}0"](below))
        for j in range(1, self.depth):
            for i in range(self.depth - j):
                parts = [*x[i], up(x[i + 1][j - 1])]
                x[i].append(self.blocks[f"x{i}{j}"](torch.cat(parts, dim=1)))
        return self.head(x[0][-1])


class UNet3Plus(nn.Module):
    """Every decoder stage reads the encoder's finer features and the decoder's coarser ones."""

    def __init__(self, widths: tuple[int, ...] = (4, 6, 8), width: int = 4) -> None:
        super().__init__()
        n = len(widths)
        self.encoder = nn.ModuleList(
            ConvBlock(a, b) for a, b in zip((1, *widths), widths, strict=False)
        )
        sources = [[*widths[: i + 1], *[n * width] * (n - 2 - i), widths[-1]] for i in range(n - 1)]
        self.reduce = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(source, width, 3, padding=1) for source in row)
            for row in sources
        )
        self.decoder = nn.ModuleList(ConvBlock(width * len(row), n * width) for row in sources)
        self.head = nn.Conv2d(n * width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for block in self.encoder:
            x = block(x)
            features.append(x)
            x = F.max_pool2d(x, 2)
        decoded = [features[-1]]  # coarsest first
        for i in reversed(range(len(self.decoder))):
            size = features[i].shape[2:]
            finer = [F.adaptive_max_pool2d(u, size) for u in features[: i + 1]]
            coarser = [F.interpolate(z, size=size, mode="bilinear") for z in reversed(decoded)]
            parts = [conv(part) for conv, part in zip(self.reduce[i], finer + coarser, strict=True)]
            decoded.append(self.decoder[i](torch.cat(parts, dim=1)))
        return self.head(decoded[-1])


NESTED = {
    "unet-plus-plus": Architecture(seeded(UNetPlusPlus), (noise(2, 1, 16, 16),)),
    "unet-3-plus": Architecture(seeded(UNet3Plus), (noise(2, 1, 16, 16),)),
}
