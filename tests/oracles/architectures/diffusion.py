"""Hand-written UNets of diffusion models, in the styles of the well-known repositories."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.architectures.architecture import Architecture, noise, seeded
from tests.oracles.architectures.layers import (
    ConvBlock,
    PixelAttention,
    TimeEmbedding,
    TimeResBlock,
    up,
)

T = torch.tensor([20, 700])


class FlatDiffusionUNet(nn.Module):
    """Lists of blocks; the residuals of the attention are written in the root's forward."""

    def __init__(self, widths: tuple[int, ...] = (4, 8)) -> None:
        super().__init__()
        time, first, last = 8, widths[0], widths[-1]
        self.time_mlp = TimeEmbedding(time)
        self.init_conv = nn.Conv2d(1, first, 7, padding=3)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for narrow, wide in zip((first, *widths), widths, strict=False):
            innermost = len(self.downs) == len(widths) - 1
            outermost = not self.downs
            self.downs.append(
                nn.ModuleList(
                    [
                        TimeResBlock(narrow, narrow, time),
                        TimeResBlock(narrow, narrow, time),
                        PixelAttention(narrow),
                        nn.Conv2d(narrow, wide, 3, stride=1 if innermost else 2, padding=1),
                    ]
                )
            )
            self.ups.insert(
                0,
                nn.ModuleList(
                    [
                        TimeResBlock(wide + narrow, wide, time),
                        TimeResBlock(wide + narrow, wide, time),
                        PixelAttention(wide),
                        nn.Conv2d(wide, narrow, 3, padding=1)
                        if outermost
                        else nn.ConvTranspose2d(wide, narrow, 2, stride=2),
                    ]
                ),
            )
        self.mid_block1 = TimeResBlock(last, last, time)
        self.mid_attn = PixelAttention(last)
        self.mid_block2 = TimeResBlock(last, last, time)
        self.final_res_block = TimeResBlock(2 * first, first, time)
        self.final_conv = nn.Conv2d(first, 1, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = self.time_mlp(time)
        x = self.init_conv(x)
        r = x.clone()
        h = []
        for block1, block2, attn, downsample in self.downs:
            x = block1(x, t)
            h.append(x)
            x = block2(x, t)
            x = attn(x) + x
            h.append(x)
            x = downsample(x)
        x = self.mid_block1(x, t)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, t)
        for block1, block2, attn, upsample in self.ups:
            x = torch.cat((x, h.pop()), dim=1)
            x = block1(x, t)
            x = torch.cat((x, h.pop()), dim=1)
            x = block2(x, t)
            x = attn(x) + x
            x = upsample(x)
        x = torch.cat((x, r), dim=1)
        x = self.final_res_block(x, t)
        return self.final_conv(x)


class TimeSequential(nn.Sequential):
    """A Sequential that gives the time to those of its layers that take it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, t) if isinstance(layer, TimeResBlock) else layer(x)
        return x


class ResidualAttention(PixelAttention):
    """x + attention(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(up(x))


class GuidedDiffusionUNet(nn.Module):
    """input_blocks, middle_block and output_blocks; every input block's output is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(8)
        self.input_blocks = nn.ModuleList(
            [
                TimeSequential(nn.Conv2d(1, 4, 3, padding=1)),
                TimeSequential(TimeResBlock(4, 4, 8)),
                TimeSequential(nn.Conv2d(4, 4, 3, stride=2, padding=1)),
                TimeSequential(TimeResBlock(4, 8, 8), ResidualAttention(8)),
            ]
        )
        self.middle_block = TimeSequential(
            TimeResBlock(8, 8, 8), ResidualAttention(8), TimeResBlock(8, 8, 8)
        )
        self.output_blocks = nn.ModuleList(
            [
                TimeSequential(TimeResBlock(16, 8, 8), ResidualAttention(8)),
                TimeSequential(TimeResBlock(12, 8, 8), ResidualAttention(8), Upsample(8)),
                TimeSequential(TimeResBlock(12, 4, 8)),
                TimeSequential(TimeResBlock(8, 4, 8)),
            ]
        )
        self.out = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        hs = []
        emb = self.time_embed(timesteps)
        h = x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = torch.cat([h, hs.pop()], dim=1)
            h = module(h, emb)
        return self.out(h)


class AttentionInTheMiddle(nn.Module):
    """Plain convolutions around one attention, whose residual is inside of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = ConvBlock(1, 4), ConvBlock(4, 8)
        self.mid1, self.attention, self.mid2 = (
            ConvBlock(8, 8),
            ResidualAttention(8),
            ConvBlock(8, 8),
        )
        self.dec2, self.dec1 = ConvBlock(16, 4), ConvBlock(8, 4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        u1 = self.enc1(x)
        u2 = self.enc2(F.avg_pool2d(u1, 2))
        z = self.mid2(self.attention(self.mid1(F.avg_pool2d(u2, 2))))
        z = self.dec2(torch.cat([up(z), u2], dim=1))
        z = self.dec1(torch.cat([up(z), u1], dim=1))
        return self.head(z)


DIFFUSION = {
    # The second feature of a stage is `attn(x) + x`, which no module puts out.
    "flat-diffusion": Architecture(
        seeded(FlatDiffusionUNet),
        (noise(2, 1, 8, 8), T),
        skips=(
            ("init_conv", "final_res_block", "concat", (4, 8, 8)),
            ("downs.0.0", "ups.1.1", "concat", (4, 8, 8)),
            ("downs.0.2", "ups.1.0", "concat", (4, 8, 8)),
            ("downs.1.0", "ups.0.1", "concat", (4, 4, 4)),
            ("downs.1.2", "ups.0.0", "concat", (4, 4, 4)),
        ),
    ),
    "guided-diffusion": Architecture(
        seeded(GuidedDiffusionUNet),
        (noise(2, 1, 8, 8), T),
        skips=(
            ("input_blocks.0", "output_blocks.3", "concat", (4, 8, 8)),
            ("input_blocks.1", "output_blocks.2", "concat", (4, 8, 8)),
            ("input_blocks.2", "output_blocks.1", "concat", (4, 4, 4)),
            ("input_blocks.3", "output_blocks.0", "concat", (8, 4, 4)),
        ),
    ),
    "attention-in-the-middle": Architecture(
        seeded(AttentionInTheMiddle),
        (noise(2, 1, 8, 8),),
        skips=(
            ("enc1", "dec1", "concat", (4, 8, 8)),
            ("enc2", "dec2", "concat", (8, 4, 4)),
        ),
    ),
}
