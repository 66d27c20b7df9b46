"""Weights inside what a training script saved.

Scripts wrap a state dict in other dicts, beside the step, the optimiser and often a running
average (EMA) of the weights. `find_weights` names everything that could be a model's weights by
its path in the nest; `choose` picks the one that was asked for, or says what there is.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stability_probe.checkpoints.reading import listed, problem

Weights = Mapping[str, Any] | Sequence[Tensor] | nn.Module
"""A state dict, the tensors of `model.parameters()` in order, or a module."""

DEPTH = 3
_VISITS = 4
MODEL_NAMES = (
    "", "state_dict", "model_state_dict", "model_state", "model", "module", "net", "nnet",
    "network", "unet", "transformer", "params", "weights", "diffusion_pytorch_model",
    "pytorch_model",
)  # fmt: skip
"""Names that mean the model itself, the surest first."""

_OTHERS = re.compile(r"opt|optim|sched|scaler|callback|loop|random_state|rng|sampler|hyper")
_EMA = re.compile(r"(^|[._])(?<!non_)ema([._\d]|$)|shadow_params|averaged", re.IGNORECASE)


def is_ema(name: str) -> bool:
    """Whether a name means averaged weights.

    >>> [is_ema(name) for name in ("model_ema", "ema.shadow_params", "nnet_ema", "schema")]
    [True, True, True, False]
    """
    return bool(_EMA.search(name))


def is_other(name: str) -> bool:
    """Whether a name means what is not a model: the optimiser, random states.

    >>> is_other("optimizer_states"), is_other("model")
    (True, False)
    """
    return bool(_OTHERS.match(name.lower()) or name.lower().startswith("lr_"))


def find_weights(
    saved: Any, name: str = "", depth: int = 0, seen: Counter[int] | None = None
) -> dict[str, Weights]:
    """Everything in a saved object that could be a model's weights, by its path.

    What lies at several paths is looked at for the first few alone: in a nest that is made for it,
    there are more paths than anybody could visit.

    >>> import torch
    >>> one = torch.ones(1)
    >>> saved = {"model": {"w": one}, "ema": {"shadow_params": [one]}, "step": 3}
    >>> list(find_weights(saved))
    ['model', 'ema.shadow_params']
    """
    seen = Counter() if seen is None else seen
    seen[id(saved)] += 1
    if isinstance(saved, nn.Module):
        return {name: saved}
    if isinstance(saved, list | tuple):
        whole = name.endswith("shadow_params") and saved and _all_tensors(saved)
        return {name: saved} if whole else {}
    if not isinstance(saved, Mapping) or seen[id(saved)] > _VISITS:
        return {}
    if not all(isinstance(key, str) for key in saved):
        return {}
    if not _all_tensors(saved.values()) and depth < DEPTH:
        nested: dict[str, Weights] = {}
        for key, value in saved.items():
            if not is_other(key):
                nested |= find_weights(value, f"{name}.{key}" if name else key, depth + 1, seen)
        if nested:
            return nested
    return _split(saved, name) if any(isinstance(v, Tensor) for v in saved.values()) else {}


def choose(names: Sequence[str], weights: str, path: Path) -> str:
    """The name that `weights` asks for: "model", "ema", or a name itself.

    Raises:
        StabilityProbeError: if none of the names, or more than one, is asked for.
    """
    if weights in names and weights != "model":
        return weights
    if weights == "model":
        named = [name for name in names if not is_ema(name)]
        ranks = {  # of a name and its variants (model.fp16), the name itself
            n: (MODEL_NAMES.index(h), n != h)
            for n in named
            if (h := n.split(".")[0]) in MODEL_NAMES
        }
        best = [name for name in ranks if ranks[name] == min(ranks.values())] or named
    elif weights == "ema":
        best = [name for name in names if is_ema(name)]
    else:
        best = [name for name in names if name.startswith(weights + ".")]
    if len(best) != 1:
        many = f"fits {listed(best)}" if best else "is not in it"
        there = listed([name or "model" for name in names], most=6) or "nothing"
        raise problem(path, f"weights={weights!r} {many}; found {there}: name one with weights=")
    return best[0]


def tensors_of(weights: Weights, path: Path) -> dict[str, Tensor]:
    """The state dict of some weights, checked to hold dense tensors alone; a list's by position.

    Raises:
        StabilityProbeError: if it is empty, or has other values.
    """
    if isinstance(weights, nn.Module):
        state = {k: v for k, v in weights.state_dict().items() if isinstance(v, Tensor)}
    elif isinstance(weights, Mapping):
        state = dict(weights)
    else:
        state = {str(i): value for i, value in enumerate(weights)}
    if others := [f"{k}: {kind}" for k, v in state.items() if (kind := _no_weight(v))]:
        raise problem(path, f"has {len(others)} values that are no dense tensors "
                      f"({listed(others)}) among its weights; save model.state_dict() of a plain "
                      "model by itself")  # fmt: skip
    if not state:
        raise problem(path, "holds no tensors; save model.state_dict() after the model is built")
    return state


def _no_weight(value: Any) -> str:
    """What a value is if its numbers cannot be copied to a parameter, else ""."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.layout is not torch.strided or value.is_nested:
        return "nested" if value.is_nested else str(value.layout)
    return "quantized" if value.is_quantized else "without data" if value.is_meta else ""


def _split(state: Mapping[str, Any], name: str) -> dict[str, Weights]:
    """A state dict that may hold its average too, under a prefix such as `ema_model.`."""
    averaged = {head for key in state if is_ema(head := key.partition(".")[0]) and "." in key}
    if not averaged or all(key.partition(".")[0] in averaged for key in state):
        return {name: state}
    rest = {key: value for key, value in state.items() if key.partition(".")[0] not in averaged}
    parts: dict[str, Weights] = {} if is_ema(name) else {name: rest}
    for head in sorted(averaged):
        part = {key: value for key, value in state.items() if key.startswith(head + ".")}
        parts[f"{name}.{head}" if name else head] = part
    return parts


def _all_tensors(values: Any) -> bool:
    return all(isinstance(value, Tensor) for value in values)
