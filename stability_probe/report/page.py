"""The page: runs and verdicts in one HTML file that needs nothing else."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stability_probe.report import blame, sides, summary, texts
from stability_probe.report.explanations import STATUSES, Explanation, explain
from stability_probe.report.pictures import pictures
from stability_probe.runs import Run
from stability_probe.runs.commands import command_of
from stability_probe.runs.resuming import refuse_unwritable, write_whole
from stability_probe.verify import Evidence, Verdict, gather, verify

WHAT = "the report cannot be written"
ORDER = list(STATUSES)
"""Statuses by how much they need attention."""
_KINDS = {"3.2": "Lemma"}
COSTS = {
    "hooks_s": "hooks", "step_s": "steps", "flush_s": "storing",
    "sensitivity_s": "scheduled measurements", "elapsed_s": "whole run",
}  # fmt: skip
"""What `run.json` says of the probe's own cost, in seconds."""


@dataclass(frozen=True)
class Claim:
    """A claim of a theorem, with what it means.

    Attributes:
        anchor: where in the page it is explained.
        name: what it is called here.
        theorem: with its kind: `Theorem 3.4`.
        text: the claim.
        meaning: in plain words; `None` if nothing more is known.
    """

    anchor: str
    name: str
    theorem: str
    text: str
    meaning: Explanation | None


@dataclass(frozen=True)
class Again:
    """How to make a run again, and what it was.

    Attributes:
        run: its name.
        kind: what kind of run it is, in words.
        path: its folder.
        command: a line for a shell; `None` if it is not known.
        settings: by name.
        versions: of what it was recorded with.
    """

    run: str
    kind: str
    path: str
    command: str | None
    settings: dict[str, str]
    versions: dict[str, str]


def write_report(
    runs: Sequence[Run], file: str | Path, verdicts: Sequence[Verdict] | None = None
) -> None:
    """Write the report of some runs, whole or not at all.

    Args:
        runs: at least one.
        file: what to write.
        verdicts: those on the runs, if they are known already.

    Raises:
        StabilityProbeError: if there is no run, one cannot be read, or the file cannot be written.
    """
    refuse_unwritable(Path(file), WHAT)
    evidence = gather(runs)
    page = render_report(evidence, verify(runs) if verdicts is None else verdicts)
    write_whole(Path(file), lambda partial: partial.write_text(page, encoding="utf-8"), WHAT)


def render_report(evidence: Sequence[Evidence], verdicts: Sequence[Verdict]) -> str:
    """The report as HTML.

    Args:
        evidence: from `verify.gather`.
        verdicts: from `verify.verify`, on the same runs.
    """
    script = _resource("report.js")
    return _environment().get_template("report.html").render(
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        summary=summary.summary(verdicts, len(evidence)),
        meaning=summary.meaning(verdicts),
        findings=summary.findings(verdicts),
        troubles=summary.troubles(evidence),
        verdicts=sorted(verdicts, key=lambda v: ORDER.index(v.status)),
        statuses=STATUSES,
        rank=ORDER.index,
        claims={claim.text: claim for claim in _claims(verdicts)},
        pictures=pictures(evidence),
        sides=sides.side_by_side(evidence),
        blames=blame.blame_of(evidence),
        costs=[(run.name, run.info["probe"]) for run in evidence if run.info.get("probe")],
        cost_names=COSTS,
        again=[_again(run) for run in evidence],
        version=version("stability_probe"),
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": texts.number, "key": texts.sort_key, "bar": texts.bar, "percent": texts.percent,
    }  # fmt: skip
    return environment


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _claims(verdicts: Iterable[Verdict]) -> list[Claim]:
    """Each claim once, in the order of the verdicts."""
    kinds = {v.claim: f"{_KINDS.get(v.theorem, 'Theorem')} {v.theorem}" for v in verdicts}
    found = []
    for i, (text, kind) in enumerate(kinds.items(), start=1):
        meaning = explain(text)
        name = meaning.name if meaning else text
        found.append(Claim(f"claim-{i}", name, kind, text, meaning))
    return found


def _again(run: Evidence) -> Again:
    path = str(run.info.get("path", ""))
    return Again(
        run=run.name,
        kind=sides.kind_of(run),
        path=path,
        command=command_of(run.info, f"{path or 'run'}-again"),
        settings=sides.settings_of(run),
        versions=run.info.get("versions") or {},
    )
