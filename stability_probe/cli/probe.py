"""`probe`: one checkpoint, from its file to verdicts and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stability_probe.cli.console import note, progress
from stability_probe.cli.figures import save_figures
from stability_probe.cli.options import SubjectOptions
from stability_probe.cli.points import PointOptions, Prepared, measurable, prepare
from stability_probe.cli.subject import Subject
from stability_probe.probes import SensitivityConfig
from stability_probe.runs import ProbingConfig, Run, record_checkpoint
from stability_probe.runs.run import finite
from stability_probe.verify import Verdict, gather, verify
from stability_probe.verify.robustness import global_bound, sensitivity_table


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


def run_probe(what: SubjectOptions, how: PointOptions, out: Path) -> Probed:
    """Load, measure, verify, draw.

    Args:
        what: the network.
        how: where to measure it.
        out: the run folder to make.

    Raises:
        StabilityProbeError: if one of these cannot be done.
    """
    run = Run(out, _asked(what, how))
    run.refuse_if_taken()
    found = prepare(what, how)
    _measure(found, run, what)
    verdicts = verify(run)
    run.write_json("verdicts.json", [v.as_dict() for v in verdicts])
    evidence = gather(run)[0]
    figures = save_figures([run], run.path / "figures")
    table, bound = sensitivity_table(evidence), global_bound(evidence)
    return Probed(found.subject, run, verdicts, table, figures, found.notes, bound)


def _asked(what: SubjectOptions, how: PointOptions) -> dict[str, Any]:
    """What the user said, as JSON has it."""
    asked = {**vars(what), **vars(how), "checkpoint": what.checkpoint.resolve()}
    return {name: str(v) if isinstance(v, Path) else v for name, v in asked.items()}


def _measure(found: Prepared, run: Run, what: SubjectOptions) -> None:
    subject, scheme = found.subject, found.scheme
    info = {
        "scheme": scheme.name if scheme else "as found",
        "checkpoint": subject.checkpoint.description,
        "notes": found.notes,
    }
    config = ProbingConfig(SensitivityConfig(paths=True), what.seed)
    kept = f"what was measured before is in {run.path}"
    with measurable(subject.model, kept), progress() as display:
        task = display.add_task("noise levels", total=len(found.points))
        record_checkpoint(
            subject.model, subject.skips, found.points, run, scheme=scheme, info=info,
            config=config, on_point=lambda: display.advance(task),
            on_smaller=lambda n: note(f"out of memory: going on with {n} samples"),
        )  # fmt: skip


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
