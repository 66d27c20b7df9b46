"""Where depth or learning rate make unscaled training fail, scaling rescues it.

A run fails if its loss stops being finite, or if at the end it is no better than a network that
predicts no noise at all, whose loss is 1, but for a tenth. Failures are counted; what is asked for
every depth is the loss at the end, over the learning rates.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from experiments.examination import Examination
from experiments.figures import scheme_colours, scheme_legend
from experiments.findings import Question
from experiments.measures import final_loss
from experiments.studies import UNSCALED, Member, Study, label
from stability_probe.plots.figures import grid, title

SCALED = ("inverse-sqrt2", "cs:0.7", "ls")
USELESS = 0.9
"""A final loss above it is that of a network which has learned next to nothing."""


def worth(member: Member) -> float:
    """The loss at the end, or 1 where predicting no noise would do better."""
    return min(final_loss(member), 1.0)


def examine(studies: Sequence[Study]) -> Examination:
    """Losses at the end with each scheme and without, and failures."""
    questions, rows = [], []
    for study in studies:
        for n in _values(study, "n_skips"):
            over = []
            for rate in _values(study, "learning_rate"):
                losses = study.where(n_skips=n, learning_rate=rate).table(worth)
                over.append(losses.div(losses[UNSCALED], axis=0))
                rows += [
                    {"grid": study.grid, "N": n, "learning rate": rate, "scheme": label(s),
                     "failed": int((losses[s] > USELESS).sum()), "of": len(losses),
                     "median final loss": losses[s].median()}
                    for s in losses
                ]  # fmt: skip
            ratios = stats.gmean(np.stack(over))  # (seeds, schemes)
            questions += [
                Question(study.grid, f"final loss at N = {n}, {label(s)} over unscaled",
                         list(ratio), "below")
                for s, ratio in zip(over[0], ratios.T, strict=True) if s in SCALED
            ]  # fmt: skip
    return Examination(questions, pd.DataFrame(rows), {"depth_and_rate": _figure(studies)})


def _values(study: Study, setting: str) -> list[float]:
    """A setting's values in a grid, in its order."""
    return list(dict.fromkeys(getattr(m.config, setting) for m in study.members))


def _figure(studies: Sequence[Study]) -> Figure:
    """Final loss against learning rate, a panel a depth, a point a run."""
    panels = [(study, n) for study in studies for n in _values(study, "n_skips")]
    figure, axes = grid(1, len(panels), sharey=True, size=(3.0, 3.4))
    colours = scheme_colours(studies)
    for ax, (study, n) in zip(axes[0], panels, strict=True):
        runs, rates = study.where(n_skips=n), sorted(_values(study, "learning_rate"))
        for k, scheme in enumerate(runs.schemes):
            for r, rate in enumerate(rates):
                losses = [worth(m) for m in runs.where(scheme=scheme, learning_rate=rate).members]
                x = r + 0.18 * (k - (len(runs.schemes) - 1) / 2)
                ax.scatter(np.full(len(losses), x), losses, s=22, color=colours[scheme],
                           edgecolor="white", lw=0.4)  # fmt: skip
        ax.axhline(USELESS, color="grey", lw=1, ls="--")
        ax.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        ax.set(yscale="log", xlabel="learning rate", title=f"{study.grid}, N = {n}")
    axes[0, 0].set_ylabel("loss at the end (1: predicts no noise)\ndashed: above it, failed")
    scheme_legend(figure, colours)
    title(figure, "Final loss by depth, learning rate and scaling, a point a seed")
    return figure
