"""A state dict into a module: wrappers' prefixes off, everything that does not fit named.

`DataParallel` puts `module.` before every name, `torch.compile` puts `_orig_mod.`, Lightning the
attribute's name (`model.`, `net.`). Instead of a list of wrappers, the prefix is found: the one
under which the most names are the model's own. What is not under it was not loaded and is reported.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from stability_probe.checkpoints.reading import listed, problem, reading

_ANCHORS = 8
_PREFIXES = 64


@dataclass(frozen=True)
class Fit:
    """What did not fit, by name.

    Attributes:
        missing: in the model and not in the file.
        unexpected: in the file and not in the model.
        mismatched: in both, with another shape or another kind of number.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def __str__(self) -> str:
        return ", ".join(
            f"{len(names)} {kind} ({listed(names)})" for kind, names in vars(self).items() if names
        )


def common_prefix(names: Collection[str], wanted: Collection[str]) -> str:
    """The prefix that turns the most `names` into `wanted` ones; "" where none is better.

    >>> common_prefix(["module.a.w", "module.b.w", "step"], ["a.w", "b.w"])
    'module.'
    """
    wanted = set(wanted)
    anchors = sorted(wanted, key=lambda name: (-name.count("."), name))[:_ANCHORS]
    found = {n[: -len(a)] for a in anchors if a for n in names if n.endswith("." + a)}
    prefixes = ["", *sorted(found, key=lambda prefix: (len(prefix), prefix))[:_PREFIXES]]
    return max(
        prefixes,
        key=lambda p: sum(n.startswith(p) and n[len(p) :] in wanted for n in names),
    )


def unwrap(
    state: Mapping[str, Tensor], wanted: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The state under its common prefix without it, and the names that are not under it."""
    if not any("_orig_mod." in name for name in wanted):
        plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
        state = plain if len(plain) == len(state) else state
    prefix = common_prefix(state, wanted)
    inside = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
    return inside, [name for name in state if not name.startswith(prefix)]


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: Path, strict: bool) -> Fit:
    """Copy a state into a model.

    Raises:
        StabilityProbeError: if something does not fit and `strict` is set.
    """
    with reading(path, "the weights of this model", "give the factory of the model it is of"):
        own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        inside, outside = unwrap(state, own)
        wrong = {k: v for k, v in inside.items() if k in own and not _alike(v, own[k])}
        kept = {name: value for name, value in inside.items() if name not in wrong}
        result = model.load_state_dict(kept, strict=False)
    shared = {own[n].data_ptr() for n in kept if n in own and own[n].numel()}
    missing = [  # a tensor with two names may be stored under one of them
        n for n in result.missing_keys
        if n not in wrong and not (n in own and own[n].data_ptr() in shared)
    ]  # fmt: skip
    fit = Fit(missing, list(result.unexpected_keys) + outside, list(wrong))
    if strict and str(fit):
        first = next((f" ({n} is {_unlike(v, own[n])})" for n, v in wrong.items()), "")
        raise problem(path, f"does not fit {type(model).__name__}: {fit}{first}; give the "
                      "sizes it was trained with, or strict=False to load the rest")  # fmt: skip
    return fit


def conversion(stored: Iterable[Tensor], model: nn.Module) -> str:
    """Half a sentence on floating-point numbers that the model holds with another precision.

    >>> import torch
    >>> conversion([torch.ones(1, dtype=torch.bfloat16)], nn.Linear(1, 1))
    ', bfloat16 converted to float32'
    """
    own = {v.dtype for v in model.state_dict().values() if isinstance(v, Tensor)}
    others = {v.dtype for v in stored if v.is_floating_point()} - own
    kinds = [
        " and ".join(sorted(str(kind).removeprefix("torch.") for kind in dtypes))
        for dtypes in (others, {kind for kind in own if kind.is_floating_point})
    ]
    return f", {kinds[0]} converted to {kinds[1]}" if all(kinds) else ""


def name_in_order(model: nn.Module, values: list[Tensor], path: Path) -> dict[str, Tensor]:
    """Names for tensors that were saved in the order of `model.parameters()`.

    Raises:
        StabilityProbeError: if the numbers of tensors differ.
    """
    names = [name for name, _ in model.named_parameters()]
    if len(names) != len(values):
        raise problem(path, f"lists {len(values)} averaged tensors and {type(model).__name__} "
                      f"has {len(names)} parameters; give the factory of its model")  # fmt: skip
    return dict(zip(names, values, strict=True))


def _alike(value: Tensor, own: Tensor) -> bool:
    """Whether one tensor can be copied to another without changing what it means."""
    return (
        value.shape == own.shape
        and value.is_floating_point() == own.is_floating_point()
        and value.is_complex() == own.is_complex()
    )


def _unlike(value: Tensor, own: Tensor) -> str:
    """What tells two tensors apart: their shapes, or else their kinds of number."""
    if value.shape != own.shape:
        return f"{tuple(value.shape)} for {tuple(own.shape)}"
    return f"{value.dtype} for {own.dtype}"
