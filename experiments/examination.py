"""What the examination of a claim gives, and how it is written beside the claim."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Question, answer_all, overall, rounded
from stability_probe.verify.statistics import ALPHA

MARKS = "<!-- {}: begin -->", "<!-- {}: end -->"
"""What made parts of a page stand between."""


@dataclass(frozen=True)
class Examination:
    """What was asked of the runs, and what is shown of them.

    Attributes:
        questions: on which the verdict rests.
        table: numbers behind them.
        figures: by file name.
    """

    questions: Sequence[Question]
    table: pd.DataFrame
    figures: Mapping[str, Figure]


def write(found: Examination, folder: Path, config: Mapping[str, Any], command: str) -> str:
    """Write table, figures, verdict and page of a claim into a folder, and give the verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    findings = answer_all(found.questions)
    verdict = {
        "title": config["title"],
        "claim": config["claim"],
        "verdict": overall(findings),
        "confidence": 1 - ALPHA / len(findings),
        "command": command,
        "findings": [finding.as_dict() for finding in findings],
        "figures": list(found.figures),
    }
    text = json.dumps(verdict, indent=1, ensure_ascii=False)
    (folder / "verdict.json").write_text(text + "\n", encoding="utf-8")
    shown = found.table.map(lambda v: rounded(v) if isinstance(v, float) else v)
    shown.to_csv(folder / "results.csv", index=False)
    for name, figure in found.figures.items():
        figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
    _put_into(folder / "README.md", verdict)
    return str(verdict["verdict"])


def results(verdict: Mapping[str, Any]) -> str:
    """The part of a claim's page that follows from its runs."""
    header = ("runs", "question", "claimed", "found", f"{verdict['confidence']:.1%} interval", "n")
    lines = [
        f"**{verdict['verdict']}**", "",
        f"| {' | '.join(header)} | verdict |",
        f"|{'---|' * (len(header) + 1)}",
        *(_row(finding) for finding in verdict["findings"]), "",
        *(f"![{verdict['title']}]({name}.png)" for name in verdict["figures"]), "",
        f"Numbers behind it: `results.csv`, `verdict.json`. Made by `{verdict['command']}`.",
    ]  # fmt: skip
    return "\n".join(lines)


def _row(finding: Mapping[str, Any]) -> str:
    known = finding["estimate"] is not None
    interval = f"{finding['low']} … {finding['high']}" if known else "not finite"
    cells = [finding[name] for name in ("grid", "question", "claimed")]
    cells += [finding["estimate"] if known else "–", interval, finding["n"], finding["verdict"]]
    return f"| {' | '.join(map(str, cells))} |"


def _put_into(page: Path, verdict: Mapping[str, Any]) -> None:
    """Put the results between their marks on a page, which is begun if there is none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = (mark.format("results") for mark in MARKS)
    if begin not in text:
        text = f"# {verdict['title']}\n\n{verdict['claim']}\n\n{begin}\n{end}\n"
    page.write_text(between_marks(text, results(verdict), "results"), encoding="utf-8")


def between_marks(text: str, made: str, name: str) -> str:
    """A page with one of its made parts replaced.

    >>> print(between_marks("a <!-- x: begin --> old <!-- x: end --> b", "new", "x"))
    a <!-- x: begin -->
    new
    <!-- x: end --> b
    """
    begin, end = (mark.format(name) for mark in MARKS)
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{made}\n{end}", text)
