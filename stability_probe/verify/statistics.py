"""The few statistics that verdicts rest on: intervals over independent units."""

import math
import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats

from stability_probe.verify.verdict import Status

Interval = tuple[float, float]

FEWEST_UNITS = 20
"""Below this many units a bootstrap interval is too narrow to be believed."""


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Percentile-bootstrap interval of a statistic of n independent units.

    Args:
        statistic: from the indices of a resample of the units to the statistic; NaN for a
            resample on which it is undefined, which is left out.
        n: number of units.
        confidence: of the interval.
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        The interval, or `None` for fewer than two units or no defined resample.

    >>> values = np.arange(100.0)
    >>> low, high = bootstrap_interval(lambda units: values[units].mean(), 100)
    >>> 43 < low < 49.5 < high < 56
    True
    """
    if n < 2:
        return None
    with warnings.catch_warnings():  # undefined resamples are left out below
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            (np.arange(n),),
            statistic,
            n_resamples=resamples,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size == 0:
        return None
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def share_interval(share: float, n: int) -> Interval:
    """95% Clopper–Pearson interval of a share seen on n independent units.

    Each unit may contribute a fraction (the part of its values that meet the condition), so the
    count `share * n` need not be whole.

    >>> low, high = share_interval(1.0, 48)
    >>> round(low, 3), high
    (0.926, 1.0)
    """
    hits = share * n
    low = 0.0 if hits <= 0 else float(stats.beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits >= n else float(stats.beta.ppf(0.975, hits + 1, n - hits))
    return low, high


def fewest_for_share(required: float) -> int:
    """The least number of units on which a share of 1 surely reaches what is required.

    >>> fewest_for_share(0.85)
    23
    """
    return math.ceil(math.log(0.025) / math.log(required))


def share_status(interval: Interval, required: float) -> Status:
    """HOLDS if the share surely reaches what is required, VIOLATED if it surely does not."""
    low, high = interval
    return "HOLDS" if low >= required else "VIOLATED" if high < required else "INCONCLUSIVE"


def equality_status(interval: Interval | None, target: float, widest: float) -> Status:
    """HOLDS if the interval contains the target, unless it is too wide to say anything.

    Args:
        interval: of the estimate.
        target: what it should be.
        widest: the greatest width of an interval that can support the claim.

    >>> equality_status((0.9, 1.1), 1.0, 0.5), equality_status((0.1, 2.0), 1.0, 0.5)
    ('HOLDS', 'INCONCLUSIVE')
    """
    if interval is None:
        return "INCONCLUSIVE"
    low, high = interval
    rounding = 1e-9 * max(1.0, abs(target))
    if not low - rounding <= target <= high + rounding:
        return "VIOLATED"
    return "HOLDS" if high - low <= widest else "INCONCLUSIVE"


def at_most_status(interval: Interval | None, limit: float) -> Status:
    """HOLDS if the interval lies at or below the limit, VIOLATED if above it."""
    if interval is None:
        return "INCONCLUSIVE"
    low, high = interval
    return "HOLDS" if high <= limit else "VIOLATED" if low > limit else "INCONCLUSIVE"
