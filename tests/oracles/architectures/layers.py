"""The layers that the hand-written networks share."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBlock(nn.Sequential):
    """A 3x3 convolution, a group norm and a ReLU."""

    def __init__(self, fan_in: int, fan_out: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1),
            nn.GroupNorm(2, fan_out),
            nn.ReLU(),
        )


class ResBlock(nn.Module):
    """x + f(x), with a 1x1 convolution of x where the shapes differ."""

    def __init__(self, fan_in: int, fan_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(fan_out)
        same = fan_in == fan_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(fan_in, fan_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(residual + self.norm2(self.conv2(h)))


class TimeResBlock(nn.Module):
    """A pre-norm residual block of diffusion networks: the time is added between its layers."""

    def __init__(self, fan_in: int, fan_out: int, time: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, fan_in)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.time = nn.Linear(time, fan_out)
        self.norm2 = nn.GroupNorm(2, fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1) if fan_in != fan_out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(t))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)


class PixelAttention(nn.Module):
    """Self-attention over the pixels of an image, without a residual."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(2, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, width // self.heads, -1)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(2, 3).reshape(batch, width, height, length))


class SelfAttention(nn.Module):
    """Self-attention over tokens, without a residual."""

    def __init__(self, width: int, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, width: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimeEmbedding(nn.Module):
    """Sines and cosines of the noise level, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


def up(x: Tensor) -> Tensor:
    """Twice the resolution, by repetition."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
