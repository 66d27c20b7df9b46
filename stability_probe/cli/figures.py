"""Writing figures to files."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stability_probe.errors import StabilityProbeError
from stability_probe.plots import all_figures
from stability_probe.runs import Run
from stability_probe.verify import gather

_FORBIDDEN = re.compile(r"[^\w.=-]+")
"""What is not put into the name of a file: blanks, colons, slashes."""


def save_figures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw all figures of some runs into a folder, as PNG.

    Raises:
        StabilityProbeError: if the folder cannot be written, or nothing can be drawn.
    """
    figures = all_figures(gather(runs))
    if not figures:
        raise StabilityProbeError("plot: the runs hold no records to draw")
    files, taken = [], Counter[str]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            plain = _FORBIDDEN.sub("-", name)
            taken[plain] += 1
            number = f"-{taken[plain]}" if taken[plain] > 1 else ""
            files.append(folder / f"{plain}{number}.png")
            figure.savefig(files[-1], bbox_inches="tight", dpi=130)
    except OSError as problem:
        raise StabilityProbeError(f"{folder}: cannot be written ({problem.strerror})") from problem
    return files
