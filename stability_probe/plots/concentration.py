"""The figure of Theorem 3.1's probability statement."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stability_probe.plots.figures import BOUND, MEASURED, PALETTE, grid, title


def plot_concentration(table: pd.DataFrame, slopes: pd.DataFrame, by_rho: pd.DataFrame) -> Figure:
    """Share of networks outside the band against mρ², and the slope c against ρ and against N.

    Args:
        table: from `verify.decays.coverage_table`.
        slopes: from `verify.decays.Decays.frame`, for both sides and all levels, with a
            column `derived`: the slope for small ρ that the variance of log-energies gives.
        by_rho: from `verify.decays.slopes_by_rho`, with columns `side` and `relative`, the
            slope over the derived one.
    """
    figure, axes = grid(1, 3, size=(4.0, 3.8))
    shown = table[(table.event == "all") & (table.side == "both") & (table.failures > 0)]
    _decay(axes[0, 0], shown.assign(failed=shown.failures / shown.networks), slopes)
    _sides(axes[0, 1], by_rho)
    _depth(axes[0, 2], slopes)
    title(figure, "How fast networks outside the band of Theorem 3.1 become rare")
    return figure


def _decay(ax: Axes, shown: pd.DataFrame, slopes: pd.DataFrame) -> None:
    """All widths and ρ, one colour an N, with the fitted line."""
    depths = sorted(shown.n_skips.unique())
    farthest = shown[shown.n_skips == max(depths)].m_rho2.max() if depths else 1.0
    for n, colour in zip(depths, sns.color_palette("viridis", len(depths)), strict=True):
        mine = shown[shown.n_skips == n]
        ax.scatter(mine.m_rho2, mine.failed, s=10, color=colour, alpha=0.7, lw=0, label=f"N = {n}")
        for fit in slopes[slopes.n_skips == n].itertuples():
            y = np.linspace(0, mine.m_rho2.max(), 200)
            ax.plot(y, np.minimum(1, fit.prefactor * np.exp(-fit.slope * y)), color=colour, lw=1)
    ax.set_xlim(-0.02 * farthest, 1.05 * farthest)
    ax.set_yscale("log")
    if depths:
        ax.set_ylim(0.5 * shown.failed.min(), 2)
    ax.set(xlabel="mρ²", ylabel="share of networks outside the band")
    ax.set_title("all widths and ρ; lines: A exp(−c mρ²)")
    ax.legend(fontsize=8, loc="upper right", markerscale=2)


def _sides(ax: Axes, by_rho: pd.DataFrame) -> None:
    """The slope at fixed ρ over the derived one, for each side, and what log-energies give."""
    rho = np.linspace(0.01, 0.95, 200)
    for side, sign, colour in (("upper", 1, PALETTE[1]), ("lower", -1, PALETTE[2])):
        mine = by_rho[by_rho.side == side]
        ax.plot(rho, (np.log1p(sign * rho) / rho) ** 2, color=colour, lw=1,
                label=f"derived: (log(1 {'+' if sign > 0 else '−'} ρ) / ρ)²")  # fmt: skip
        ax.scatter(mine.rho, mine.relative, s=14, color=colour, alpha=0.7, lw=0,
                   label=f"{side} side, any N")  # fmt: skip
    ax.set_yscale("log")
    ax.set(xlabel="ρ", ylabel="slope c at fixed ρ, over 2 / max$_i$ V$_i$")
    ax.set_title("the two sides of the band")
    ax.legend(fontsize=8, loc="upper left")


def _depth(ax: Axes, slopes: pd.DataFrame) -> None:
    """The slope c against N, the derived one, and one that is free of N."""
    errors = np.abs(slopes[["slope_low", "slope_high"]].to_numpy() - slopes[["slope"]].to_numpy())
    ax.errorbar(slopes.n_skips, slopes.slope, yerr=errors.T, fmt="o", ms=4, capsize=2,
                color=MEASURED, label="measured, 95 %")  # fmt: skip
    ax.plot(
        slopes.n_skips, slopes.derived, color=PALETTE[4], lw=1, label="derived: 2 / max$_i$ V$_i$"
    )
    ax.plot(slopes.n_skips, slopes.least_slope, "v", ms=4, color=MEASURED, alpha=0.5,
            label="measured, at the worst ρ")  # fmt: skip
    if len(slopes):
        ax.axhline(slopes.slope.iloc[0], color=BOUND, lw=1, label="free of N, as printed")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.minorticks_off()
    ax.set_xticks(slopes.n_skips, [str(n) for n in slopes.n_skips])
    ax.set(xlabel="number of skips N", ylabel="slope c")
    ax.set_title("c falls about as 1/(N + 1)")
    ax.legend(fontsize=8, loc="lower left")
