"""What the examination of a claim gives, and how it is written beside the claim."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from experiments.findings import Finding, Question, Shares, answer_all, overall, rounded
from experiments.studies import Study

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

    questions: Sequence[Question | Shares]
    table: pd.DataFrame
    figures: Mapping[str, Figure]


def scheme_colours(studies: Sequence[Study]) -> dict[str, Any]:
    """One colour a scheme, the same in all panels."""
    schemes = dict.fromkeys(scheme for study in studies for scheme in study.schemes)
    palette = sns.color_palette("tab20", 20)
    return {scheme: palette[(2 * i + i // 10) % 20] for i, scheme in enumerate(schemes)}


def write(found: Examination, folder: Path, config: Mapping[str, Any], command: str) -> str:
    """Write table, figures and verdict of a claim into a folder, and give the verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    findings = answer_all(found.questions)
    verdict = {
        "title": config["title"],
        "claim": config["claim"],
        "verdict": overall(findings),
        "command": command,
        "findings": [finding.as_dict() for finding in findings],
    }
    text = json.dumps(verdict, indent=1, ensure_ascii=False)
    (folder / "verdict.json").write_text(text + "\n", encoding="utf-8")
    shown = found.table.map(lambda v: rounded(v) if isinstance(v, float) else v)
    shown.to_csv(folder / "results.csv", index=False)
    for name, figure in found.figures.items():
        figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
    _put_into(folder / "README.md", _results(verdict, findings, list(found.figures)), config)
    return str(verdict["verdict"])


def _results(verdict: Mapping[str, Any], findings: Sequence[Finding], figures: list[str]) -> str:
    """The part of a claim's page that follows from its runs."""
    confidence = f"{findings[0].confidence:.1%}" if findings else ""
    lines = [
        f"**{verdict['verdict']}**", "",
        f"| runs | question | claimed | found | {confidence} interval | n | verdict |",
        "|---|---|---|---|---|---|---|",
        *(_row(finding) for finding in findings), "",
        *(f"![{verdict['title']}]({name}.png)" for name in figures), "",
        f"Numbers behind it: `results.csv`, `verdict.json`. Made by `{verdict['command']}`.",
    ]  # fmt: skip
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    row = finding.as_dict()
    question = row["question"].replace("|", r"\|")
    interval = f"{row['low']} … {row['high']}"
    cells = (row["grid"], question, row["claimed"], row["estimate"], interval, row["n"])
    return f"| {' | '.join(map(str, cells))} | {row['verdict']} |"


def _put_into(page: Path, results: str, config: Mapping[str, Any]) -> None:
    """Put the results between their marks on a page, which is begun if there is none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = (mark.format("results") for mark in MARKS)
    if begin not in text:
        text = f"# {config['title']}\n\n{config['claim']}\n\n{begin}\n{end}\n"
    page.write_text(between_marks(text, results, "results"), encoding="utf-8")


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
