"""Figures: from a frame to a matplotlib figure; nothing is written.

Bound and measurement are always on the same axes. Within a figure a colour stands for one thing.
"""

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

PALETTE: list[Any] = list(sns.color_palette("colorblind"))
MEASURED, BOUND = PALETTE[0], PALETTE[3]
SCHEMES = [colour for colour in PALETTE if colour != BOUND]
"""Colours of schemes, in the order of the table, while they last; the bound keeps its own."""
STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.titlesize": 11,
    "figure.dpi": 110,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def plot_feature_traces(table: pd.DataFrame) -> Figure:
    """‖h_i‖² over training per scheme, at the output, the middle and the innermost level.

    Args:
        table: from `tables.feature_traces`.
    """
    shown = _three(table.level)
    schemes = list(table.scheme.unique())
    figure, axes = grid(len(shown), len(schemes), sharey="row")
    for r, level in enumerate(shown):
        for c, scheme in enumerate(schemes):
            ax: Axes = axes[r, c]
            mine = table[(table.level == level) & (table.scheme == scheme)]
            band = mine.dropna(subset=["lower"])
            ax.fill_between(
                band.step, band.lower, band.upper,
                color=BOUND, alpha=0.2, lw=0, label="band of Theorem 3.1, fitted",
            )  # fmt: skip
            ax.plot(band.step, band.upper, color=BOUND, lw=1)
            ax.plot(mine.step, mine.energy, color=MEASURED, lw=1.2, label="measured, batch mean")
            ax.set_yscale("log")
            if r == 0:
                ax.set_title(scheme)
            if c == 0:
                ax.set_ylabel(_where(level, shown))
            if r == len(shown) - 1:
                ax.set_xlabel("training step")
    legend(figure, axes[0, 0])
    title(figure, "Feature energy during training, and the band of Theorem 3.1")
    return figure


def plot_oscillation(table: pd.DataFrame) -> Figure:
    """Range of ‖h_i‖² over training against ‖x‖²Σκ², one panel a level, one point a run.

    Args:
        table: from `verify.oscillation.oscillation_table`, with a column `scheme`.
    """
    levels = _three(table.level)
    figure, axes = grid(1, len(levels), sharey="row", size=(3.1, 3.4))
    positive = table.skip_energy[table.skip_energy > 0]
    smallest = float(positive.min()) if len(positive) else 1.0
    table = table[np.isfinite(table["range"]) & (table["range"] > 0)]
    colours = scheme_colours(table)
    for c, level in enumerate(levels):
        ax: Axes = axes[0, c]
        mine = table[table.level == level]
        for scheme in mine.scheme.unique():
            points = mine[mine.scheme == scheme]
            ax.scatter(points.skip_energy, points["range"], color=colours[scheme], s=45,
                       edgecolor="white", label=scheme, zorder=3)  # fmt: skip
        scaled = mine[mine.skip_energy > 0]
        if len(scaled):
            constant = float(np.exp(np.log(scaled["range"] / scaled.skip_energy).mean()))
            ends = np.array([scaled.skip_energy.min() / 2, scaled.skip_energy.max() * 2])
            ax.plot(ends, constant * ends, color=BOUND, lw=1.2,
                    label="order of Theorem 3.1: ∝ ‖x$_t$‖²Σκ²")  # fmt: skip
        if len(positive) == len(table):
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_xscale("symlog", linthresh=smallest / 2)
            largest = float(positive.max()) if len(positive) else 10.0
            ax.set_xticks([0, *_decades(smallest, largest)])
            ax.set_xlim(left=-smallest / 8)
        ax.set_yscale("log")
        ax.set_title(_where(level, levels))
        ax.set_xlabel("‖x$_t$‖² Σ$_{j≥i}$ κ$_j$²")
    axes[0, 0].set_ylabel("range (max − min) of ‖h$_i$‖²\nover training")
    legend(figure, axes[0, 0])
    title(figure, "Oscillation range of features against the sum of squared skip coefficients")
    return figure


