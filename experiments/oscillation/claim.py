"""Features and parameters of unscaled networks oscillate during training; scaling damps it.

The oscillation of a feature is the range of its batch-mean energy over training: at the output
side, h_0, and as the geometric mean over all levels; that of a block's parameters is the range of
‖θ‖². Schemes are compared within a seed, so with the same weights at the start and the same
batches.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.examination import Examination, scheme_colours
from experiments.findings import Question
from experiments.measures import (
    feature_range,
    geometric_mean,
    output_range,
    over,
    parameter_range,
    skip_energy,
    slopes,
)
from experiments.studies import UNSCALED, Study, label
from stability_probe.plots.figures import BOUND, grid, legend, title

SCALED = ("inverse-sqrt2", "cs:0.7", "ls")
"""Of what the paper compares with unscaled training."""
KINDS = {
    "‖h_0‖²": output_range,
    "‖h_i‖², all levels": feature_range,
    "‖θ‖² of blocks": parameter_range,
}


def examine(studies: Sequence[Study]) -> Examination:
    """Ranges with a scheme over those without, and their slope against Σκ²."""
    questions, rows = [], []
    for study in studies:
        sums = study.table(skip_energy)
        for kind, measure in KINDS.items():
            ranges = study.table(measure)
            ratios = [geometric_mean(ranges.loc[s, list(SCALED)]) for s in ranges.index]
            questions.append(
                Question(
                    study.grid,
                    f"range of {kind}: mean of 1/√2, CS and LS over unscaled",
                    list(np.array(ratios) / ranges[UNSCALED].to_numpy()),
                    "below",
                )
            )
            rows += [
                {"grid": study.grid, "kind": kind, "scheme": label(s), "Σκ²": sums[s].mean(),
                 "range": geometric_mean(ranges[s]),
                 "over unscaled": geometric_mean(pd.Series(over(ranges, s, UNSCALED)))}
                for s in study.schemes
            ]  # fmt: skip
        question = "slope of log range of ‖h_0‖² on log Σκ² over schemes, κ = 0 left out"
        steep = slopes(study, study.table(KINDS["‖h_0‖²"]), sums)
        questions.append(Question(study.grid, question, steep, "above", 0.0, ratio=False))
    return Examination(questions, pd.DataFrame(rows), {"oscillation": _figure(studies)})


def _figure(studies: Sequence[Study]) -> Figure:
    """Range against Σκ², a point a run; features above, parameters below."""
    figure, axes = grid(len(KINDS), len(studies), size=(3.0, 2.5))
    colours = scheme_colours(studies)
    for c, study in enumerate(studies):
        sums = study.table(skip_energy)
        for r, (kind, measure) in enumerate(KINDS.items()):
            ax, ranges = axes[r, c], study.table(measure)
            for scheme in study.schemes:
                ax.scatter(sums[scheme], ranges[scheme], color=colours[scheme], s=28,
                           edgecolor="white", lw=0.5, label=label(scheme), zorder=3)  # fmt: skip
            ends = np.array([sums[sums > 0].min().min(), sums.max().max()])
            middle = geometric_mean(ranges[UNSCALED]) / ends[1]
            ax.plot(ends, middle * ends, color=BOUND, lw=1, label="∝ Σκ²")
            ax.set(xscale="symlog", yscale="log", xlabel="Σκ²")
            ax.set_xscale("symlog", linthresh=1)
            ax.set_xlim(left=-0.1)
            if r == 0:
                ax.set_title(study.grid)
            if c == 0:
                ax.set_ylabel(f"range of\n{kind}")
    legend(figure, axes[0, 0])
    title(figure, "Oscillation during training against the sum of squared coefficients")
    return figure
