"""What the figures of several claims have in common: a colour a scheme, and a panel a grid."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.measures import geometric_mean, skip_energy
from experiments.studies import UNSCALED, Member, Study, label
from stability_probe.plots.figures import BOUND, SCHEMES, grid, title

USUAL = (UNSCALED, "inverse-sqrt2", "cs:0.7", "ls", "uniform:0")
"""The schemes of most grids."""


def scheme_colours(studies: Sequence[Study]) -> dict[str, Any]:
    """One colour a scheme, the same in all panels; of the usual ones, in all figures."""
    there = dict.fromkeys(scheme for study in studies for scheme in study.schemes)
    order = [*USUAL, *(scheme for scheme in there if scheme not in USUAL)]
    palette = [*SCHEMES, *sns.color_palette("dark")]
    return {s: colour for s, colour in zip(order, palette, strict=False) if s in there}


def scheme_legend(figure: Figure, colours: Mapping[str, Any], reference: str = "") -> None:
    """One legend below all axes, and the name of the line that they are held against."""
    marks = [Line2D([], [], color=c, marker="o", ls="", label=label(s)) for s, c in colours.items()]
    if reference:
        marks.append(Line2D([], [], color=BOUND, lw=1, label=reference))
    figure.legend(handles=marks, loc="outside lower center", ncols=5)


def against_skip_energy(
    studies: Sequence[Study],
    measures: Mapping[str, Callable[[Member], float]],
    reference: str,
    heading: str,
) -> Figure:
    """Measures of every run against its Σκ², a point a run, with a line of slope 1.

    Args:
        studies: a column each.
        measures: a row each, by what its axis is called.
        reference: what the line is called.
        heading: the figure's title.
    """
    figure, axes = grid(len(measures), len(studies), size=(3.0, 2.5))
    colours = scheme_colours(studies)
    for c, study in enumerate(studies):
        sums = study.table(skip_energy)
        for r, (name, measure) in enumerate(measures.items()):
            ax, values = axes[r, c], study.table(measure)
            for scheme in study.schemes:
                ax.scatter(sums[scheme], values[scheme], color=colours[scheme], s=28,
                           edgecolor="white", lw=0.5, zorder=3)  # fmt: skip
            ends = np.array([sums[sums > 0].min().min(), sums.max().max()])
            ax.plot(ends, geometric_mean(values[UNSCALED]) / ends[1] * ends, color=BOUND, lw=1)
            ax.set_xscale("symlog", linthresh=1)
            ax.set(yscale="log", xlabel="Σκ²", xlim=(-0.1, 1.3 * ends[1]))
            ax.set_title(study.grid if r == 0 else "")
            ax.set_ylabel(name if c == 0 else "")
    scheme_legend(figure, colours, reference)
    title(figure, heading)
    return figure
