"""From a checkpoint on the command line to a network, an input for it, and its long skips."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stability_probe.checkpoints import Checkpoint, load_checkpoint
from stability_probe.checkpoints.inputs import ExampleInputs, example_inputs
from stability_probe.checkpoints.reading import brief
from stability_probe.checkpoints.samples import Samples, load_arguments, load_samples
from stability_probe.cli.console import note
from stability_probe.cli.options import (
    SubjectOptions,
    parse_json_object,
    parse_pairs,
    parse_shape,
)
from stability_probe.errors import StabilityProbeError
from stability_probe.skips import (
    LearnableScaling,
    SkipConnection,
    choose_skips,
    find_skips,
)

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Subject:
    """A network to look at.

    Attributes:
        checkpoint: what it was loaded from; `checkpoint.model` is on the device.
        skips: its long skips.
        inputs: an example input, as many samples as asked for.
        samples: clean samples, if some were given.
        whole: whether the network takes batches of just this size.
        generator: the source of all further noise.
    """

    checkpoint: Checkpoint
    skips: list[SkipConnection]
    inputs: ExampleInputs
    samples: Samples | None
    whole: bool
    generator: torch.Generator

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.checkpoint.model


def open_subject(options: SubjectOptions) -> Subject:
    """Load a checkpoint, build inputs for it and find its long skips.

    Raises:
        StabilityProbeError: if one of these cannot be done.
    """
    pairs = parse_pairs(options.skips)
    place = _place(options.device, options.dtype)
    if options.batch < 1:
        raise StabilityProbeError(f"--batch: must be at least 1, got {options.batch}")
    checkpoint = load_checkpoint(
        options.checkpoint,
        factory=options.model,
        factory_args=parse_json_object(options.model_args, "--model-args"),
        weights=options.weights,
        trust_pickle=options.trust_pickle,
        strict=not options.partial,
    )
    _move(checkpoint.model, place)
    generator = torch.Generator().manual_seed(options.seed)
    size = getattr(checkpoint.model, "batch_size", None)  # of an exported program
    fixed = size if isinstance(size, int) else None
    if fixed is not None and fixed != options.batch:
        note(f"{options.checkpoint}: exported for batches of {fixed}, which is what it is given")
    inputs, samples = _inputs(checkpoint, options, fixed or options.batch, generator)
    try:
        if pairs:
            skips = choose_skips(pairs, checkpoint.model, *inputs.args, **inputs.kwargs)
        else:
            skips = find_skips(checkpoint.model, *inputs.args, **inputs.kwargs)
    except StabilityProbeError:
        raise
    except Exception as error:  # the network's own code, on inputs that were guessed
        raise StabilityProbeError(
            f"{type(checkpoint.model).__name__} fails on an input of shape "
            f"{tuple(inputs.args[0].shape)} ({brief(error)}); what was passed: "
            f"{'; '.join(inputs.notes)}; pass --input, or --kwargs"
        ) from error
    return Subject(checkpoint, skips, inputs, samples, fixed is not None, generator)


def _place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where the network goes, and in which precision."""
    if dtype not in DTYPES:
        raise StabilityProbeError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StabilityProbeError(f"--device {device!r}: cannot be used ({reason})") from error
    return torch.device(device), getattr(torch, dtype)


def _move(model: nn.Module, place: tuple[torch.device, torch.dtype]) -> None:
    """Put a network where it goes; diffusers warns of casts, also of those that change nothing."""
    device, dtype = place
    model.to(device)
    if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        model.to(dtype)


def _inputs(
    checkpoint: Checkpoint, options: SubjectOptions, batch: int, generator: torch.Generator
) -> tuple[ExampleInputs, Samples | None]:
    """Inputs of the shape, or the samples, that were asked for."""
    text = options.input
    shape = None if text is None else parse_shape(text)
    given = {} if options.kwargs is None else load_arguments(options.kwargs)

    def build(shape: tuple[int, ...] | None, given: dict[str, Tensor], batch: int) -> ExampleInputs:
        like = next(iter(checkpoint.model.parameters()), torch.empty(0))
        moved = {name: _moved(value, like) for name, value in given.items()}
        return example_inputs(
            checkpoint.model, shape, batch=batch, generator=generator, config=checkpoint.config,
            given=moved,
        )  # fmt: skip

    if text is None or shape is not None:
        return build(shape, given, batch), None
    path = Path(text)
    if not path.exists():
        raise StabilityProbeError(
            f"--input {text!r}: neither a shape such as 3,32,32 nor a file or folder that exists"
        )
    fit = tuple(build(None, given, batch).args[0].shape[1:]) if path.is_dir() else None
    samples = load_samples(path, fit, batch)
    shape = tuple(samples.x0.shape[1:])
    return build(shape, samples.given | given, len(samples.x0)), samples


def _moved(value: Tensor, like: Tensor) -> Tensor:
    """A tensor on the network's device, and in its precision if it holds fractions."""
    dtype = like.dtype if value.is_floating_point() else value.dtype
    return value.to(like.device, dtype)


def learned_scaling(checkpoint: Checkpoint, skips: list[SkipConnection]) -> LearnableScaling | None:
    """The learnable scaling (LS) that a checkpoint was trained with, its weights loaded.

    Raises:
        StabilityProbeError: if its weights are not those of gates for these skips.
    """
    state = {k.partition(".")[2]: v for k, v in checkpoint.scaling_state.items()}
    if not state:
        return None
    first = next(v for name, v in state.items() if name.endswith("layer1.weight"))
    scheme = LearnableScaling("layer1.weight" in state, max(1, first.shape[1] // first.shape[0]))
    scheme.prepare(skips)
    try:
        scheme.load_state_dict(state)
    except RuntimeError as error:
        raise StabilityProbeError(
            f"the learnable scaling (LS) in the checkpoint does not fit its skips: {error}"
        ) from error
    return scheme
