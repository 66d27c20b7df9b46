"""Makers of what a network takes beside x_t, by the *name* of the parameter.

A maker looks at what is known of the network and returns a value with half a sentence on it, or
`None` where the configuration says nothing of its parameter: a conditioning that the network can
do without. The table `MAKERS` is the whole knowledge of names; `TIMES` that of noise levels.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stability_probe.errors import StabilityProbeError

TOKENS = 8
"""Length of a conditioning text, where the configuration does not fix it."""
STEPS = 1000
"""Number of noise levels, where the configuration has none."""


def find(config: Mapping[str, Any], *keys: str) -> tuple[str, int] | None:
    """The first of these that is a positive number, or a list that starts with one."""
    for key in keys:
        value = config.get(key)
        number = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(number, int) and not isinstance(number, bool) and number > 0:
            return key, number
    return None


Made = tuple[Any, str] | None
"""A value and the sentence on it, or nothing."""


@dataclass(frozen=True)
class Network:
    """What the makers may look at, and draw from."""

    name: str
    config: Mapping[str, Any]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    batch: int
    generator: torch.Generator
    like: Tensor

    def gaussian(self, *shape: int, source: str) -> tuple[Tensor, str]:
        """Noise of this shape, a sample."""
        size = (self.batch, *shape)
        noise = torch.randn(size, generator=self.generator, dtype=torch.float32)
        return noise.to(self.like), f"Gaussian noise {size}, {source}"

    def integers(self, low: int, high: int) -> Tensor:
        """Whole numbers from `low` to below `high`, one a sample."""
        numbers = torch.randint(low, high, (self.batch,), generator=self.generator)
        return numbers.to(self.like.device)

    def rows(self, *numbers: float) -> Tensor:
        """The same numbers for every sample."""
        return torch.tensor([numbers] * self.batch).to(self.like)

    def of_width(self, *keys: str, before: tuple[int, ...] = ()) -> Made:
        """Noise (*before, width), with the width under the first of these keys."""
        found = find(self.config, *keys)
        return found and self.gaussian(*before, found[1], source=f"from {found[0]}={found[1]}")

    def cannot_guess(self, parameter: str, known: list[str]) -> StabilityProbeError:
        """What to say of a parameter that the network needs."""
        return StabilityProbeError(
            f"{self.name}.forward needs {parameter!r}, and what to pass cannot be guessed from its "
            f"configuration (known: {', '.join(known)}); pass it with --kwargs FILE.npz, or pass "
            "--model package.module:factory with a factory that wraps the model"
        )


def nothing(net: Network) -> Made:
    """For a parameter that is not in the table."""
    return None


def noise_level(net: Network, parameter: inspect.Parameter) -> tuple[Tensor, str]:
    """One noise level a sample: a step, as a float unless the parameter is declared whole."""
    if TIMES[parameter.name] == "unit":
        levels = torch.rand(net.batch, generator=net.generator).to(net.like)
        return levels, f"noise levels ({net.batch},) uniform in [0, 1)"
    found = find(net.config, "num_train_timesteps", "num_embeds_ada_norm", "num_timesteps")
    steps = max(2, found[1] if found else STEPS)
    levels = net.integers(1, steps)
    whole = "LongTensor" in str(parameter.annotation) or "IntTensor" in str(parameter.annotation)
    return levels if whole else levels.to(net.like), (
        f"noise levels ({net.batch},), whole numbers from 1 to {steps - 1}"
    )


def _text(net: Network, width: tuple[str, ...] = (), length: str = "text_len") -> Made:
    """A text as a sequence of embeddings; networks of motion modules take it once a frame."""
    found = find(net.config, length)
    made = net.of_width(*(width or _TEXT_WIDTHS), before=(found[1] if found else TOKENS,))
    if made is None or "motion_max_seq_length" not in net.config or len(net.shape) < 4:
        return made
    frames = net.shape[1]
    return made[0].repeat_interleave(frames, 0), f"{made[1]}, the same for each of {frames} frames"


def _mask(net: Network, width: tuple[str, ...] = (), length: str = "text_len") -> Made:
    """A mask for that text, unless the network puts something in its place: every token counts."""
    if net.config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        return None
    text = _text(net, width, length)
    if text is None:
        return None
    size = tuple(text[0].shape[:2])
    return net.like.new_ones(size), f"ones {size}, every token counts"


def _labels(net: Network) -> Made:
    """Class labels, as numbers or as whatever the network embeds in their place."""
    kind = net.config.get("class_embed_type")
    if kind == "timestep":
        return net.integers(0, STEPS).to(net.like), f"numbers ({net.batch},), embedded like a time"
    if kind == "identity":
        found = find(net.config, "block_out_channels")
        width = (find(net.config, "time_embedding_dim") or ("", 4 * found[1] if found else 0))[1]
        return net.gaussian(width, source=f"from class_embed_type={kind}") if width else None
    if kind in ("projection", "simple_projection"):
        return net.of_width("projection_class_embeddings_input_dim")
    keys = ["num_class_embeds", "num_classes", "num_labels"]
    if net.config.get("norm_type") == "ada_norm_zero":
        keys.append("num_embeds_ada_norm")
    found = find(net.config, *keys)
    if found is None:
        return None
    source = f"labels ({net.batch},) below {found[1]}, from {found[0]}={found[1]}"
    return net.integers(0, found[1]), source


def _added_conditions(net: Network) -> Made:
    """The dictionary of pooled conditions that diffusers' conditional UNets take."""
    kind, projection = (net.config.get(k) for k in ("addition_embed_type", "encoder_hid_dim_type"))
    if kind in (None, "text") and projection in (None, "text_proj"):
        return None
    made: dict[str, tuple[Any, str] | None] = {}
    if kind == "text_time":
        total = find(net.config, "projection_class_embeddings_input_dim")
        each = find(net.config, "addition_time_embed_dim")
        if total and each and total[1] > 6 * each[1]:
            source = f"from {total[0]}={total[1]} less 6 times {each[0]}={each[1]}"
            made["text_embeds"] = net.gaussian(total[1] - 6 * each[1], source=source)
            made["time_ids"] = _size_ids(net)
    if kind == "image" or projection == "image_proj":
        made["image_embeds"] = net.of_width("encoder_hid_dim")
    elif kind == "text_image" or projection == "text_image_proj":
        made["image_embeds"] = net.of_width("cross_attention_dim")
    parts = {name: part for name, part in made.items() if part is not None}
    if not parts or kind == "image_hint" or projection == "ip_image_proj":
        raise net.cannot_guess("added_cond_kwargs", list(net.names[:2]))
    return {k: part[0] for k, part in parts.items()}, "; ".join(
        f"{k} is {part[1]}" for k, part in parts.items()
    )


