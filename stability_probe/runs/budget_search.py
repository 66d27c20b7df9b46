"""The search for κ that meet a budget: solve a model, measure, and solve it again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stability_probe.theory.kappa_budget import BudgetModel, cs_multipliers, nearest_multipliers

ROUNDS = 8
"""The most solutions that are measured for one candidate, κ = 0 as a last resort left out."""
CLOSE = 0.98
"""A measured value of this share of the budget is close enough to it."""
HALVINGS = 5
"""Measurements on the line from the κ as found to κ that meet the budget."""
_AIM = 0.99
"""The share of the budget that is aimed at, so that it is not approached from above for ever."""
_LEAST_SLOPE = 0.2
"""The least power of the model's budget that the measured value is taken to follow."""
_LARGEST_STEP = np.log(0.4)
"""The most that the logarithm of that budget is lowered at once."""
TINY = np.finfo(float).tiny
_STEP = 1e-4
"""Multipliers are rounded down to multiples of this: what is printed is what was measured."""


@dataclass(frozen=True)
class Candidate:
    """A choice of κ, measured.

    Attributes:
        multipliers: of the κ that were found, for every level.
        kappa: the κ that come of it.
        predicted: the largest value by the model with everything held fixed.
        measured: the largest measured values by name, as `Suggestion.before`.
        rounds: how many solutions were measured.
        largest: what the budget is held against.
        highest: the largest value that was measured in one of them.
        met: whether the budget is.
    """

    multipliers: list[float]
    kappa: list[float]
    predicted: float
    measured: dict[str, float]
    rounds: int
    largest: float
    highest: float
    met: bool


@dataclass(frozen=True)
class Measured:
    """A measurement at some κ: the values at every point, and what is reported of them."""

    values: np.ndarray
    report: dict[str, float]

    @property
    def largest(self) -> float:
        """The value that the budget is held against."""
        return float(self.values.max())


Solve = Callable[[BudgetModel, np.ndarray], np.ndarray | None]
Measure = Callable[[np.ndarray], Measured]


