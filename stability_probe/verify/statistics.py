"""The few statistics that verdicts rest on: intervals over independent units.

**Error rates.** A verdict at level α calls a true claim VIOLATED with probability α at most, to
first order in 1/n. An equality is tested on both sides, and shows its interval of confidence 1 − α.
"At most" and "at least" are tested on one side, and show the two-sided interval of confidence
1 − 2α, whose either end is a one-sided limit of confidence 1 − α. A status is read off the interval
that is shown.

**Selection.** Where a claim is made of several places (levels, blocks, noise levels) and the worst
one decides, the upper end of the interval of the *smallest* parameter is taken at α / places, since
each place may raise the alarm. The lower end needs no correction: for it to be too high, the limit
at the truly smallest place has to be.
"""

import math
from typing import Any

import numpy as np
from scipy import stats

from stability_probe.verify.verdict import Status

Interval = tuple[float, float]

ALPHA = 0.05
"""Probability that a true claim is called VIOLATED."""
FEWEST_UNITS = 20
"""Below this many units an interval of a mean is too narrow to be believed."""


def mean_limits(values: np.ndarray, confidence: float) -> tuple[Any, Any]:
    r"""Student's interval of a mean, corrected for skewness by Hall's transformation.

    $T = \sqrt n(\bar v - \mu)/s$ of a skewed sample is itself skewed; with $\hat\gamma$ the
    sample's skewness, $g(T) = T + \hat\gamma T^2/(3\sqrt n) + \hat\gamma^2 T^3/(27 n) +
    \hat\gamma/(6\sqrt n)$ is not, up to $O(1/n)$, and is inverted in closed form (Hall, 1992, *On
    the removal of skewness by transformation*). Few units with a large outlier make it very wide:
    how often such come cannot be told from them.

    Args:
        values: independent units (..., n), n at least 2.
        confidence: two-sided.

    Returns:
        Lower and upper limits, (...): arrays, or numbers of a single sample.

    >>> low, high = mean_limits(np.arange(100.0), 0.95)
    >>> float(low.round(2)), float(high.round(2))
    (43.74, 55.26)
    """
    n = values.shape[-1]
    centre = values.mean(axis=-1, keepdims=True)
    deviation = values.std(axis=-1, ddof=1, keepdims=True)
    z = (values - centre) / np.where(deviation > 0, deviation, 1.0)
    skew = (z**3).mean(axis=-1, keepdims=True) / math.sqrt(n)
    quantile = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    step = deviation / math.sqrt(n)
    low, high = (centre - step * _unskewed(y, skew) for y in (quantile, -quantile))
    return low[..., 0], high[..., 0]


def _unskewed(y: float, skew: np.ndarray) -> np.ndarray:
    """Solve g(T) = y, with skewness over √n."""
    safe = np.where(np.abs(skew) > 1e-6, skew, 1e-6)
    return np.asarray(3 / safe * (np.cbrt(1 + safe * (y - safe / 6)) - 1))


def mean_interval(values: np.ndarray, confidence: float) -> Interval:
    """`mean_limits` of one sample (n,)."""
    low, high = mean_limits(values, confidence)
    return float(low), float(high)


def student_interval(values: np.ndarray, confidence: float) -> Interval:
    """Student's interval of a mean of units (n,) that have heavy tails on both sides.

    There an estimated skewness is mostly noise, and correcting for it costs more than it brings.

    >>> low, high = student_interval(np.arange(100.0), 0.95)
    >>> round(low, 2), round(high, 2)
    (43.74, 55.26)
    """
    quantile = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    half = quantile * float(stats.sem(values))
    return float(values.mean()) - half, float(values.mean()) + half


def least_mean_interval(values: np.ndarray, alpha: float, tested: int) -> Interval:
    """Interval of the smallest of several means over the same units.

    Args:
        values: (places, n).
        alpha: probability of an error at either end.
        tested: among how many places the alarm is looked for.
    """
    low, _ = mean_limits(values, 1 - 2 * alpha)
    _, high = mean_limits(values, 1 - 2 * alpha / tested)
    return float(low.min()), float(high.min())


def ratio_units(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Jackknife pseudo-values of Σ above / Σ below over units: their mean stands for the ratio.

    n θ − (n − 1) θ without the unit; an interval of their mean is one of the ratio.

    Args:
        above: of every unit (..., n).
        below: of every unit (..., n).

    >>> ratio_units(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0]))
    array([1., 2., 3.])
    """
    n = above.shape[-1]
    a, b = above.sum(axis=-1, keepdims=True), below.sum(axis=-1, keepdims=True)
    return np.asarray(n * a / b - (n - 1) * (a - above) / (b - below))


def share_interval(share: float, n: int, confidence: float = 0.95) -> Interval:
    """Clopper–Pearson interval of a share seen on n independent units.

    Each unit may contribute a fraction (the part of its values that meet the condition), so the
    count `share * n` need not be whole.

    >>> low, high = share_interval(1.0, 48)
    >>> round(low, 3), high
    (0.926, 1.0)
    """
    hits, tail = share * n, (1 - confidence) / 2
    low = 0.0 if hits <= 0 else float(stats.beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits >= n else float(stats.beta.isf(tail, hits + 1, n - hits))
    return low, high


def least_share_interval(least: float, n: int, alpha: float, tested: int) -> Interval:
    """Interval of the smallest of several shares, all seen on the same n units.

    Args:
        least: the smallest share that was seen.
        n: number of units.
        alpha: probability of an error at either end, at most.
        tested: among how many shares it is the smallest.
    """
    low, _ = share_interval(least, n, 1 - 2 * alpha)
    _, high = share_interval(least, n, 1 - 2 * alpha / tested)
    return low, high


def fewest_for_share(required: float, alpha: float = ALPHA) -> int:
    """The least number of units on which a share of 1 surely reaches what is required.

    >>> fewest_for_share(0.85)
    19
    """
    return math.ceil(math.log(alpha) / math.log(required))


def enough_units(n: int, estimate: float, interval: Interval, limit: float) -> int | None:
    """How many units would tell an estimate from a limit that its interval straddles.

    Intervals shrink as 1/√n. `None` is more than can be said.

    >>> enough_units(100, 0.9, (0.8, 1.0), 0.85)
    400
    """
    far = abs(estimate - limit)
    width = interval[1] - estimate if limit > estimate else estimate - interval[0]
    return None if far <= 0.05 * width else math.ceil(n * (width / far) ** 2 - 1e-9)


def units_needed(n: int, estimate: float, interval: Interval, limit: float) -> str:
    """The same in words.

    >>> units_needed(100, 0.9, (0.8, 1.0), 0.85)
    'about 400'
    """
    enough = enough_units(n, estimate, interval, limit)
    return "very many" if enough is None else f"about {enough}"


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
