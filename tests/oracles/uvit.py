"""U-ViT (Bao et al., 2023) from its public description: state-dict layout and forward pass.

Nothing here is derived from `stability_probe.models`: plain tensor operations on a state dict.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
ScaleSkip = Callable[[int, Tensor], Tensor]
"""(j, skip) to the scaled skip, j counting pops from 0, the deepest skip first."""


def official_layout(
    *, dim: int, depth: int, img: int = 8, patch: int = 2, chans: int = 1, mlp_ratio: int = 4,
    qkv_bias: bool = False, mlp_time_embed: bool = False, num_classes: int = -1, conv: bool = True,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Every key of a U-ViT checkpoint with its shape."""
    tokens = (img // patch) ** 2 + (2 if num_classes > 0 else 1)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, chans, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "decoder_pred.weight": (patch * patch * chans, dim),
        "decoder_pred.bias": (patch * patch * chans,),
    }
    half = depth // 2
    in_blocks, out_blocks = ([f"{k}_blocks.{i}" for i in range(half)] for k in ("in", "out"))
    for block in [*in_blocks, "mid_block", *out_blocks]:
        shapes |= {
            f"{block}.norm1.weight": (dim,),
            f"{block}.norm1.bias": (dim,),
            f"{block}.attn.qkv.weight": (3 * dim, dim),
            f"{block}.attn.proj.weight": (dim, dim),
            f"{block}.attn.proj.bias": (dim,),
            f"{block}.norm2.weight": (dim,),
            f"{block}.norm2.bias": (dim,),
            f"{block}.mlp.fc1.weight": (mlp_ratio * dim, dim),
            f"{block}.mlp.fc1.bias": (mlp_ratio * dim,),
            f"{block}.mlp.fc2.weight": (dim, mlp_ratio * dim),
            f"{block}.mlp.fc2.bias": (dim,),
        }
        if qkv_bias:
            shapes[f"{block}.attn.qkv.bias"] = (3 * dim,)
    for block in out_blocks:
        shapes[f"{block}.skip_linear.weight"] = (dim, 2 * dim)
        shapes[f"{block}.skip_linear.bias"] = (dim,)
    if mlp_time_embed:
        shapes |= {
            "time_embed.0.weight": (4 * dim, dim),
            "time_embed.0.bias": (4 * dim,),
            "time_embed.2.weight": (dim, 4 * dim),
            "time_embed.2.bias": (dim,),
        }
    if num_classes > 0:
        shapes["label_emb.weight"] = (num_classes, dim)
    if conv:
        shapes["final_layer.weight"] = (chans, chans, 3, 3)
        shapes["final_layer.bias"] = (chans,)
    return shapes


def random_state(layout: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of random numbers, none of them special (norms are not 1, biases not 0)."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in layout.items()}


def uvit_forward(
    state: State, x: Tensor, t: Tensor, y: Tensor | None = None, *, heads: int,
    scale: ScaleSkip = lambda j, skip: skip,
) -> Tensor:  # fmt: skip
    """The predicted noise."""
    dim, chans, patch, _ = state["patch_embed.proj.weight"].shape
    batch, _, height, width = x.shape
    rows, columns = height // patch, width // patch

    pixels = x.reshape(batch, chans, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    patches = pixels.reshape(batch, rows * columns, chans * patch * patch)
    kernel = state["patch_embed.proj.weight"].reshape(dim, -1)
    tokens = patches @ kernel.T + state["patch_embed.proj.bias"]

    time = _timestep_embedding(t, dim)
    if "time_embed.0.weight" in state:
        hidden = _linear(state, "time_embed.0", time)
        time = _linear(state, "time_embed.2", hidden * torch.sigmoid(hidden))
    tokens = torch.cat([time[:, None], tokens], dim=1)
    if y is not None:
        tokens = torch.cat([state["label_emb.weight"][y][:, None], tokens], dim=1)
    tokens = tokens + state["pos_embed"]

    half = len([key for key in state if key.endswith("skip_linear.weight")])
    skips = []
    for i in range(half):
        tokens = _block(state, f"in_blocks.{i}", tokens, heads)
        skips.append(tokens)
    tokens = _block(state, "mid_block", tokens, heads)
    for j in range(half):
        merged = torch.cat([tokens, scale(j, skips.pop())], dim=-1)
        tokens = _linear(state, f"out_blocks.{j}.skip_linear", merged)
        tokens = _block(state, f"out_blocks.{j}", tokens, heads)

    pixels = _linear(state, "decoder_pred", _layer_norm(state, "norm", tokens))
    pixels = pixels[:, -rows * columns :].reshape(batch, rows, columns, patch, patch, chans)
    image = pixels.permute(0, 5, 1, 3, 2, 4).reshape(batch, chans, height, width)
    if "final_layer.weight" not in state:
        return image
    return torch.conv2d(image, state["final_layer.weight"], state["final_layer.bias"], padding=1)


def squeeze_excite(state: State, prefix: str, skip: Tensor) -> Tensor:
    """ScaleLong's learnable scaling: mean over features, two layers, a gate for every token."""
    hidden = _linear(state, f"{prefix}.layer1", skip.mean(dim=-1)).clamp(min=0)
    return skip * torch.sigmoid(_linear(state, f"{prefix}.layer2", hidden))[:, :, None]


def _timestep_embedding(t: Tensor, dim: int) -> Tensor:
    half = dim // 2
    frequencies = torch.tensor([10_000 ** (-k / half) for k in range(half)])
    angles = t.float()[:, None] * frequencies
    parts = [angles.cos(), angles.sin()]
    if dim % 2:
        parts.append(torch.zeros(len(t), 1))
    return torch.cat(parts, dim=1)


def _linear(state: State, name: str, v: Tensor) -> Tensor:
    out = v @ state[f"{name}.weight"].T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def _layer_norm(state: State, name: str, v: Tensor) -> Tensor:
    centred = v - v.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def _block(state: State, name: str, tokens: Tensor, heads: int) -> Tensor:
    batch, length, dim = tokens.shape
    qkv = _linear(state, f"{name}.attn.qkv", _layer_norm(state, f"{name}.norm1", tokens))
    q, k, v = (
        part.reshape(batch, length, heads, dim // heads).transpose(1, 2)
        for part in qkv.split(dim, dim=-1)
    )
    weights = (q @ k.transpose(-1, -2) / math.sqrt(dim // heads)).softmax(dim=-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, length, dim)
    tokens = tokens + _linear(state, f"{name}.attn.proj", mixed)
    hidden = _linear(state, f"{name}.mlp.fc1", _layer_norm(state, f"{name}.norm2", tokens))
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return tokens + _linear(state, f"{name}.mlp.fc2", gelu)
