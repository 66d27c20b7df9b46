"""What to feed an arbitrary network: noise of shapes that are guessed from what it says of itself.

A network says two things: the signature of its `forward`, and its configuration (the `config` of
diffusers' models, a dataclass, or plain attributes such as `in_channels`). The first parameter is
x_t. Every other one that the table `MAKERS` of `conditions` knows by its *name* is made as the
configuration says, or left at its default where that says nothing. No class of network is
mentioned.

Each guess is one sentence in `ExampleInputs.notes`, for the reader to judge. The values are noise:
they exercise every path through the network, and mean nothing.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stability_probe.checkpoints.conditions import (
    MAKERS,
    TIMES,
    Network,
    find,
    noise_level,
    nothing,
)
from stability_probe.errors import StabilityProbeError

FRAMES = 4
"""Length of a video, where the configuration does not ask for a shorter one."""
COARSEST = 8
"""Height and width left at the coarsest resolution, where the configuration has no image size."""


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments to call a network with: `model(*inputs.args, **inputs.kwargs)`.

    Attributes:
        args: x_t, (batch, ...).
        kwargs: everything else, by the name of the parameter.
        notes: one sentence on each guess.
        time: which of `kwargs` is the noise level; `None` if the network takes none.
        per_frame: which of `kwargs` have a row a frame, sample after sample.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: list[str]
    time: str | None
    per_frame: frozenset[str] = frozenset()

    def with_noise_level(self, t: float | int | Tensor) -> "ExampleInputs":
        """The same inputs at noise level `t`, one number or one a sample.

        Raises:
            StabilityProbeError: if the network takes no noise level.
        """
        if self.time is None:
            raise StabilityProbeError(
                "this network takes no noise level: its forward has no parameter named timestep, "
                "t, sigma or the like; probe it as it is"
            )
        old = torch.as_tensor(self.kwargs[self.time])
        new = torch.as_tensor(t).to(old).expand(len(self.args[0]))
        return replace(self, kwargs=self.kwargs | {self.time: new})


def example_inputs(
    model: nn.Module,
    shape: tuple[int, ...] | None = None,
    *,
    batch: int = 8,
    generator: torch.Generator,
    config: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> ExampleInputs:
    """Inputs for any network, in its own dtype and on its device.

    Args:
        model: the network; its parameters are not touched.
        shape: of one x_t, without the batch: (C, H, W), (C, D, H, W), (C, L) or (m,); guessed from
            the configuration if `None`.
        batch: number of samples.
        generator: source of the noise, on the CPU.
        config: what the model's own configuration leaves out; it has precedence.
        given: values of parameters that the caller knows, by name.

    Raises:
        StabilityProbeError: if the shape, or a parameter that the network needs, cannot be guessed,
            or `given` names a parameter that there is not.

    >>> net = nn.Conv2d(3, 3, kernel_size=1)
    >>> inputs = example_inputs(net, (3, 4, 4), batch=2, generator=torch.Generator())
    >>> inputs.args[0].shape, inputs.kwargs, inputs.notes
    (torch.Size([2, 3, 4, 4]), {}, ['input: Gaussian noise (2, 3, 4, 4), of the given shape'])
    """
    first, *rest = _parameters(model)
    names = tuple(p.name for p in rest)
    known = _configuration(model) | dict(config or {})
    given = dict(given or {})
    _check_given(model, given, names)
    source = "of the given shape"
    if shape is None:
        shape, source = _guess_shape(model, known, names)
    if not shape or min(shape) < 1 or batch < 1:
        raise StabilityProbeError(
            f"example inputs: the batch and every dimension must be at least 1, got {batch} and "
            f"{','.join(map(str, shape))}; pass --input C,H,W"
        )
    net = Network(type(model).__name__, known, names, shape, batch, generator, _like(model))
    x, why = net.gaussian(*shape, source=source)
    notes, kwargs, time = [f"{first.name}: {why}"], dict(given), None
    for p in rest:
        required = p.default is p.empty
        is_time = p.name in TIMES and (required or time is None)
        if is_time and time is None:
            time = p.name
        if p.name in given:
            notes.append(f"{p.name}: as given")
            continue
        made = noise_level(net, p) if is_time else MAKERS.get(p.name, nothing)(net)
        if made is not None:
            kwargs[p.name] = made[0]
            notes.append(f"{p.name}: {made[1]}")
        elif required:
            raise net.cannot_guess(p.name, [first.name, *kwargs])
    rows = batch * shape[1] if "motion_max_seq_length" in known and len(shape) > 3 else batch
    several = [k for k, v in kwargs.items() if isinstance(v, Tensor) and batch < len(v) == rows]
    return ExampleInputs((x,), kwargs, notes, time, frozenset(several))


# ── what the network says of itself ──────────────────────────────────────────────────────────────


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of `forward`, x_t first."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    every = list(inspect.signature(model.forward).parameters.values())
    found = [p for p in every if p.kind not in variadic]
    if not found:
        found = [inspect.Parameter("x", inspect.Parameter.POSITIONAL_ONLY)]
    if found[0].name in TIMES:
        raise StabilityProbeError(
            f"{type(model).__name__}.forward takes the noise level {found[0].name!r} before x_t; "
            "pass --model package.module:factory with a factory that wraps the model so that x_t "
            "comes first"
        )
    return found


def _check_given(model: nn.Module, given: Mapping[str, Any], names: tuple[str, ...]) -> None:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    unknown = [name for name in given if name not in names]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise StabilityProbeError(
            f"{type(model).__name__}.forward has no parameter {unknown[0]!r} beside x_t; it takes "
            f"{', '.join(names) or 'nothing else'}"
        )


def _configuration(model: nn.Module) -> dict[str, Any]:
    """The model's `config`, and where that is silent its plain attributes."""
    attributes = {k: v for k, v in vars(model).items() if isinstance(v, int | str | tuple | list)}
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return attributes | dict(config)
    if dataclasses.is_dataclass(config):
        return attributes | {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return attributes | (vars(config) if hasattr(config, "__dict__") else {})


def _like(model: nn.Module) -> Tensor:
    """An empty tensor of the model's dtype and device."""
    floats = (p for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.empty(0)).detach().new_empty(0)


def _guess_shape(
    model: nn.Module, config: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[tuple[int, ...], str]:
    """The shape of one x_t, and what it was taken from."""
    if config.get("input_shape"):
        return config["input_shape"], "what it was exported for"
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kinds = [len(m.kernel_size) for m in model.modules() if isinstance(m, convolutions)]
    if not kinds and find(config, "m"):
        return (config["m"],), f"from m={config['m']}"
    size, where = _image_size(config, kinds[0] if kinds else 0)
    channels = find(config, "in_channels", "in_chans")
    if channels is None or not size:
        missing = "channels" if channels is None else "height and width"
        raise StabilityProbeError(
            f"the shape of an input to {type(model).__name__} cannot be guessed: its configuration "
            f"does not give its {missing}; pass --input C,H,W (C,D,H,W for video)"
        )
    shape, source = (channels[1], *size), f"from {channels[0]}={channels[1]} and {where}"
    length = find(config, "num_frames", "motion_max_seq_length")
    if len(size) == 2 and (3 in kinds or length):
        frames = min(FRAMES, length[1] if length else FRAMES)
        in_front = "added_time_ids" in names  # networks that take these have (frames, C, H, W)
        shape = (frames, *shape) if in_front else (shape[0], frames, *size)
        source += f", with {frames} frames"
    return shape, source


def _image_size(config: Mapping[str, Any], dims: int) -> tuple[tuple[int, ...], str]:
    """The spatial dimensions, or none, and what they were taken from."""
    for key in ("sample_size", "img_size", "image_size", "input_size"):
        value = config.get(key)
        if isinstance(value, int):
            return (value,) * dims, f"{key}={value}"
        if isinstance(value, tuple | list) and len(value) == dims:
            return tuple(value), f"{key}={tuple(value)}"
    levels = config.get("block_out_channels")
    if isinstance(levels, tuple | list):
        n = len(levels)
        return (COARSEST * 2 ** (n - 1),) * dims, f"its {n} resolutions (no size is given)"
    return (), ""
