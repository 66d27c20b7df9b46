r"""Two samples of runs, one of the baseline and one of now: what got worse, with an error rate.

Numbers that are not negative are compared by their logarithms. With $b_1..b_n$ of the baseline and
$c_1..c_m$ of now, one-sided against a practical margin $\mu$ (10 %):

$$H_0:\ \mathrm E\log c \le \mathrm E\log b + \log(1 + \mu), \qquad
  T = \frac{\overline{\log c} - \overline{\log b} - \log(1 + \mu)}{s\sqrt{1/n + 1/m}}$$

with the pooled deviation $s$ of both, and Student's distribution of $n + m - 2$ degrees of freedom.
With one run on a side this is a prediction interval from the other side's spread: a tolerance band.
With one on both sides nothing is known of the spread, and a deviation of `ASSUMED_SPREAD` is taken.

Of k numbers the alarm is given with probability `ALPHA` at most if none has risen by more than the
margin (Holm's step-down procedure, which needs no independence). What fell is found likewise and
never fails.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

ALPHA, MARGIN = 0.05, 0.10
"""Probability of a false alarm among all numbers of a check, and the rise that is no regression."""
ASSUMED_SPREAD = 0.2
"""Deviation of the logarithm over seeds where there is one run on either side."""
FLIP_CHANCE = 0.0025
"""The largest chance at which a verdict's flip counts as more than an accident."""

Change = Literal["worse", "better", "same"]


@dataclass(frozen=True)
class Comparison:
    """A number, then and now.

    Attributes:
        name: see `measures`.
        baseline: its values, one a run of the baseline.
        now: its values, one a run.
        ratio: geometric mean now over geometric mean then; infinite if a run of now has no finite
            one, or then it was 0.
        p: probability of a rise like this without a regression, uncorrected.
        visible: the least ratio that would have counted as worse, with this spread; infinite where
            nothing would have, as some of the numbers are negative.
        change: `worse`, `better`, or `same` as far as can be told.
    """

    name: str
    baseline: tuple[float, ...]
    now: tuple[float, ...]
    ratio: float
    p: float
    visible: float
    change: Change

    @property
    def was(self) -> float:
        """The mean of the baseline's values: the geometric one, unless some are not positive."""
        return _mean(self.baseline)

    @property
    def is_now(self) -> float:
        """The mean of the values now, likewise."""
        return _mean(self.now)

    @property
    def percent(self) -> str:
        """The change in words.

        >>> Comparison("loss", (1.0,), (1.5,), 1.5, 0.0, 1.2, "worse").percent
        '+50 %'
        >>> Comparison("loss", (1.0,), (3.5,), 3.5, 0.0, 1.2, "worse").percent
        '×3.5'
        """
        if not math.isfinite(self.ratio):
            return "from 0" if np.isfinite(self.now).all() else "not finite"
        return f"×{self.ratio:.3g}" if self.ratio >= 2 else f"{100 * (self.ratio - 1):+.3g} %"


@dataclass(frozen=True)
class Flip:
    """A theorem's claim whose verdict is not what it was.

    Attributes:
        claim: theorem and claim.
        baseline: statuses, one a run of the baseline.
        now: statuses, one a run.
        change: `worse` if it held in every run and is violated in every run now; `same` if there
            are too few runs for that to be no accident.
    """

    claim: str
    baseline: tuple[str, ...]
    now: tuple[str, ...]
    change: Change


def compare(
    baseline: Mapping[str, Sequence[float]],
    now: Mapping[str, Sequence[float]],
    *,
    margin: float = MARGIN,
    alpha: float = ALPHA,
) -> list[Comparison]:
    """Compare every number that both have, the worst first.

    >>> then, now = {"loss": [1.0, 1.1, 0.9]}, {"loss": [2.0, 2.1, 1.9]}
    >>> compare(then, now)[0].change
    'worse'
    """
    names = [name for name in baseline if name in now]
    tests = [_Test.of(baseline[name], now[name], margin) for name in names]
    worse = _holm([test.p_worse for test in tests], alpha)
    better = _holm([test.p_better for test in tests], alpha)
    found = []
    for name, test, is_worse, is_better in zip(names, tests, worse, better, strict=True):
        change: Change = "worse" if is_worse else "better" if is_better else "same"
        values = tuple(baseline[name]), tuple(now[name])
        visible = test.visible(margin, alpha / len(names))
        found.append(Comparison(name, *values, test.ratio, test.p_worse, visible, change))
    return sorted(found, key=lambda c: (c.change != "worse", c.change != "better", -c.ratio))


