"""1/√2 helps against 1, CS against 1/√2, LS most; κ = 0 is most stable and cannot represent.

Stability is the oscillation at the output side, the range of the batch-mean ‖h_0‖² over training;
what it costs is the loss at the end. On a Pareto figure both are small.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.examination import Examination
from experiments.figures import scheme_colours, scheme_legend
from experiments.findings import Question
from experiments.measures import final_loss, geometric_mean, output_range, over
from experiments.studies import UNSCALED, Study, label
from stability_probe.plots.figures import grid, title

NONE, ROOT, CS, LS = "uniform:0", "inverse-sqrt2", "cs:0.7", "ls"
STEPS = ((ROOT, UNSCALED), (CS, ROOT), (LS, CS), (NONE, LS))
"""Schemes that are said to be more stable than others."""


def examine(studies: Sequence[Study]) -> Examination:
    """Ranges of each scheme over those of the one it is said to improve on."""
    questions, rows = [], []
    for study in studies:
        ranges, losses = study.table(output_range), study.table(final_loss)
        for scheme, other in STEPS:
            text = f"range of ‖h_0‖², {label(scheme)} over {label(other)}"
            questions.append(Question(study.grid, text, over(ranges, scheme, other), "below"))
        text = f"final loss, {label(NONE)} over {label(UNSCALED)}"
        questions.append(Question(study.grid, text, over(losses, NONE, UNSCALED), "above"))
        rows += [
            {"grid": study.grid, "scheme": label(s), "range": geometric_mean(ranges[s]),
             "range over unscaled": geometric_mean(pd.Series(over(ranges, s, UNSCALED))),
             "final loss": losses[s].mean(),
             "loss over unscaled": geometric_mean(pd.Series(over(losses, s, UNSCALED)))}
            for s in study.schemes
        ]  # fmt: skip
    return Examination(questions, pd.DataFrame(rows), {"pareto": _figure(studies)})


def _figure(studies: Sequence[Study]) -> Figure:
    """Final loss against range, a small point a run and a large one a scheme."""
    figure, axes = grid(1, len(studies), size=(3.3, 3.4))
    colours = scheme_colours(studies)
    for ax, study in zip(axes[0], studies, strict=True):
        ranges, losses = study.table(output_range), study.table(final_loss)
        for scheme in study.schemes:
            ax.scatter(ranges[scheme], losses[scheme], s=12, color=colours[scheme], alpha=0.5, lw=0)
            ax.scatter(geometric_mean(ranges[scheme]), geometric_mean(losses[scheme]), s=80,
                       color=colours[scheme], edgecolor="black", lw=0.6,
                       marker="X" if scheme == NONE else "o", zorder=3)  # fmt: skip
        ax.set(xscale="log", yscale="log", title=study.grid)
        ax.set_xlabel("range of ‖h$_0$‖² over training")
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("loss at the end of training")
    scheme_legend(figure, colours)
    title(
        figure,
        "Stability against loss: below and to the left is better\n"
        "small: a run; large: a scheme's mean; cross: no skips",
    )
    return figure
