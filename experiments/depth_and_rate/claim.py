"""Where depth or learning rate make unscaled training fail, scaling rescues it.

A run fails if its loss stops being finite, or if at the end it is no better than a network that
predicts no noise at all, whose loss is 1, but for a tenth. Asked at the largest learning rate, for
every depth.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.examination import Examination
from experiments.figures import scheme_colours, scheme_legend
from experiments.findings import Shares
from experiments.measures import final_loss
from experiments.studies import UNSCALED, Study, label
from stability_probe.plots.figures import grid, title

SCALED = ("inverse-sqrt2", "cs:0.7", "ls")
USELESS = 0.9
"""A final loss above it is that of a network which has learned next to nothing."""


def cells(study: Study) -> list[tuple[int, float, Study]]:
    """The runs by depth and learning rate."""
    keys = dict.fromkeys((m.config.n_skips, m.config.learning_rate) for m in study.members)
    return [(n, rate, study.where(n_skips=n, learning_rate=rate)) for n, rate in keys]


def failures(losses: pd.Series) -> int:
    """How many runs of a scheme fail."""
    return int((~(losses <= USELESS)).sum())


def examine(studies: Sequence[Study]) -> Examination:
    """Failures with each scheme and without."""
    questions, rows = [], []
    for study in studies:
        largest = max(m.config.learning_rate for m in study.members)
        for n, rate, runs in cells(study):
            losses = runs.table(final_loss)
            count = {s: failures(losses[s]) for s in runs.schemes}
            rows += [
                {"grid": study.grid, "N": n, "learning rate": rate, "scheme": label(s),
                 "failed": count[s], "of": len(losses), "median final loss": losses[s].median()}
                for s in runs.schemes
            ]  # fmt: skip
            if rate == largest:
                questions += [
                    Shares(study.grid, f"failures at N = {n}, rate {rate:g}: {label(s)}",
                           count[s], len(losses), count[UNSCALED])
                    for s in SCALED
                ]  # fmt: skip
    return Examination(questions, pd.DataFrame(rows), {"depth_and_rate": _figure(studies)})


def _figure(studies: Sequence[Study]) -> Figure:
    """Final loss against learning rate, a panel a depth, a point a run."""
    panels = [(s, n) for s in studies for n in dict.fromkeys(m.config.n_skips for m in s.members)]
    figure, axes = grid(1, len(panels), sharey=True, size=(4.4, 3.6))
    colours = scheme_colours(studies)
    for ax, (study, n) in zip(axes[0], panels, strict=True):
        runs = study.where(n_skips=n)
        rates = sorted({m.config.learning_rate for m in runs.members})
        for k, scheme in enumerate(runs.schemes):
            for r, rate in enumerate(rates):
                losses = [
                    min(final_loss(m), 3.0)
                    for m in runs.where(scheme=scheme, learning_rate=rate).members
                ]
                x = r + 0.18 * (k - (len(runs.schemes) - 1) / 2)
                ax.scatter(np.full(len(losses), x), losses, s=22, color=colours[scheme],
                           edgecolor="white", lw=0.4)  # fmt: skip
        ax.axhline(USELESS, color="grey", lw=1, ls="--")
        ax.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        ax.set(yscale="log", xlabel="learning rate", title=f"N = {n} skips")
    axes[0, 0].set_ylabel("loss at the end (3: diverged or worse)\ndashed: above it, failed")
    scheme_legend(figure, colours)
    title(figure, "Final loss by depth, learning rate and scaling, a point a seed")
    return figure
