"""Figures of one network, as it is, at several noise levels.

Bound and measurement are always on the same axes; see `figures` for colours and style.
"""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stability_probe.plots.figures import BOUND, MEASURED, PALETTE, grid, legend, title

HIERARCHY = {
    "paper": ("Theorem 3.4", BOUND, "center"),
    "blockwise": ("block by block", PALETTE[1], "center"),
    "pathwise": ("path by path", PALETTE[4], "bottom"),
    "exact": ("σ$_{max}$(J), exact", PALETTE[2], "center"),
    "measured": ("measured, random directions", MEASURED, "top"),
}
"""What is drawn of the hierarchy, the largest first: name, colour, side of its number."""


def plot_hierarchy(table: pd.DataFrame) -> Figure:
    """The bounds of Theorem 3.4, σ_max(J) and the measurement, by noise level.

    Args:
        table: from `tables.hierarchy`.
    """
    figure, axes = grid(1, 1, size=(6.4, 4.2))
    ax: Axes = axes[0, 0]
    levels = list(table.noise_level.unique())
    for key, (name, colour, side) in HIERARCHY.items():
        mine = table[table.quantity == key].groupby("noise_level", sort=False).value
        if not len(mine):
            continue
        spread = mine.agg(["min", "median", "max"]).loc[levels]
        at = np.arange(len(levels))
        ax.vlines(at, spread["min"], spread["max"], color=colour, alpha=0.4, lw=3)
        ax.plot(at, spread["median"], "o-", color=colour, label=name, ms=5)
        last = float(spread["median"].iloc[-1])
        ax.annotate(f"{last:.3g}", (at[-1], last), xytext=(8, 0), textcoords="offset points",
                    va=side, fontsize=8, color=colour)  # fmt: skip
    ax.set_yscale("log")
    ax.set_xticks(np.arange(len(levels)), levels)
    ax.margins(x=0.15)
    ax.set(ylabel="output change / input change")
    legend(figure, ax)
    title(figure, "Sensitivity to the input, and its bounds (median and range over samples)")
    return figure


def plot_paths(table: pd.DataFrame) -> Figure:
    """κ_i‖P_i‖ of every skip and of the middle, by noise level: which skip carries the sensitivity.

    Args:
        table: from `tables.paths`.
    """
    figure, panels = _panels(table, "output change / input change")
    for ax, mine in panels:
        spread = mine.groupby("path", sort=False).value.agg(["min", "median", "max"])
        at = np.arange(len(spread))
        ax.bar(at, spread["median"], color=PALETTE[4], label="κ$_i$‖P$_i$‖, norm of the path")
        ax.vlines(at, spread["min"], spread["max"], color="black", lw=1)
        exact = float(mine.exact.median())
        ax.axhline(exact, color=PALETTE[2], lw=1.2, label="σ$_{max}$(J), exact")
        ax.set_xticks(at, spread.index, fontsize=8)
        ax.set_xlabel("skip (1 = outermost)")
    legend(figure, panels[0][0])
    title(figure, "Which skip carries the sensitivity (median and range over samples)")
    return figure


SHARES = {
    "bound": ("κ$_i$‖P$_i$‖, share of the pathwise bound", PALETTE[4]),
    "worst case": ("share of the worst direction's output", PALETTE[2]),
    "energy": ("‖κ$_i$u$_i$‖², share of what the merge reads", MEASURED),
}
"""What is drawn of the blame: name and colour."""


def plot_blame(table: pd.DataFrame) -> Figure:
    """What skips and the middle carry, by noise level: of the sensitivity and of feature energy.

    Args:
        table: from `tables.blame`.
    """
    figure, panels = _panels(table, "share")
    for ax, mine in panels:
        for k, (share, (name, colour)) in enumerate(SHARES.items()):
            values = mine[mine.share == share]
            ax.bar(values.level + 0.27 * (k - 1), values.value, 0.27, color=colour, label=name)
        ax.axhline(0, color="black", lw=0.6)
        names = [str(level) for level in sorted(mine.level.unique())]
        ax.set_xticks(np.arange(len(names)) + 1, [*names[:-1], "mid"], fontsize=8)
        ax.set_xlabel("skip (1 = outermost)")
    legend(figure, panels[0][0])
    title(figure, "What each skip and the middle carry (mean over samples)")
    return figure


def plot_counterfactual(table: pd.DataFrame) -> Figure:
    """‖h_i‖² with all κ times s against Σ(sκ_j)², both relative to s = 1: Theorem 3.1 says a line.

    Args:
        table: from `tables.counterfactual`.
    """
    figure, panels = _panels(table, "‖h$_i$‖² relative to s = 1")
    levels = sorted(table.level.unique())
    colours: list[Any] = list(sns.color_palette("viridis", len(levels)))
    for ax, mine in panels:
        for colour, level in zip(colours, levels, strict=True):
            energy = mine[mine.level == level].groupby("signal").energy
            spread, mean = energy.quantile(np.array([0.25, 0.75])).unstack(), energy.mean()
            ax.vlines(spread.index, spread[0.25], spread[0.75], color=colour, alpha=0.5)
            ax.plot(
                mean.index, mean, "o", color=colour, ms=4, label=f"‖h$_{{{level}}}$‖², measured"
            )
            slope, offset = np.polyfit(mean.index, mean, 1)
            ax.plot([0, 1], [offset, offset + slope], color=colour, lw=1,
                    label=f"line through ‖h$_{{{level}}}$‖²")  # fmt: skip
        ax.set_xlabel("Σ$_{j>i}$(sκ$_j$)² relative to s = 1")
    legend(figure, panels[0][0])
    title(figure, "Same weights, all κ times s: Theorem 3.1 says a line (mean and quartiles)")
    return figure


def plot_energies(table: pd.DataFrame) -> Figure:
    """‖h_i‖² over levels beside the band of Theorem 3.1, by noise level.

    Args:
        table: from `tables.energies`.
    """
    figure, panels = _panels(table, "‖h$_i$‖²")
    for ax, mine in panels:
        by_level = mine.groupby("level")
        spread = by_level.energy.quantile(np.array([0.05, 0.5, 0.95])).unstack()
        band = by_level[["lower", "upper"]].median()
        ax.fill_between(band.index, band.lower, band.upper, color=BOUND, alpha=0.2, lw=0,
                        label="band of Theorem 3.1, fitted")  # fmt: skip
        ax.vlines(spread.index, spread[0.05], spread[0.95], color=MEASURED, alpha=0.5)
        ax.plot(spread.index, spread[0.5], "o", color=MEASURED, ms=5, label="measured")
        ax.set_yscale("log")
        ax.set_xlabel("level i (0 = output side)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, panels[0][0])
    title(figure, "Feature energy, and the band of Theorem 3.1 (median, 5–95 % of samples)")
    return figure


def _panels(table: pd.DataFrame, ylabel: str) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel a noise level, and the rows of the table for each."""
    names = list(table.noise_level.unique())
    figure, axes = grid(1, len(names), sharey="row", size=(3.1, 3.3))
    axes[0, 0].set_ylabel(ylabel)
    panels = [(axes[0, c], table[table.noise_level == name]) for c, name in enumerate(names)]
    for (ax, _), name in zip(panels, names, strict=True):
        ax.set_title(name)
    return figure, panels
