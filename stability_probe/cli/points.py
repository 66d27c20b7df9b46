"""What commands that measure a checkpoint share: network, scaling, samples at noise levels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stability_probe.checkpoints.conditions import TIMES
from stability_probe.checkpoints.noise import Schedule, default_levels, load_schedule, noised
from stability_probe.checkpoints.reading import brief
from stability_probe.cli.console import note
from stability_probe.cli.options import SubjectOptions, parse_numbers
from stability_probe.cli.subject import Subject, learned_scaling, open_subject
from stability_probe.errors import StabilityProbeError
from stability_probe.probes import ProbeBatch
from stability_probe.runs import ProbedPoint
from stability_probe.skips import Scaling, parse_scaling


@dataclass(frozen=True)
class PointOptions:
    """Where to measure a network.

    Attributes:
        noise_levels: numbers with commas between them; `None` for three of them.
        target: what the network predicts, to measure gradients with; `None` for none.
        scheme: a scaling of the skips to measure it under; `None` for the network as it is.
        sensitive: how many samples the norms of Jacobians are taken on.
    """

    noise_levels: str | None = None
    target: str | None = None
    scheme: str | None = None
    sensitive: int = 4


@dataclass(frozen=True)
class Prepared:
    """A network that is ready to be measured.

    Attributes:
        subject: the network.
        scheme: the scaling to measure it under; `None` for none.
        points: its samples at every noise level.
        notes: what was assumed.
    """

    subject: Subject
    scheme: Scaling | None
    points: list[ProbedPoint]
    notes: list[str]


def prepare(what: SubjectOptions, how: PointOptions) -> Prepared:
    """Load a network with long skips, and make samples for it; say what was assumed.

    Raises:
        StabilityProbeError: if one of these cannot be done.
    """
    schedule = load_schedule(what.checkpoint)
    subject = open_subject(what)
    if not subject.skips:
        raise StabilityProbeError(
            f"{what.checkpoint}: {type(subject.model).__name__} has no long skips (N = 0), which "
            "is all that the theorems are about; name merges of it with --skips SOURCE=SINK"
        )
    scheme = (
        parse_scaling(how.scheme)
        if how.scheme
        else learned_scaling(subject.checkpoint, subject.skips)
    )
    points, notes = points_of(subject, schedule, how)
    notes.append(f"scaling: {scheme.name if scheme else 'as found, none is added'}")
    for line in (subject.checkpoint.description, *_unfit(subject), *notes):
        note(line)
    return Prepared(subject, scheme, points, notes)


@contextmanager
def measurable(model: nn.Module, kept: str = "") -> Iterator[None]:
    """Turn what the network's own code raises into one line.

    Args:
        model: the network.
        kept: what was not lost, in words.
    """
    try:
        yield
    except StabilityProbeError:
        raise
    except Exception as error:  # the network's own code, or an operation without a derivative
        after = f"; {kept}" if kept else ""
        raise StabilityProbeError(
            f"{type(model).__name__} cannot be measured ({brief(error)}){after}"
        ) from error


def points_of(
    subject: Subject, schedule: Schedule, how: PointOptions
) -> tuple[list[ProbedPoint], list[str]]:
    """The samples at every noise level, and what was assumed."""
    inputs, samples, generator = subject.inputs, subject.samples, subject.generator
    notes = list(inputs.notes)
    x = inputs.args[0]
    if samples is not None:
        notes[0] = samples.note
    x0 = x if samples is None else samples.x0.to(x)
    if how.target is not None and inputs.time is None:
        raise StabilityProbeError(
            f"--target {how.target}: {type(subject.model).__name__} takes no noise level, so there "
            "is none to predict; leave --target away"
        )
    if inputs.time is None:
        if how.noise_levels:
            inputs.with_noise_level(0)  # says that there is none
        return [ProbedPoint(None, _batch(subject, x0, inputs.kwargs, None, how))], notes
    unit = TIMES[inputs.time] == "unit"
    levels = (
        default_levels(schedule, unit)
        if how.noise_levels is None
        else parse_numbers(how.noise_levels, "--noise-levels")
    )
    notes = [line for line in notes if not line.startswith(f"{inputs.time}:")]
    notes.append(f"{inputs.time}: {', '.join(f'{t:g}' for t in levels)}; {schedule.note}")
    points = []
    for t in levels:
        x_t, target = noised(x0, *schedule.alpha_sigma(t, unit), generator, how.target)
        kwargs = inputs.with_noise_level(t).kwargs
        points.append(ProbedPoint(t, _batch(subject, x_t, kwargs, target, how)))
    return points, notes


def _batch(
    subject: Subject,
    x: torch.Tensor,
    kwargs: dict[str, Any],
    target: torch.Tensor | None,
    how: PointOptions,
) -> ProbeBatch:
    if how.sensitive < 1:
        raise StabilityProbeError(f"--sensitive: must be at least 1, got {how.sensitive}")
    return ProbeBatch(
        (x,), kwargs, target=target, sensitive=how.sensitive,
        per_frame=subject.inputs.per_frame, whole=subject.whole,
    )  # fmt: skip


def _unfit(subject: Subject) -> list[str]:
    """What of the weights did not fit, where that was allowed."""
    found = subject.checkpoint
    named = (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        ("of another shape", found.mismatched),
    )
    return [f"{len(names)} weights {kind}: {', '.join(names)}" for kind, names in named if names]