def plot_gradients(table: pd.DataFrame, when: str = "at the end of training") -> Figure:
    """Per-sample gradient energy of every block beside its bound.

    Args:
        table: from `tables.gradient_energies`.
        when: it was measured, for the title.
    """
    table = table[np.isfinite(table.measured) & np.isfinite(table.bound)]
    schemes = list(table.scheme.unique())
    figure, axes = grid(2, max(1, len(schemes)), sharey="row")
    names = {"a": "encoder blocks a$_i$", "b": "decoder blocks b$_i$"}
    for r, (block, label) in enumerate(names.items()):
        for c, scheme in enumerate(schemes):
            ax: Axes = axes[r, c]
            mine = table[(table.block == block) & (table.scheme == scheme)]
            if mine.empty:
                continue
            for column, colour, name in (
                ("bound", BOUND, "bound of Theorem 3.3, calibrated"),
                ("measured", MEASURED, "measured"),
            ):
                spread = mine.groupby("level")[column].quantile([0.05, 0.5, 0.95]).unstack()
                ax.fill_between(spread.index, spread[0.05], spread[0.95], color=colour, alpha=0.2,
                                lw=0)  # fmt: skip
                ax.plot(spread.index, spread[0.5], "o-", color=colour, ms=4, label=name)
            ax.set_yscale("log")
            if r == 0:
                ax.set_title(scheme)
            else:
                ax.set_xlabel("level i (1 = outermost)")
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if c == 0:
                ax.set_ylabel(f"{label}\nmax ‖∇W ℓ$_s$‖²")
    legend(figure, axes[0, 0])
    title(
        figure,
        f"Gradient energy of single samples {when} (median, 5–95 % of samples)",
    )
    return figure


def plot_sensitivity(table: pd.DataFrame) -> Figure:
    """Measured sensitivity, σ_max(J) and the bounds of Theorem 3.4 over training.

    Args:
        table: from `tables.sensitivities`.
    """
    schemes = list(table.scheme.unique())
    quantities = list(table.quantity.unique())
    colours = dict(zip(quantities, (BOUND, PALETTE[1], PALETTE[2], MEASURED), strict=False))
    figure, axes = grid(1, len(schemes), sharey="row", size=(2.6, 3.4))
    for c, scheme in enumerate(schemes):
        ax: Axes = axes[0, c]
        mine = table[table.scheme == scheme]
        for quantity in quantities:
            values = mine[mine.quantity == quantity].groupby("step").value
            spread = values.agg(["min", "median", "max"])
            colour = colours[quantity]
            ax.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.15,
                            lw=0)  # fmt: skip
            ax.plot(spread.index, spread["median"], "o-", color=colour, ms=4, label=quantity)
        final = mine[mine.step == mine.step.max()].pivot(
            index="sample", columns="quantity", values="value"
        )
        slack = (final[quantities[0]] / final[quantities[2]]).median()
        label = f"slack at the end: {float(f'{slack:.2g}'):,g}×"
        ax.text(0.98, 0.98, label, transform=ax.transAxes, ha="right",
                va="top", fontsize=8)  # fmt: skip
        ax.set_yscale("log")
        ax.margins(y=0.12)
        ax.set_title(scheme)
        ax.set_xlabel("training step")
    axes[0, 0].set_ylabel("output change / input change")
    legend(figure, axes[0, 0])
    title(figure, "Sensitivity to the input, and its bound (median and range over samples)")
    return figure


def plot_coefficients(table: pd.DataFrame) -> Figure:
    """κ_i per level at the end of training, and learned ones over time.

    Args:
        table: from `tables.coefficients`.
    """
    learned = table[table.learned]
    figure, axes = grid(1, 2 if len(learned) else 1, size=(5.0, 3.8))
    ax: Axes = axes[0, 0]
    for scheme, colour in scheme_colours(table).items():
        mine = table[table.scheme == scheme]
        last = mine[mine.step == mine.step.max()].groupby("level")[["mean", "min", "max"]].mean()
        ax.plot(last.index, last["mean"], "o-", color=colour, label=scheme, ms=4)
        ax.fill_between(last.index, last["min"], last["max"], color=colour, alpha=0.2, lw=0)
    ax.set(xlabel="level i (1 = outermost)", ylabel="κ$_i$ (measured gain)", ylim=(-0.05, 1.1))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("at the end of training")
    ax.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.92))
    if len(learned):
        ax = axes[0, 1]
        first = learned[learned.scheme == learned.scheme.iloc[0]]
        over_time = first.groupby(["level", "step"])["mean"].mean()
        levels = list(first.level.unique())
        for colour, level in zip(sns.color_palette("viridis", len(levels)), levels, strict=True):
            line = over_time[level].rolling(10, min_periods=1).mean()
            ax.plot(line.index, line, color=colour, label=f"level {level}")
        ax.set(xlabel="training step", ylabel="κ$_i$ (running mean over 10 steps)")
        ax.set_title(f"{first.scheme.iloc[0]} over training")
        ax.legend(fontsize=8, ncols=2)
    title(figure, "Skip coefficients as applied")
    return figure