def _size_ids(net: Network) -> tuple[Tensor, str]:
    """Original size, crop and target size, six numbers a sample: an image that was not cropped."""
    height, width = map(float, net.shape[-2:] if len(net.shape) > 1 else net.shape * 2)
    numbers = (height, width, 0.0, 0.0, height, width)
    return net.rows(*numbers), "image size, crop at 0,0 and target size"


def _added_time_ids(net: Network) -> Made:
    """As many numbers a sample as the projection has room for."""
    total = find(net.config, "projection_class_embeddings_input_dim")
    each = find(net.config, "addition_time_embed_dim")
    if not (total and each):
        return None
    n = total[1] // each[1]
    return net.rows(*[1.0] * n), f"ones ({net.batch}, {n}), from {total[0]}={total[1]}"


def _meta_size(net: Network) -> Made:
    """Original size, target size and crop."""
    if not net.config.get("use_style_cond_and_image_meta_size"):
        return None
    height, width = map(float, net.shape[-2:])
    return net.rows(height, width, height, width, 0.0, 0.0), "image size, target size, crop at 0,0"


def _style(net: Network) -> Made:
    """The only style there is."""
    if not net.config.get("use_style_cond_and_image_meta_size"):
        return None
    return torch.zeros_like(net.integers(0, 1)), "style 0, the only one"


