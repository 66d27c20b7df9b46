r"""Theorem 3.1's probability statement: how fast failures of its band die out with $m\rho^2$.

A network fails at $\rho$ if some $\|h_i\|^2$, $i = 0..N$, lies outside
$[(1-\rho)^2, (1+\rho)^2]\,\mathbb{E}\|h_i\|^2$, the expectation being that of
`theory.feature_energy_law`, where the theorem's constants are known. The theorem says
$p \le O(N)\exp(-\Omega(m\rho^2))$. Two things are fitted, each number of skips apart:

* **the slope**, in the theorem's form: $p = \min(1, A e^{-c\,m\rho^2})$;
* **the exponent of m**, at fixed $\rho$: $p = erfc\sqrt{r_\rho m^\gamma}$, with a rate for every
  $\rho$. A Gaussian tail has $\gamma = 1$. Its own factor $1/\sqrt{m}$ is in the erfc: without
  it the exponent of an exactly Gaussian quantity would come out near ⅔. The rates are free because
  $\Omega(\rho^2)$ on $(0, 1]$ leaves the dependence on $\rho$ open by a constant factor: on the
  scale of logarithms, where energies are about Gaussian, the upper side of the band is at
  $2\log(1+\rho) < 2\rho$ and the lower at $2\log(1-\rho)$, beyond $-2\rho$.

Both are maximum-likelihood fits to binomial counts, in which cells without a failure count as what
they are. Intervals are bootstraps over networks, each of which serves all $\rho$ of its cell.

`theory.log_energy_variance` derives why the slope falls with N.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, special

from stability_probe.verify.statistics import FEWEST_UNITS, Interval, share_interval

NARROWEST = 7
"""Cells need m ≥ 7(N+1): below it the variance of log‖h_i‖² under Gaussian weights exceeds 1."""
MOST_FAILURES = 0.5
"""Cells need p < ½: near p = 1 the bound says nothing and min(1, ·) hides the slope."""
FEWEST_FAILURES = 5
"""A ρ needs so many failures, over its widths, for a rate of its own."""


def needed_rho(relative: np.ndarray) -> np.ndarray:
    r"""The least $\rho$ at which each network is inside the band, for either side.

    Args:
        relative: $\|h_i\|^2 / \mathbb{E}\|h_i\|^2$, of shape (networks, levels).

    Returns:
        (networks, 2): for the lower side $1 - \min_i\sqrt{\cdot}$, for the upper
        $\max_i\sqrt{\cdot} - 1$.

    >>> needed_rho(np.array([[0.25, 1.21], [1.0, 4.0]]))
    array([[0.5, 0.1],
           [0. , 1. ]])
    """
    root = np.sqrt(relative)
    return np.stack([1 - root.min(1), root.max(1) - 1], axis=1)


def coverage_table(
    cells: Mapping[tuple[int, int], np.ndarray], rhos: Sequence[float]
) -> pd.DataFrame:
    """Failures of the band for every width, depth and ρ.

    Args:
        cells: from (m, N) to the energies ‖h_i‖²/E‖h_i‖² of networks, (networks, N + 1).
        rhos: values of ρ in (0, 1], rising.

    Returns:
        Columns m, n_skips, rho, m_rho2, event (`all` levels, or `h0` alone), side (`both`, `lower`,
        `upper`), failures, networks, coverage, and its Clopper–Pearson interval low, high.

    Raises:
        ValueError: if the values of ρ are not rising within (0, 1].
    """
    grid = np.asarray(rhos, float)
    if not (len(grid) and grid[0] > 0 and grid[-1] <= 1 and (np.diff(grid) > 0).all()):
        raise ValueError(f"rhos must rise within (0, 1], got {list(rhos)}")
    rows = []
    for (m, n_skips), relative in cells.items():
        for event, levels in (("all", relative), ("h0", relative[:, :1])):
            needed = needed_rho(levels)
            sides = {"both": needed.max(1), "lower": needed[:, 0], "upper": needed[:, 1]}
            for side, least in sides.items():
                for rho in grid:
                    failures = int((least > rho).sum())
                    rows.append((m, n_skips, rho, m * rho**2, event, side, failures, len(least)))
    names = ["m", "n_skips", "rho", "m_rho2", "event", "side", "failures", "networks"]
    table = pd.DataFrame(rows, columns=names)
    table["coverage"] = 1 - table.failures / table.networks
    limits = [share_interval(c, n) for c, n in zip(table.coverage, table.networks, strict=True)]
    table[["low", "high"]] = limits
    return table


def usable(table: pd.DataFrame, event: str = "all", side: str = "both") -> pd.DataFrame:
    """The rows that the fits use: enough and wide networks, failures in less than half of them."""
    mine = table[(table.event == event) & (table.side == side) & (table.networks >= FEWEST_UNITS)]
    wide = mine.m >= NARROWEST * (mine.n_skips + 1)
    return mine[wide & (mine.failures < MOST_FAILURES * mine.networks)]


def fit_slope(rows: pd.DataFrame) -> tuple[float, float]:
    r"""Maximum-likelihood $(A, c)$ of $p = \min(1, A e^{-c\,m\rho^2})$; c may be negative."""
    scale = float(rows.m_rho2.mean())
    y = rows.m_rho2.to_numpy() / scale
    failures, networks = rows.failures.to_numpy(), rows.networks.to_numpy()

    def loss(theta: np.ndarray) -> float:
        return _deviance(np.exp(np.minimum(theta[0] - theta[1] * y, 0.0)), failures, networks)

    line = np.polyfit(y, np.log((failures + 0.5) / (networks + 1)), 1)
    best = optimize.minimize(loss, (line[1], -line[0]), method="Nelder-Mead").x
    return float(np.exp(best[0])), float(best[1]) / scale


def slopes_by_rho(table: pd.DataFrame, event: str = "all", side: str = "both") -> pd.DataFrame:
    r"""The slope c in $m\rho^2$ of every N and $\rho$ apart, so over widths alone.

    Only widths with `FEWEST_FAILURES` failures count, and two of them are needed. The least c over
    $\rho$ is the constant that $\Omega(m\rho^2)$ hides.

    Returns:
        Columns n_skips, rho, slope, prefactor.
    """
    rows = usable(table, event, side)
    groups = rows[rows.failures >= FEWEST_FAILURES].groupby(["n_skips", "rho"])
    fits = [(*key, *fit_slope(mine)[::-1]) for key, mine in groups if mine.m.nunique() > 1]
    return pd.DataFrame(fits, columns=["n_skips", "rho", "slope", "prefactor"])


def fit_exponent(rows: pd.DataFrame) -> float:
    r"""Maximum-likelihood $\gamma$ of $p = erfc\sqrt{r_\rho m^\gamma}$ with a free rate per $\rho$.

    NaN if no $\rho$ has two widths and `FEWEST_FAILURES` failures.
    """
    by_rho = rows.groupby("rho")
    known = (by_rho.m.transform("nunique") > 1) & (
        by_rho.failures.transform("sum") >= FEWEST_FAILURES
    )
    rows = rows[known]
    if rows.empty:
        return float("nan")
    failures, networks = rows.failures.to_numpy(), rows.networks.to_numpy()
    rhos, group = np.unique(rows.rho.to_numpy(), return_inverse=True)
    log_m = np.log(rows.m.to_numpy(float))
    log_m = log_m - log_m.mean()

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        s = np.exp(np.clip(theta[:-1][group] + theta[-1] * log_m, -30.0, 6.4))
        p = special.erfc(np.sqrt(s))
        slope = -np.sqrt(s / np.pi) * np.exp(-s)  # dp / d log s
        g = -slope * (failures / p - (networks - failures) / special.erf(np.sqrt(s)))
        gradient = np.append(np.bincount(group, g, len(rhos)), g @ log_m)
        return _deviance(p, failures, networks), gradient / networks.mean()

    share = by_rho.failures.sum()[rhos] / by_rho.networks.sum()[rhos]
    start = np.append(np.log(special.erfcinv(share.to_numpy()) ** 2), 1.0)
    return float(optimize.minimize(loss, start, jac=True, method="BFGS").x[-1])


def _deviance(p: np.ndarray, failures: np.ndarray, networks: np.ndarray) -> float:
    """Negative binomial log-likelihood, per network of a cell."""
    p = np.clip(p, 1e-300, 1 - 1e-12)
    likelihood = failures * np.log(p) + (networks - failures) * np.log1p(-p)
    return float(-likelihood.sum() / networks.mean())


@dataclass(frozen=True)
class Decays:
    """Fits for every number of skips, with their bootstrap.

    Attributes:
        n_skips: the numbers of skips N, rising.
        slope: c of `fit_slope`, (1 + resamples, len(n_skips)); the first row is the estimate.
        prefactor: A of it.
        exponent: γ of `fit_exponent`, likewise; NaN where there is none.
        least: least c over single values of ρ, from `slopes_by_rho`; NaN where there is none.
        networks: behind each N.
    """

    n_skips: tuple[int, ...]
    slope: np.ndarray
    prefactor: np.ndarray
    exponent: np.ndarray
    least: np.ndarray
    networks: tuple[int, ...]

    @property
    def resamples(self) -> int:
        """Of the bootstrap."""
        return len(self.slope) - 1

    def interval(self, values: np.ndarray, confidence: float = 0.95) -> Interval:
        """Percentile interval of a bootstrapped quantity (1 + resamples,)."""
        drawn = values[1:][np.isfinite(values[1:])]
        if not drawn.size:
            return float("nan"), float("nan")
        low, high = np.quantile(drawn, ((1 - confidence) / 2, (1 + confidence) / 2))
        return float(low), float(high)

    def depth_slope(self) -> np.ndarray:
        """Slope of log c on log N, (1 + resamples,): 0 if c is free of N, −1 if it falls as 1/N.

        NaN for fewer than three N, or a c that is not positive.
        """
        if len(self.n_skips) < 3:
            return np.full(len(self.slope), np.nan)
        x = np.log(np.asarray(self.n_skips, float))
        x = x - x.mean()
        positive = np.where(self.slope > 0, self.slope, np.nan)
        return np.asarray(np.log(positive) @ x / (x @ x))

    def frame(self, confidence: float = 0.95) -> pd.DataFrame:
        """One row an N: c, A, the least c and γ, with intervals of c and γ."""
        rows = [
            (
                n,
                c[0],
                *self.interval(c, confidence),
                a[0],
                least,
                g[0],
                *self.interval(g, confidence),
            )
            for n, c, a, least, g in zip(
                self.n_skips,
                self.slope.T,
                self.prefactor.T,
                self.least,
                self.exponent.T,
                strict=True,
            )
        ]
        names = [
            "n_skips", "slope", "slope_low", "slope_high", "prefactor", "least_slope",
            "exponent", "exponent_low", "exponent_high",
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=names)


def fit_decays(
    table: pd.DataFrame,
    event: str = "all",
    side: str = "both",
    *,
    resamples: int = 400,
    seed: int = 0,
) -> Decays:
    """Fit slope and exponent for every N of a coverage table, and bootstrap both over networks.

    An N with fewer than three usable rows, or fewer than `FEWEST_FAILURES` failures in them, is
    left out.

    Args:
        table: from `coverage_table`.
        event: `all` levels or `h0`.
        side: `both`, `lower` or `upper`.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    counts: list[int] = []
    kept: list[int] = []
    fits = []
    for n_skips, rows in usable(table, event, side).groupby("n_skips"):
        if len(rows) < 3 or rows.failures.sum() < FEWEST_FAILURES:
            continue
        drawn = [rows, *(_resample(rows, generator) for _ in range(resamples))]
        fits.append([(*fit_slope(again), fit_exponent(again)) for again in drawn])
        kept.append(int(str(n_skips)))
        counts.append(int(rows.groupby("m").networks.first().sum()))
    found = np.array(fits).reshape(len(kept), 1 + resamples, 3).transpose(2, 1, 0)
    least = slopes_by_rho(table, event, side).groupby("n_skips").slope.min().reindex(kept)
    return Decays(tuple(kept), found[1], found[0], found[2], least.to_numpy(float), tuple(counts))


def _resample(rows: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """Failures of a resample of the networks of every width.

    Networks that fail at ρ fail at all smaller ρ, so how many fail between neighbouring values of ρ
    is multinomial.
    """
    drawn = rows.copy()
    for _, cell in rows.sort_values("rho").groupby("m"):
        networks = int(cell.networks.iloc[0])
        between = -np.diff([networks, *cell.failures, 0])
        again = generator.multinomial(networks, between / networks)
        drawn.loc[cell.index, "failures"] = again[::-1].cumsum()[::-1][1:]
    return drawn
