"""Any checkpoint to a module in evaluation mode on the CPU.

    path ──► kind (by content) ──► weights (the ones asked for) ──► model ──► fit

The model comes, in this order, from the caller's factory; from the file itself (a pickled module or
a torch.export archive, both only if trusted); from a diffusers `config.json`; from the shapes of an
official U-ViT. Nothing is downloaded, and no code in a file is run unless the caller trusts it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stability_probe.checkpoints.factory import Factory, build_within, call_factory, factory_name
from stability_probe.checkpoints.fit import Fit, conversion, load_into, name_in_order
from stability_probe.checkpoints.folders import diffusers_builder
from stability_probe.checkpoints.formats import Kind
from stability_probe.checkpoints.reading import problem, reading
from stability_probe.checkpoints.source import Source, Wanted, read_source
from stability_probe.checkpoints.state import tensors_of
from stability_probe.checkpoints.uvit_layout import (
    describe,
    infer_config,
    split_scaling,
    uvit_state,
)
from stability_probe.models import UViT


@dataclass(frozen=True)
class Checkpoint:
    """A model from a checkpoint.

    Attributes:
        model: in evaluation mode, on the CPU.
        format: "diffusers", "safetensors", "torch", "legacy torch", "legacy torch tar" or
            "torch.export".
        description: one line for people: what it is, what was assumed.
        config: what is known of the model.
        missing: names in the model that the file does not have.
        unexpected: names in the file that the model does not have.
        mismatched: names in both, with another shape or kind of number; not loaded.
        scaling_state: tensors of a learnable scaling (LS) of U-ViT's skips, which belong to the
            scheme and not to the model.
    """

    model: nn.Module
    format: str
    description: str
    config: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    scaling_state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Request:
    """What the caller asked for, beside the weights."""

    factory: str | Factory | None
    args: dict[str, Any]
    strict: bool


def load_checkpoint(
    path: str | Path,
    *,
    factory: str | Factory | None = None,
    factory_args: Mapping[str, Any] | None = None,
    weights: str = "model",
    trust_pickle: bool = False,
    strict: bool = True,
) -> Checkpoint:
    """Load a checkpoint.

    The model has the dtypes that it is built with, float32 unless its factory says otherwise:
    weights that were stored with another precision are converted, and the description says so. A
    module that comes whole, and an exported program, keep theirs.

    Args:
        path: a diffusers model or pipeline folder (of a pipeline, `unet` or `transformer` is
            taken), a folder or file of weights, or a torch.export archive.
        factory: "package.module:function", or the function, that makes the model; weights alone
            need one, except those of an official U-ViT.
        factory_args: its arguments; without a factory, settings of the U-ViT such as `num_heads`.
        weights: "model", "ema" for averaged weights, or the name of one of several in the file.
        trust_pickle: run code that the file may hold; needed for pickles of more than tensors.
        strict: raise if a name or a shape does not fit; otherwise these are in the result.

    Warns:
        UserWarning: if a trusted file is read, as this runs code from it.

    Raises:
        StabilityProbeError: if the path holds no such checkpoint, the file is damaged or needs
            trust, the factory fails, or the weights do not fit.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "linear.pt"
    >>> torch.save({"step": 7, "state_dict": nn.Linear(2, 3).state_dict()}, path)
    >>> sizes = {"in_features": 2, "out_features": 3}
    >>> load_checkpoint(path, factory=nn.Linear, factory_args=sizes).model
    Linear(in_features=2, out_features=3, bias=True)
    """
    request = _Request(factory, dict(factory_args or {}), strict)
    source = read_source(Path(path), Wanted(weights, trust_pickle))
    loaded = _from_factory(source, request) if factory is not None else _from_file(source, request)
    with reading(source.path, "a model"):
        loaded.model.cpu().eval()
    return loaded


def _from_factory(source: Source, request: _Request) -> Checkpoint:
    assert request.factory is not None
    model = call_factory(request.factory, request.args)
    fit = _load(model, source, request)
    factory = factory_name(request.factory)
    config = {**source.config, "factory": factory, "factory_args": request.args}
    return _checkpoint(model, source, f"{type(model).__name__} of {factory}", config, fit)


def _from_file(source: Source, request: _Request) -> Checkpoint:
    """The model that the file itself tells."""
    weights = source.weights
    if isinstance(weights, nn.Module):
        exported = source.format == Kind.EXPORT.value
        what = "exported program, its class names lost" if exported else "module stored whole"
        what = f"{type(weights).__name__}, {what}"
        return _checkpoint(weights, source, what, {"class": type(weights).__qualname__})
    if source.folder is not None:
        return _from_diffusers(source, request)
    state = uvit_state(tensors_of(weights, source.path)) if isinstance(weights, Mapping) else None
    if state is not None:
        return _from_uvit(state, source, request)
    raise problem(source.path, "holds weights alone, and not those of an official U-ViT; say "
                  "what they are of with --model package.module:function (factory)")  # fmt: skip


def _from_diffusers(source: Source, request: _Request) -> Checkpoint:
    assert source.folder is not None
    if request.args:
        raise problem(source.folder, "factory_args need a factory: config.json has the settings")
    make = diffusers_builder(source.folder, source.config)
    model = build_within(source.folder / "config.json", make, source.tensors)
    fit = _load(model, source, request)
    return _checkpoint(model, source, f"{type(model).__name__} of diffusers", source.config, fit)


def _from_uvit(state: dict[str, Tensor], source: Source, request: _Request) -> Checkpoint:
    own, scaling = split_scaling(state)
    config = infer_config(own, request.args, source.path)
    model = build_within(source.path, lambda: UViT(config), list(own.values()))
    fit = load_into(model, own, source.path, request.strict)
    scaling = {name: value.clone() for name, value in scaling.items()}  # not the file's memory
    what = describe(config, request.args, scaling)
    return _checkpoint(model, source, what, asdict(config), fit, scaling)


def _load(model: nn.Module, source: Source, request: _Request) -> Fit:
    """Put the weights of a source into a model."""
    state = tensors_of(source.weights, source.path)
    if not isinstance(source.weights, Mapping | nn.Module):
        state = name_in_order(model, list(state.values()), source.path)
    if rename := getattr(model, "_fix_state_dict_keys_on_load", None):
        with reading(source.path, "the weights of this model"):
            rename(state)  # names from before diffusers 0.13
    return load_into(model, state, source.path, request.strict)


def _checkpoint(
    model: nn.Module,
    source: Source,
    what: str,
    config: dict[str, Any],
    fit: Fit | None = None,
    scaling: dict[str, Tensor] | None = None,
) -> Checkpoint:
    name = f", weights {source.name!r}" if source.name else ""
    cast = conversion(source.tensors, model) if fit is not None else ""
    line = " ".join(f"{what} ({source.format}{name}{cast})".split())
    return Checkpoint(
        model,
        source.format,
        line,
        config,
        **vars(fit or Fit([], [], [])),
        scaling_state=scaling or {},
    )