def _rotary(net: Network) -> Made:
    """Rotary position embedding of a grid of patches."""
    patch, width = find(net.config, "patch_size"), find(net.config, "attention_head_dim")
    if "image_meta_size" not in net.names or not (patch and width) or len(net.shape) != 3:
        return None
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    grid = (net.shape[1] // patch[1], net.shape[2] // patch[1])
    pair = get_2d_rotary_pos_embed(width[1], ((0, 0), grid), grid)
    return tuple(part.to(net.like) for part in pair), f"rotary positions of a grid {grid}"


def _clip(net: Network, key: str, length: int) -> Made:
    """A text or an image, of use only to networks that take both."""
    both = find(net.config, "clip_text_in_channels") and find(net.config, "clip_image_in_channels")
    return net.of_width(key, before=(length,)) if both else None


def _guidance(net: Network) -> Made:
    """The strength of guidance, of a distilled network."""
    return (net.like.new_ones(net.batch), "ones") if net.config.get("guidance_embeds") else None


def _frames(net: Network) -> Made:
    """The number of frames in x_t."""
    n = 1 if len(net.shape) < 4 else net.shape["added_time_ids" not in net.names]
    return n, f"{n}, as in the input"


_TEXT_WIDTHS = (
    "encoder_hid_dim", "caption_channels", "joint_attention_dim", "encoder_hidden_size",
    "context_dim", "cross_attention_dim",
)  # fmt: skip
_STEPS = ("timestep", "timesteps", "t", "time", "timestep_r")
_UNIT = (
    "timestep_ratio", "noise_labels", "sigma", "sigmas", "noise_level", "noise_levels",
    "noise_cond", "time_cond", "c_noise", "log_snr",
)  # fmt: skip
TIMES = dict.fromkeys(_STEPS, "steps") | dict.fromkeys(_UNIT, "unit")
"""Names of noise levels: those counted in steps, and those of order 1."""
MAKERS: dict[str, Callable[[Network], Made]] = {
    **dict.fromkeys(("class_labels", "class_label", "labels", "label", "y"), _labels),
    **dict.fromkeys(("encoder_hidden_states", "context"), _text),
    **dict.fromkeys(("encoder_attention_mask", "text_embedding_mask"), _mask),
    "encoder_hidden_states_t5": lambda n: _text(n, ("cross_attention_dim_t5",), "text_len_t5"),
    "text_embedding_mask_t5": lambda n: _mask(n, ("cross_attention_dim_t5",), "text_len_t5"),
    "added_cond_kwargs": _added_conditions,
    "added_time_ids": _added_time_ids,
    "image_meta_size": _meta_size,
    "style": _style,
    "image_rotary_emb": _rotary,
    "image_latents": lambda n: n.gaussian(*n.shape, source="like the input"),
    "image_embeddings": lambda n: n.of_width("cross_attention_dim"),
    "pooled_projections": lambda n: n.of_width("pooled_projection_dim"),
    "pooled_text_emb": lambda n: n.of_width("cond_embed_dim"),
    "proj_embedding": lambda n: n.of_width("embedding_dim"),
    "clip_text_pooled": lambda n: n.of_width("clip_text_pooled_in_channels", before=(1,)),
    "clip_text": lambda n: _clip(n, "clip_text_in_channels", TOKENS),
    "clip_img": lambda n: _clip(n, "clip_image_in_channels", 1),
    "guidance": _guidance,
    "fps": lambda n: (n.rows(8.0)[:, 0], "8 frames a second"),
    "num_frames": _frames,
}
"""How to make a parameter, by its name."""
