"""The table of claims in the README, from the verdicts beside the claims."""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.examination import between_marks


def table(folder: Path, claims: Sequence[str]) -> str:
    """Claim, what was measured, verdict, link; those without a verdict are left out."""
    lines = ["| claim | what was measured | verdict |", "|---|---|---|"]
    for claim in claims:
        file = folder / claim / "verdict.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = list(dict.fromkeys(f["grid"].partition(",")[0] for f in found["findings"]))
        measured = f"[{found['title']}](experiments/{claim}/README.md): {', '.join(runs)}"
        lines.append(f"| {found['claim']} | {measured} | {found['verdict']} |")
    return "\n".join(lines)


def update(readme: Path, folder: Path, claims: Sequence[str]) -> None:
    """Put the table between its marks in the README."""
    text = readme.read_text(encoding="utf-8")
    readme.write_text(between_marks(text, table(folder, claims), "claims"), encoding="utf-8")