def flips(baseline: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> list[Flip]:
    r"""Claims that held in all runs of the baseline and are violated in all now, or the reverse.

    A claim that is violated by chance with probability p in each run is found to hold in n and then
    to be violated in m with probability $(1-p)^n p^m \le m^m n^n/(n+m)^{n+m}$, whatever p is.
    """
    found = []
    for claim in (c for c in baseline if c in now):
        then, after = tuple(baseline[claim]), tuple(now[claim])
        fell = set(then) == {"HOLDS"} and set(after) == {"VIOLATED"}
        rose = set(then) == {"VIOLATED"} and set(after) == {"HOLDS"}
        if fell or rose:
            surely = flip_chance(len(then), len(after)) <= FLIP_CHANCE
            change: Change = "same" if not surely else "worse" if fell else "better"
            found.append(Flip(claim, then, after, change))
    return found


def flip_chance(n: int, m: int) -> float:
    """The largest probability of n verdicts of one kind and then m of another, all by chance.

    >>> round(flip_chance(5, 5), 5), flip_chance(1, 1)
    (0.00098, 0.25)
    """
    return (n / (n + m)) ** n * (m / (n + m)) ** m


@dataclass(frozen=True)
class _Test:
    """The test of one number: its logarithms' difference, and the error of that."""

    difference: float
    error: float
    freedom: int
    p_worse: float
    p_better: float

    @classmethod
    def of(cls, baseline: Sequence[float], now: Sequence[float], margin: float) -> "_Test":
        b, c = np.asarray(baseline, dtype=float), np.asarray(now, dtype=float)
        if not np.isfinite(c).all():
            return cls(math.inf, 0.0, 0, 0.0, 1.0)  # it diverged
        if min(b.min(), c.min()) < 0:
            return cls(0.0, math.inf, 0, 1.0, 1.0)
        was, remains = bool(b.any()), bool(c.any())
        if not was and not remains:
            return cls(0.0, 0.0, 0, 1.0, 1.0)
        if not was or not remains:
            return cls(-math.inf if was else math.inf, 0.0, 0, float(was), float(remains))
        least = min(b[b > 0].min(), c[c > 0].min())  # stands for 0, which has no logarithm
        b, c = np.log(np.maximum(b, least)), np.log(np.maximum(c, least))
        n, m = len(b), len(c)
        freedom = n + m - 2
        squares = ((b - b.mean()) ** 2).sum() + ((c - c.mean()) ** 2).sum()
        spread = math.sqrt(squares / freedom) if freedom else ASSUMED_SPREAD
        difference = float(c.mean() - b.mean())
        error = spread * math.sqrt(1 / n + 1 / m)
        shift = math.log1p(margin)
        p_worse = _upper_tail(difference - shift, error, freedom)
        p_better = _upper_tail(-difference - shift, error, freedom)
        return cls(difference, error, freedom, p_worse, p_better)

    @property
    def ratio(self) -> float:
        return _exp(self.difference)

    def visible(self, margin: float, alpha: float) -> float:
        return (1 + margin) * _exp(self.error * _quantile(alpha, self.freedom))


def _mean(values: Sequence[float]) -> float:
    """Geometric, as ratios are; arithmetic where a value has no logarithm.

    >>> _mean([1.0, 4.0]), _mean([0.0, 4.0])
    (2.0, 2.0)
    """
    array = np.asarray(values, dtype=float)
    return float(stats.gmean(array) if (array > 0).all() else array.mean())


def _exp(exponent: float) -> float:
    """The exponential, infinite where it is too large for a number."""
    with np.errstate(over="ignore"):
        return float(np.exp(exponent))


def _upper_tail(distance: float, error: float, freedom: int) -> float:
    """Probability that chance alone reaches so far above 0."""
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    z = distance / error
    return float(special.stdtr(freedom, -z) if freedom else special.ndtr(-z))


def _quantile(alpha: float, freedom: int) -> float:
    return float(-special.stdtrit(freedom, alpha) if freedom else -special.ndtri(alpha))


def _holm(p: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses are rejected, all errors together having probability α at most.

    >>> _holm([0.04, 0.01, 0.02], 0.05), _holm([0.04, 0.03], 0.05)
    ([True, True, True], [False, False])
    """
    rejected = [False] * len(p)
    for place, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] > alpha / (len(p) - place):
            break
        rejected[index] = True
    return rejected