@dataclass(frozen=True)
class Search:
    """The search for κ that meet a budget.

    Attributes:
        fixed: the model with everything held fixed.
        now: the measurement at the κ as found.
        limit: the budget.
        measure: measures at multipliers.
        kappa: the κ as found.
    """

    fixed: BudgetModel
    now: Measured
    limit: float
    measure: Measure
    kappa: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """What is measured at the κ as found over what the model says there, at every point."""
        return np.asarray(self.now.values / self.fixed.value(np.ones(len(self.kappa))).clip(TINY))

    def run(self, solve: Solve, least: np.ndarray) -> Candidate:
        """Solve and measure by turns.

        Args:
            solve: gives multipliers for a model and a budget at every point.
            least: what it tends to where no budget can be met.

        Returns:
            The least change of those measured that meet the budget, or else the lowest value.
        """
        ratio = self.ratio
        lowest = float((self.fixed.value(least) * ratio).max())
        tried = [Try(self.now.largest, np.ones(len(self.kappa)), self.now)]
        while len(tried) <= ROUNDS and not self._done(tried[-1]):
            aim = self._next_aim(tried)
            solved = solve(self.fixed, aim / ratio.clip(TINY))
            m = least if solved is None else solved
            if any(np.array_equal(m, t.m) for t in tried):
                break
            tried.append(Try(max(aim, lowest), m, self.measure(m)))
        if not any(map(self._meets, tried)) and not any(np.array_equal(least, t.m) for t in tried):
            tried.append(Try(0.0, least, self.measure(least)))
        met = [t for t in tried if self._meets(t)]
        best = (
            min(met, key=lambda t: self.change(t.m))
            if met
            else min(tried, key=lambda t: t.found.largest)
        )
        return Candidate(
            multipliers=best.m.tolist(),
            kappa=(self.kappa * best.m).tolist(),
            predicted=float((self.fixed.value(best.m) * ratio).max()),
            measured=best.found.report,
            rounds=len(tried) - 1,
            largest=best.found.largest,
            highest=max(t.found.largest for t in tried[1:] or tried),
            met=bool(met),
        )

    def nearer(self, best: Candidate, cs: Candidate) -> Candidate:
        """The least change of the two that meets the budget, or one on the line to it.

        The line is searched where there is room below the budget, or CS needs the smaller change:
        there the model misleads. Where κ_i scales what a normalisation reads, the other paths grow
        as it falls.
        """
        met = [c for c in (best, cs) if c.met]
        if not met:
            return best
        known = min(met, key=lambda c: self.change(c.multipliers))
        if (known is best and best.largest >= CLOSE * self.limit) or min(known.multipliers) == 1:
            return known
        found = self.towards(known)
        return replace(
            found,
            rounds=best.rounds + HALVINGS,
            highest=max(best.highest, found.highest),
        )

    def towards(self, known: Candidate) -> Candidate:
        """The least change that meets the budget on the line to κ that are known to."""
        change = 1 - np.asarray(known.multipliers)
        best, low, high = known, 0.0, 1.0
        highest = known.highest
        for _ in range(HALVINGS):
            share = (low + high) / 2
            m = _rounded(1 - share * change)
            found = self.measure(m)
            highest = max(highest, found.largest)
            if found.largest > self.limit:
                low = share
                continue
            high = share
            best = replace(
                known, multipliers=m.tolist(), kappa=(self.kappa * m).tolist(),
                predicted=float((self.fixed.value(m) * self.ratio).max()), measured=found.report,
                largest=found.largest,
            )  # fmt: skip
        return replace(best, rounds=known.rounds + HALVINGS, highest=highest)

    def _next_aim(self, tried: Sequence["Try"]) -> float:
        """The budget to give to the model: where the measured value will be near the budget.

        By log-log interpolation between one try that meets the budget and one that does not, or
        by extrapolation from the last two, so long as none does.
        """
        goal = _AIM * self.limit
        met = [t for t in tried if self._meets(t)]
        low = max(met, key=lambda t: t.aim) if met else tried[-1]
        others = [t for t in tried if t.aim > low.aim and not self._meets(t)]
        if not others:
            return low.aim * goal / max(low.found.largest, TINY)
        high = min(others, key=lambda t: t.aim)
        rise = np.log(high.found.largest / max(low.found.largest, TINY))
        slope = rise / np.log(high.aim / max(low.aim, TINY))
        step = np.log(goal / max(low.found.largest, TINY)) / max(slope, _LEAST_SLOPE)
        return float(max(low.aim, TINY) * np.exp(max(step, _LARGEST_STEP)))

    def _meets(self, tried: "Try") -> bool:
        return tried.found.largest <= self.limit

    def _done(self, tried: "Try") -> bool:
        close = tried.found is self.now or tried.found.largest >= CLOSE * self.limit
        return self._meets(tried) and close

    def change(self, multipliers: Sequence[float] | np.ndarray) -> float:
        """How far κ are from those found."""
        return float(np.linalg.norm(self.kappa * (1 - np.asarray(multipliers))))


@dataclass(frozen=True)
class Try:
    """A measurement: the budget that the model was given, the multipliers, and what was found."""

    aim: float
    m: np.ndarray
    found: Measured


def nearest(model: BudgetModel, budget: np.ndarray) -> np.ndarray | None:
    """The nearest multipliers by a model, rounded down; `None` if none meet the budget."""
    m = nearest_multipliers(model, budget)
    return None if m is None else _rounded(m)


def cs_family(model: BudgetModel, budget: np.ndarray) -> np.ndarray | None:
    """The same of the CS family, its base rounded down."""
    m = cs_multipliers(model, budget)
    return None if m is None else np.asarray(_rounded(m[1:2]).sum() ** np.arange(len(m)))


def _rounded(m: np.ndarray) -> np.ndarray:
    """Multipliers rounded down."""
    return np.asarray(np.round(np.floor(m / _STEP + 1e-6) * _STEP, 6))