def plot_losses(table: pd.DataFrame) -> Figure:
    """Training loss, smoothed, on log axes.

    Args:
        table: from `tables.losses`.
    """
    figure, axes = grid(1, 1, size=(6.0, 4.0))
    ax: Axes = axes[0, 0]
    for scheme, colour in scheme_colours(table).items():
        for k, (_, run) in enumerate(table[table.scheme == scheme].groupby("run")):
            smooth = run.set_index("step").loss.ewm(span=max(2, len(run) // 20)).mean()
            ax.plot(run.step, run.loss, color=colour, alpha=0.15, lw=0.7)
            ax.plot(smooth.index, smooth, color=colour, label=scheme if k == 0 else None)
    ax.set_yscale("log")
    ax.set(xlabel="training step", ylabel="loss (mean squared error of the noise)")
    ax.legend(fontsize=9)
    title(figure, "Training loss (thick: running mean)")
    return figure


def plot_law(table: pd.DataFrame) -> Figure:
    """Measured against predicted feature energy on random networks of Eq. 4.

    Args:
        table: from `tables.law`.
    """
    figure, axes = grid(1, 1, size=(5.6, 4.6))
    ax: Axes = axes[0, 0]
    ends = np.array([table.predicted.min() * 0.9, table.predicted.max() * 1.1])
    ax.plot(ends, ends, color=BOUND, lw=1, label="explicit law of Theorem 3.1")
    for scheme, colour in scheme_colours(table).items():
        mine = table[table.scheme == scheme]
        ax.errorbar(mine.predicted, mine.measured, yerr=1.96 * mine.error, fmt="o", ms=4,
                    color=colour, capsize=2, label=scheme)  # fmt: skip
    ax.set(xlabel="predicted E‖h$_i$‖²/‖x$_t$‖²", ylabel="measured, mean over networks (95 %)")
    ax.legend(fontsize=9)
    title(figure, "Feature energy of random networks: law and measurement")
    return figure


def scheme_colours(table: pd.DataFrame) -> dict[str, Any]:
    """A colour for every scheme, in the order of the table."""
    names = list(table.scheme.unique())
    colours = SCHEMES if len(names) <= len(SCHEMES) else sns.color_palette("husl", len(names))
    return dict(zip(names, colours, strict=False))


def _three(levels: pd.Series) -> list[int]:
    """The first, the middle and the last level."""
    known = sorted(levels.unique())
    return sorted({int(known[0]), int(known[len(known) // 2]), int(known[-1])})


def _where(level: int, shown: list[int]) -> str:
    """What a level of h_i is, in words."""
    place = {shown[0]: "output side", shown[-1]: "middle block"}.get(level, "inside the decoder")
    return f"‖h$_{{{level}}}$‖², {place}"


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten from low to high."""
    return [10.0**k for k in range(int(np.ceil(np.log10(low))), int(np.floor(np.log10(high))) + 1)]


def grid(
    rows: int,
    columns: int,
    *,
    sharex: Any = None,
    sharey: Any = False,
    size: tuple[float, float] = (2.6, 2.2),
) -> tuple[Figure, Any]:
    """A figure with a grid of axes of one style, not registered with pyplot.

    Rows share their x axes if nothing else is said.
    """
    sharex = rows > 1 if sharex is None else sharex
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(size[0] * columns, 6), size[1] * rows + 0.9))
        axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, axes


def legend(figure: Figure, ax: Axes) -> None:
    """One legend below all axes."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4 if figure.get_figwidth() > 8 else 2
    )


def title(figure: Figure, text: str) -> None:
    """The figure's title, with room for it."""
    figure.set_layout_engine("constrained")
    figure.suptitle(text)
