"""U-ViT's sizes from the shapes of its weights (layout: `stability_probe.models.uvit`).

    pos_embed            (1, L, D)             width D; L = 1 [+ 1 with labels] + (img / patch)²
    patch_embed.proj     (D, C, patch, patch)
    in_blocks.{i}        depth = 2 · blocks + 1
    *.mlp.fc1            (mlp_ratio · D, D)

The number of heads leaves no trace in them. The published configurations have heads of width 64;
where 64 does not divide D, the widest head below it that does is assumed.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stability_probe.checkpoints.fit import common_prefix
from stability_probe.checkpoints.reading import problem, reading
from stability_probe.models import UViTConfig

HEAD_WIDTH = 64
_MARKS = ("pos_embed", "patch_embed.proj.weight", "mid_block.attn.qkv.weight")
_SCALING = "se."


def uvit_state(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The state without a wrapper's prefix if it is of a U-ViT, else None."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    prefix = common_prefix(plain, _MARKS)
    if not all(prefix + mark in plain for mark in _MARKS):
        return None
    own = {name.removeprefix(prefix): value for name, value in plain.items()}
    return own if len(own) == len(state) else None  # else it is of two models


def split_scaling(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The U-ViT's own tensors, and those of the learnable scaling (LS) of its skips."""
    own = {name: value for name, value in state.items() if not name.startswith(_SCALING)}
    return own, {name: value for name, value in state.items() if name not in own}


def infer_config(
    state: Mapping[str, Tensor], overrides: Mapping[str, Any], path: Path
) -> UViTConfig:
    """The configuration of the U-ViT that a state is of; `overrides` are taken as given.

    Raises:
        StabilityProbeError: if the shapes are of no U-ViT, or an override is no field of it.
    """
    with reading(path, "the weights of a U-ViT", "give the factory of the model it is of"):
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        classes = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else -1
        patches = state["pos_embed"].shape[1] - (2 if classes > 0 else 1)
        side = math.isqrt(max(patches, 0))
        if not width or not channels or side < 1 or side * side != patches:
            raise problem(path, f"as a U-ViT has {patches} patches of {channels} channels in width "
                          f"{width}; they must form a square")  # fmt: skip
        blocks = {m[1] for name in state if (m := re.match(r"in_blocks\.(\d+)\.", name))}
        inferred: dict[str, Any] = {
            "img_size": side * patch,
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": width,
            "depth": 2 * len(blocks) + 1,
            "num_heads": assumed_heads(width),
            "mlp_ratio": _ratio(state["mid_block.mlp.fc1.weight"].shape[0], width),
            "qkv_bias": "mid_block.attn.qkv.bias" in state,
            "mlp_time_embed": "time_embed.0.weight" in state,
            "num_classes": classes,
            "conv": "final_layer.weight" in state,
        }
        if unknown := sorted(set(overrides) - set(inferred)):
            raise problem(path, f"U-ViT has no setting {unknown[0]!r}; it has {list(inferred)}")
        return UViTConfig(**(inferred | dict(overrides)))


def assumed_heads(width: int) -> int:
    """Heads of the widest width that is at most 64 and divides D.

    >>> assumed_heads(512), assumed_heads(96)
    (8, 2)
    """
    return width // max(w for w in range(1, min(width, HEAD_WIDTH) + 1) if width % w == 0)


def describe(config: UViTConfig, overrides: Mapping[str, Any], scaling: Mapping[str, Any]) -> str:
    """One line on what was inferred and what was assumed."""
    heads = f"{config.num_heads} heads of width {config.embed_dim // config.num_heads}"
    if "num_heads" not in overrides:
        heads += " assumed, as in the published sizes" if not config.embed_dim % 64 else " assumed"
        heads += " (the weights do not tell; num_heads overrides)"
    note = f"; {len(scaling)} tensors of learnable scaling (LS) under se." if scaling else ""
    return (
        f"U-ViT of width {config.embed_dim} with {config.depth // 2} long skips for "
        f"{config.in_chans}x{config.img_size}x{config.img_size} images, {heads}{note}"
    )


def _ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` whose product with the width rounds down to the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
