"""Token networks with long skips."""

import torch
from torch import Tensor, nn

from tests.oracles.architectures.architecture import Architecture, noise, seeded
from tests.oracles.architectures.layers import TransformerBlock


class PatchEmbedding(nn.Module):
    """Patches to tokens, channels last: (batch, height, width, width of a token)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, 2, stride=2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbours, found by strided slicing, become one token of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class PatchExpanding(nn.Module):
    """One token becomes four of half the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(width // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        batch, height, width, _ = x.shape
        x = x.view(batch, height, width, 2, 2, -1).transpose(2, 3)
        return self.norm(x.reshape(batch, 2 * height, 2 * width, -1))


class WindowBlock(TransformerBlock):
    """A transformer block within windows of 2x2 tokens, cyclically shifted by `shift`."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__(width)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        x = super().forward(x.reshape(-1, 4, channels))
        x = x.view(batch, height // 2, width // 2, 2, 2, channels).transpose(2, 3)
        x = x.reshape(batch, height, width, channels)
        return torch.roll(x, (self.shift, self.shift), dims=(1, 2))


class Stage(nn.Module):
    """Two window blocks and a change of resolution, if there is one."""

    def __init__(self, width: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([WindowBlock(width, 0), WindowBlock(width, 1)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class SwinUNet(nn.Module):
    """The skips leave before a stage; those before the last stage are unused."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        w, w2, w4 = width, 2 * width, 4 * width
        self.patch_embed = PatchEmbedding(w)
        self.layers = nn.ModuleList(
            [Stage(w, PatchMerging(w)), Stage(w2, PatchMerging(w2)), Stage(w4, None)]
        )
        self.norm = nn.LayerNorm(w4)
        self.layers_up = nn.ModuleList(
            [PatchExpanding(w4), Stage(w2, PatchExpanding(w2)), Stage(w, None)]
        )
        self.concat_back_dim = nn.ModuleList(
            [nn.Identity(), nn.Linear(2 * w2, w2), nn.Linear(2 * w, w)]
        )
        self.norm_up = nn.LayerNorm(w)
        self.head = nn.Linear(w, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, features = self.patch_embed(x), []
        for layer in self.layers:
            features.append(x)
            x = layer(x)
        x = self.norm(x)
        for i, (layer, concat) in enumerate(zip(self.layers_up, self.concat_back_dim, strict=True)):
            if i > 0:
                x = concat(torch.cat([x, features[2 - i]], dim=-1))
            x = layer(x)
        return nn.functional.pixel_shuffle(self.head(self.norm_up(x)).permute(0, 3, 1, 2), 2)


class AdditiveTransformer(nn.Module):
    """Tokens of one width; the second half of the blocks reads `x + skip`."""

    def __init__(self, half: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.zeros(1, 6, width))
        self.first = nn.ModuleList(TransformerBlock(width) for _ in range(half))
        self.middle = TransformerBlock(width)
        self.second = nn.ModuleList(TransformerBlock(width) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        skips = []
        for block in self.first:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.second:
            x = block(x + skips.pop())
        return self.head(self.norm(x))


TRANSFORMERS = {
    "swin-unet": Architecture(
        seeded(SwinUNet),
        (noise(2, 1, 16, 16),),
        skips=(
            ("patch_embed", "concat_back_dim.2", "concat", (8, 8, 4)),
            ("layers.0", "concat_back_dim.1", "concat", (4, 4, 8)),
        ),
    ),
    "additive-transformer": Architecture(
        seeded(AdditiveTransformer),
        (noise(2, 6, 4),),
        skips=(
            ("first.0", "second.2", "add", (6, 8)),
            ("first.1", "second.1", "add", (6, 8)),
            ("first.2", "second.0", "add", (6, 8)),
        ),
    ),
}
