"""Figures whose points are single networks, samples or runs, beside what the theorems say.

See `figures` for colours and style.
"""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stability_probe.plots.figures import (
    BOUND,
    MEASURED,
    PALETTE,
    grid,
    legend,
    scheme_colours,
    title,
)


def plot_law_band(table: pd.DataFrame, rho: float) -> Figure:
    """‖h_i‖²/‖x_t‖² of every random network, the explicit law, and the band (1±ρ)² times it.

    Args:
        table: from `tables.law_spread`.
        rho: ρ of Theorem 3.1, in (0, 1].
    """
    schemes = list(table.scheme.unique())
    figure, axes = grid(1, len(schemes), sharey="row", size=(3.0, 3.2))
    for ax, scheme in zip(axes[0], schemes, strict=True):
        mine = table[table.scheme == scheme]
        law = mine.groupby("level").law.first()
        aside = np.random.default_rng(0).uniform(-0.18, 0.18, len(mine))
        ax.fill_between(law.index, (1 - rho) ** 2 * law, (1 + rho) ** 2 * law, color=BOUND,
                        alpha=0.15, lw=0, label=f"band of Theorem 3.1, ρ = {rho:g}")  # fmt: skip
        ax.scatter(mine.level + aside, mine.energy, s=6, color=MEASURED, alpha=0.35, lw=0,
                   label="one random network")  # fmt: skip
        ax.plot(law.index, mine.groupby("level").energy.mean(), "o", color=MEASURED, ms=5,
                mec="white", label="mean over networks")  # fmt: skip
        ax.plot(law.index, law, color=BOUND, lw=1.4, label="explicit law")
        ax.set_yscale("log")
        ax.set_xticks(law.index)
        ax.set_title(scheme)
        ax.set_xlabel("level i (0 = output side)")
    axes[0, 0].set_ylabel("‖h$_i$‖² / ‖x$_t$‖²")
    legend(figure, axes[0, 0])
    title(figure, "Feature energy of random networks, and the band of Theorem 3.1")
    return figure


def plot_gradient_law(table: pd.DataFrame) -> Figure:
    """Gradient energies of random networks beside their explicit law, by block.

    Args:
        table: from `tables.gradient_law`.
    """
    schemes = list(table.scheme.unique())
    figure, axes = grid(2, len(schemes), sharey="row")
    for r, block in enumerate(("a", "b")):
        for ax, scheme in zip(axes[r], schemes, strict=True):
            mine = table[(table.block == block) & (table.scheme == scheme)]
            ax.fill_between(mine.level, mine.predicted, mine.predicted * mine.allowed, color=BOUND,
                            alpha=0.15, lw=0, label="the law's own error")  # fmt: skip
            ax.plot(mine.level, mine.predicted, color=BOUND, lw=1.4,
                    label="explicit law of Theorem 3.3")  # fmt: skip
            ax.errorbar(mine.level, mine.measured, yerr=1.96 * mine.error, fmt="o", ms=4,
                        color=MEASURED, capsize=2, label="mean over networks (95 %)")  # fmt: skip
            ax.set_yscale("log")
            ax.set_xticks(mine.level)
            if r == 0:
                ax.set_title(scheme)
            else:
                ax.set_xlabel("level i (1 = outermost)")
        axes[r, 0].set_ylabel(f"{_BLOCKS[block]}\nmax E‖∇W ℓ$_s$‖²")
    legend(figure, axes[0, 0])
    title(figure, "Gradient energy of random networks: law and measurement")
    return figure


def plot_gradient_order(table: pd.DataFrame) -> Figure:
    """Gradient energy of every sample against its bound c ℓ‖x_t‖²(Σκ² + 1), coloured by level.

    Args:
        table: from `tables.gradient_energies`.
    """
    schemes, levels = list(table.scheme.unique()), sorted(table.level.unique())
    figure, axes = grid(2, len(schemes), sharey="row", size=(3.2, 2.6))
    colours: list[Any] = list(sns.color_palette("viridis", len(levels)))
    ends = np.array([table.bound.min() / 1.5, table.bound.max() * 1.5])
    for r, block in enumerate(("a", "b")):
        for ax, scheme in zip(axes[r], schemes, strict=True):
            mine = table[(table.block == block) & (table.scheme == scheme)]
            ax.plot(ends, ends, color=BOUND, lw=1.2, label="bound of Theorem 3.3, calibrated")
            for level, colour in zip(levels, colours, strict=True):
                points = mine[mine.level == level]
                ax.scatter(points.bound, points.measured, s=9, color=colour, alpha=0.7, lw=0,
                           label=f"measured, level {level}")  # fmt: skip
            ax.set_xscale("log")
            ax.set_yscale("log")
            if r == 0:
                ax.set_title(scheme)
            else:
                ax.set_xlabel("c ℓ$_s$‖x$_t$‖² (Σ$_{j≥i}$ κ$_j$² + 1)")
        axes[r, 0].set_ylabel(f"{_BLOCKS[block]}\nmax ‖∇W ℓ$_s$‖²")
    legend(figure, axes[0, 0])
    title(figure, "Gradient energy of single samples against the bound of Theorem 3.3")
    return figure


def plot_tradeoff(table: pd.DataFrame) -> Figure:
    """Loss against restlessness, a point a run; schemes that none beats in both are joined.

    Args:
        table: from `tables.tradeoff`.
    """
    figure, axes = grid(1, 1, size=(6.4, 4.2))
    ax: Axes = axes[0, 0]
    means = table.groupby("scheme", sort=False)[["range", "loss"]].mean()
    front = means[[not _beaten(row, means) for row in means.itertuples()]].sort_values("range")
    ax.plot(front["range"], front.loss, "--", color=PALETTE[7], lw=1, zorder=0,
            label="beaten by none in both (means)")  # fmt: skip
    for scheme, colour in scheme_colours(table).items():
        mine = table[table.scheme == scheme]
        ax.scatter(mine["range"], mine.loss, s=22, color=colour, alpha=0.5, lw=0)
        ax.plot(*means.loc[scheme], "o", color=colour, ms=9, mec="white", label=scheme)
    if table["range"].max() > 10 * table["range"].min():
        ax.set_xscale("log")
    ax.set(xlabel="range of ‖h$_0$‖² over training / its mean (left: calmer)",
           ylabel="loss at the end (low: better)")  # fmt: skip
    legend(figure, ax)
    title(figure, "Stability against loss (small: a run; large: mean over seeds)")
    return figure


_BLOCKS = {"a": "encoder blocks a$_i$", "b": "decoder blocks b$_i$"}


def _beaten(row: Any, means: pd.DataFrame) -> bool:
    """Whether another scheme is at least as good in both and better in one."""
    at_least = (means["range"] <= row.range) & (means.loss <= row.loss)
    better = (means["range"] < row.range) | (means.loss < row.loss)
    return bool((at_least & better).any())
