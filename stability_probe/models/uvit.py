r"""U-ViT (Bao et al., CVPR 2023, arXiv:2209.12152) in the official state-dict layout.

A vision transformer over the tokens of noisy patches, the time and (optionally) a class label. The
first half's outputs are kept and joined to the second half by $Linear(cat[x, skip])$: as many long
skips as in-blocks. Parameter names and shapes are those of the published code, which ScaleLong
extends, so official checkpoints load with `strict=True`; the calibration network of learnable
scaling lives under `se` (see `skips.scaling.LearnableScaling`).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from stability_probe.errors import StabilityProbeError


@dataclass(frozen=True)
class UViTConfig:
    """Sizes of a U-ViT; the names are those of the published code.

    Attributes:
        img_size: height and width of the (square) image in pixels.
        patch_size: height and width of a patch; divides `img_size`.
        in_chans: image channels.
        embed_dim: token width D; a multiple of `num_heads`.
        depth: `depth // 2` in-blocks, one middle block, `depth // 2` out-blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over D.
        qkv_bias: whether query, key and value have biases.
        mlp_time_embed: pass the time embedding through a two-layer MLP.
        num_classes: size of the label table, or -1 for no labels.
        conv: finish with a 3x3 convolution over pixels.

    Raises:
        StabilityProbeError: if the sizes do not fit together.
    """

    img_size: int = 8
    patch_size: int = 2
    in_chans: int = 1
    embed_dim: int = 64
    depth: int = 13
    num_heads: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int = -1
    conv: bool = True

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise StabilityProbeError(
                f"U-ViT: depth must be at least 2 to have a long skip, got {self.depth}"
            )
        if self.patch_size < 1 or self.img_size < 1 or self.img_size % self.patch_size:
            raise StabilityProbeError(
                f"U-ViT: patch_size must divide img_size, got {self.patch_size} and {self.img_size}"
            )
        if self.num_heads < 1 or self.embed_dim < 2 or self.embed_dim % self.num_heads:
            raise StabilityProbeError(
                f"U-ViT: embed_dim must be a multiple of num_heads, "
                f"got {self.embed_dim} and {self.num_heads}"
            )

    @property
    def extras(self) -> int:
        """Tokens beside the patches: time, and the label if there is one."""
        return 2 if self.num_classes > 0 else 1

    @property
    def tokens(self) -> int:
        """Length L of the token sequence."""
        return self.extras + (self.img_size // self.patch_size) ** 2


def timestep_embedding(
    t: Float[Tensor, " batch"] | Int[Tensor, " batch"], dim: int
) -> Float[Tensor, "batch dim"]:
    """Sinusoidal embedding of the noise level, cosines first (Vaswani et al., 2017).

    >>> timestep_embedding(torch.zeros(1), 4)
    tensor([[1., 1., 0., 0.]])
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class Attention(nn.Module):
    """Multi-head self-attention with a joint qkv projection."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Attend over tokens."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply the MLP to every token."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block; with `skip`, it first joins a long skip to its input."""

    def __init__(self, config: UViTConfig, skip: bool) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        skip: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Apply the block to tokens `x`, after merging `skip` if the block has a skip layer."""
        if self.skip_linear is not None:
            if skip is None:
                raise StabilityProbeError("U-ViT: an out-block was called without its skip")
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """Patches to tokens by a strided convolution."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch patches dim"]:
        """Embed an image."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class UViT(nn.Module):
    """U-ViT: predicts the noise in `x` at noise level `t`.

    Args:
        config: sizes.
        generator: source of the initial weights; the default is seeded with 0.

    >>> net = UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2))
    >>> net(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, config: UViTConfig | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config = config or UViTConfig()
        with torch.random.fork_rng(devices=[]):  # layers draw weights that are replaced below
            self._build(config)
        self._initialise(generator or torch.Generator().manual_seed(0))

    def _build(self, config: UViTConfig) -> None:
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.time_embed = (
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
            if config.mlp_time_embed
            else nn.Identity()
        )
        if config.num_classes > 0:
            self.label_emb = nn.Embedding(config.num_classes, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim))
        half = config.depth // 2
        self.in_blocks = nn.ModuleList(Block(config, skip=False) for _ in range(half))
        self.mid_block = Block(config, skip=False)
        self.out_blocks = nn.ModuleList(Block(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.in_chans)
        channels = config.in_chans
        self.final_layer = (
            nn.Conv2d(channels, channels, 3, padding=1) if config.conv else nn.Identity()
        )

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Truncated normals of 0.02 for linear layers and positions; PyTorch's form elsewhere."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)

    def forward(
        self,
        x: Float[Tensor, "batch c h w"],
        timesteps: Float[Tensor, " batch"] | Int[Tensor, " batch"],
        y: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch c h w"]:
        """Predict the noise.

        Args:
            x: noisy images.
            timesteps: noise levels, 0 to 999 by convention.
            y: class labels; needed just when the model has a label table.

        Raises:
            StabilityProbeError: if labels are missing, or given to a model without labels.
        """
        if (y is None) is not (self.config.extras == 1):
            raise StabilityProbeError(
                f"U-ViT with num_classes={self.config.num_classes}: labels y are "
                f"{'missing' if y is None else 'not taken'}"
            )
        tokens = self.patch_embed(x)
        dim = tokens.shape[2]
        extras = [self.time_embed(timestep_embedding(timesteps, dim).to(tokens.dtype))]
        if y is not None:
            extras.insert(0, self.label_emb(y))
        tokens = torch.cat([torch.stack(extras, dim=1), tokens], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        patches = self.decoder_pred(self.norm(tokens))[:, self.config.extras :]
        image: Tensor = self.final_layer(self._unpatchify(patches, x.shape))
        return image

    def _unpatchify(
        self, patches: Float[Tensor, "batch patches pixels"], shape: torch.Size
    ) -> Float[Tensor, "batch c h w"]:
        """Tokens of (row, column, channel) pixels back to an image."""
        batch, channels, height, width = shape
        p = self.config.patch_size
        grid = patches.reshape(batch, height // p, width // p, p, p, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape)
