"""Learned LS coefficients fall roughly exponentially with depth, the first near 1.

κ_i of LS is the mean gate at level i over the last tenth of the steps. To it A·r^(i−1) is fitted,
as a straight line through log κ_i. "Fall" is asked of the fitted fall over all levels, r^(N−1);
"near 1" is taken as above 0.9. How exponential it is, R² of the line, is shown, and no question:
without a fall there is nothing to explain.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from experiments.examination import Examination
from experiments.findings import Question
from experiments.studies import Member, Study, label
from stability_probe.plots.figures import BOUND, grid, title

LEARNED = ("ls", "ls-non-shared")
NEAR = 0.9


def coefficients(member: Member) -> pd.DataFrame:
    """Mean gate by step (rows) and level (columns)."""
    return member.evidence.series("kappa", "skip")


def last(member: Member) -> np.ndarray:
    """κ_1..κ_N over the last tenth of the steps."""
    table = coefficients(member)
    return table.iloc[-max(1, len(table) // 10) :].mean().to_numpy()


def fit(kappa: np.ndarray) -> tuple[float, float, float]:
    """A, r and R² of κ_i = A r^(i−1).

    >>> [round(v, 3) for v in fit(np.array([1.0, 0.5, 0.25]))]
    [1.0, 0.5, 1.0]
    """
    line = stats.linregress(np.arange(len(kappa)), np.log(kappa))
    return float(np.exp(line.intercept)), float(np.exp(line.slope)), float(line.rvalue**2)


def groups(studies: Sequence[Study]) -> Iterator[tuple[str, Study]]:
    """Runs with learned coefficients, by grid, depth, learning rate and scheme."""
    for study in studies:
        kinds = dict.fromkeys((m.config.n_skips, m.config.learning_rate) for m in study.members)
        for n, rate in kinds:
            for scheme in LEARNED:
                found = study.where(n_skips=n, learning_rate=rate, scheme=scheme).members
                if found:
                    name = f"{study.grid}, N = {n}, rate {rate:g}: {label(scheme)}"
                    yield name, Study(study.grid, [m for m in found if not m.diverged])


def examine(studies: Sequence[Study]) -> Examination:
    """Rate, first coefficient and fit of every seed."""
    questions, rows = [], []
    for name, study in groups(studies):
        kappas = [last(member) for member in study.members]
        fits = [fit(kappa) for kappa in kappas]
        firsts = [float(kappa[0]) for kappa in kappas]
        a, r, explained = (list(values) for values in zip(*fits, strict=True))
        fall = [rate ** (len(kappas[0]) - 1) for rate in r]
        questions += [
            Question(name, "fitted κ_N / κ_1", fall, "below"),
            Question(name, "κ_1", firsts, "above", NEAR, ratio=False),
        ]
        means = np.mean(kappas, axis=0)
        rows.append(
            {"runs": name, "seeds": len(kappas), "A": float(np.mean(a)), "r": float(np.mean(r)),
             "R²": float(np.mean(explained)),
             **{f"κ_{i}": float(k) for i, k in enumerate(means, start=1)}}
        )  # fmt: skip
    return Examination(questions, pd.DataFrame(rows), {"coefficients": _figure(studies)})


def _figure(studies: Sequence[Study]) -> Figure:
    """Coefficients over depth with the fitted exponential, and one run of the first over time."""
    shown = list(groups(studies))
    figure, axes = grid(2, len(shown) // 2 + 1, sharex=False, size=(3.2, 3.0))
    for ax in axes.flat[len(shown) + 1 :]:
        ax.remove()
    for ax, (name, study) in zip(axes.flat, shown, strict=False):
        kappas = np.array([last(member) for member in study.members])
        levels = np.arange(1, kappas.shape[1] + 1)
        ax.plot(levels, kappas.T, "o-", ms=3, lw=0.7, alpha=0.6)
        a, r, explained = fit(kappas.mean(axis=0))
        ax.plot(levels, a * r ** (levels - 1), color=BOUND,
                label=f"mean: {a:.2f} · {r:.3f}$^{{i-1}}$, R² = {explained:.2f}")  # fmt: skip
        ax.set(
            title=name.replace(", N", ",\nN").replace(": ", ":\n"),
            xlabel="level i (1 = outermost)",
            ylim=(0, 1.02),
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(fontsize=8, loc="lower left")
    for ax in axes[:, 0]:
        ax.set_ylabel("κ$_i$, a line a seed")
    table = coefficients(shown[0][1].members[0]).rolling(20, min_periods=1).mean()
    ax = axes.flat[len(shown)]
    for level, colour in zip(
        table.columns, sns.color_palette("viridis", len(table.columns)), strict=True
    ):
        ax.plot(table.index, table[level], color=colour, label=f"i = {level}")
    ax.set(xlabel="training step", title="over training:\nseed 0 of the first", ylim=(0, 1.02))
    ax.legend(fontsize=8, ncols=2, loc="lower left")
    title(figure, "Learned coefficients over depth and over training")
    return figure
