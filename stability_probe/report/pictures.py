"""Figures as data URIs, with what to look for in them.

They are drawn on white and shown on a white card in dark mode as well: their colours are chosen for
that. As PNG their size does not grow with the number of training steps.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from PIL import Image

from stability_probe.plots import all_figures
from stability_probe.plots.tables import scheme_label
from stability_probe.report.explanations import CAPTIONS, Caption
from stability_probe.verify import Evidence

DPI = 150
"""Dots an inch."""
CSS_DPI = 96
"""What browsers take for an inch."""
OF_ONE_RUN = ("features", "gradients", "sensitivity")
"""Figures with a panel a scheme, which is its first run."""


@dataclass(frozen=True)
class Picture:
    """A figure in the page.

    Attributes:
        caption: what it is called, and what to look for.
        of: which runs it is of, in words.
        source: the image as a data URI.
        width, height: of the image, in CSS pixels.
    """

    caption: Caption
    of: str
    source: str
    width: int
    height: int


def pictures(evidence: Sequence[Evidence]) -> list[Picture]:
    """Every figure that the evidence has the records for; those of checkpoints one by one."""
    together = [run for run in evidence if run.kind != "checkpoint"]
    found = [
        _picture(name, figure, _whose(name, together))
        for name, figure in all_figures(together).items()
    ]
    for run in (run for run in evidence if run.kind == "checkpoint"):
        found += [_picture(name, f, f"Run: {run.name}.") for name, f in all_figures([run]).items()]
    return found


def _whose(name: str, runs: Sequence[Evidence]) -> str:
    """Of which runs a figure is, where a scheme has several and it shows one of them."""
    training = [run for run in runs if run.kind == "training" and run.n_skips]
    first: dict[str, str] = {}
    for run in training:
        first.setdefault(scheme_label(run), run.name)
    if name not in OF_ONE_RUN or len(first) == len(training):
        return ""
    return f"Of each scheme one run is shown: {', '.join(first.values())}."


def _picture(name: str, figure: Figure, of: str) -> Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    with Image.open(file) as image:
        width, height = (round(pixels * CSS_DPI / DPI) for pixels in image.size)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(CAPTIONS.get(name, Caption(name, "")), of, source, width, height)
