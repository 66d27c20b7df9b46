"""`probe`: one checkpoint, from its file to verdicts and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stability_probe.checkpoints.conditions import TIMES
from stability_probe.checkpoints.noise import Schedule, default_levels, load_schedule, noised
from stability_probe.checkpoints.reading import brief
from stability_probe.cli.console import note, progress
from stability_probe.cli.figures import save_figures
from stability_probe.cli.options import SubjectOptions, parse_numbers
from stability_probe.cli.subject import Subject, learned_scaling, open_subject
from stability_probe.errors import StabilityProbeError
from stability_probe.probes import ProbeBatch, SensitivityConfig
from stability_probe.runs import ProbedPoint, ProbingConfig, Run, record_checkpoint
from stability_probe.runs.run import finite
from stability_probe.skips import Scaling, parse_scaling
from stability_probe.verify import Verdict, gather, verify
from stability_probe.verify.robustness import global_bound, sensitivity_table


@dataclass(frozen=True)
class ProbeOptions:
    """What to measure of a network.

    Attributes:
        out: the run folder to make.
        noise_levels: numbers with commas between them; `None` for three of them.
        target: what the network predicts, to measure gradients with; `None` for none.
        scheme: a scaling of the skips to probe it under; `None` for the network as it is.
        sensitive: how many samples the norms of Jacobians are taken on.
    """

    out: Path
    noise_levels: str | None = None
    target: str | None = None
    scheme: str | None = None
    sensitive: int = 4


@dataclass(frozen=True)
class Probed:
    """What came of it.

    Attributes:
        subject: the network.
        run: the run folder.
        verdicts: on every claim that one network can be held against.
        sensitivity: the hierarchy of Theorem 3.4 at every noise level.
        figures: the files that were drawn.
        notes: what was assumed.
        global_bound: Theorem 3.4 with constants that hold for all inputs, if there are some.
    """

    subject: Subject
    run: Run
    verdicts: list[Verdict]
    sensitivity: list[dict[str, Any]]
    figures: list[Path]
    notes: list[str]
    global_bound: float | None

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        levels = self.run.info["noise_levels"] or [None]
        rows = [{"noise_level": t, **row} for t, row in zip(levels, self.sensitivity, strict=True)]
        found: Any = finite(
            {
                "checkpoint": self.subject.checkpoint.description,
                "notes": self.notes,
                "skips": [s.as_dict() for s in self.subject.skips],
                "sensitivity": {
                    **mean_over_levels(self.sensitivity),
                    "global": self.global_bound,
                    "by_noise_level": rows,
                },
                "verdicts": [v.as_dict() for v in self.verdicts],
                "run": str(self.run.path),
                "figures": list(map(str, self.figures)),
            }
        )
        return dict(found)


def run_probe(what: SubjectOptions, how: ProbeOptions) -> Probed:
    """Load, measure, verify, draw.

    Raises:
        StabilityProbeError: if one of these cannot be done.
    """
    schedule = load_schedule(what.checkpoint)
    run = Run(how.out, {"checkpoint": str(what.checkpoint.resolve())})
    run.refuse_if_taken()
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
    for line in (subject.checkpoint.description, *_unfit(subject), *notes):
        note(line)
    _measure(subject, points, run, scheme, what, notes)
    verdicts = verify(run)
    run.write_json("verdicts.json", [v.as_dict() for v in verdicts])
    evidence = gather(run)[0]
    figures = save_figures([run], run.path / "figures")
    table, bound = sensitivity_table(evidence), global_bound(evidence)
    return Probed(subject, run, verdicts, table, figures, notes, bound)


def _measure(
    subject: Subject,
    points: Sequence[ProbedPoint],
    run: Run,
    scheme: Scaling | None,
    what: SubjectOptions,
    notes: list[str],
) -> None:
    info = {
        "scheme": scheme.name if scheme else "as found",
        "checkpoint": subject.checkpoint.description,
        "config": {"options": {k: str(v) for k, v in vars(what).items()}},
        "notes": notes,
    }
    config = ProbingConfig(SensitivityConfig(paths=True), what.seed)
    try:
        with progress() as display:
            task = display.add_task("noise levels", total=len(points))
            record_checkpoint(
                subject.model, subject.skips, points, run, scheme=scheme, info=info, config=config,
                on_point=lambda: display.advance(task),
                on_smaller=lambda n: note(f"out of memory: going on with {n} samples"),
            )  # fmt: skip
    except StabilityProbeError:
        raise
    except Exception as error:  # the network's own code, or an operation without a derivative
        raise StabilityProbeError(
            f"{type(subject.model).__name__} cannot be measured ({brief(error)}); what was "
            f"measured before is in {run.path}"
        ) from error


def points_of(
    subject: Subject, schedule: Schedule, how: ProbeOptions
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
    how: ProbeOptions,
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


def mean_over_levels(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over noise levels of everything but the gap, of which it is the largest."""
    mean: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0] is None:
            mean[key] = None
        elif isinstance(values[0], list):
            mean[key] = [sum(level) / len(rows) for level in zip(*values, strict=True)]
        else:
            mean[key] = max(values) if key == "gap" else sum(values) / len(rows)
    return mean
