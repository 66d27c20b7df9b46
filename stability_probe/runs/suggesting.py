r"""The κ that meets a budget of sensitivity or of feature energy at the least change.

`theory.kappa_budget` solves the problem for paths, or energies, that are held fixed; they change
with κ. So what it says is put into the network and measured; then the model is given a smaller
budget or a larger one, according to what was observed, and solved again, until the measured value
meets the budget and comes close to it. What is returned was measured, never only predicted.

* `"sensitivity"`: σ_max(J) at every sample and noise level;
* `"pathwise"`: its bound Σκ_i‖P_i‖ + ‖P_mid‖, which takes a larger change;
* `"energy"`: the mean of ‖h_0‖²/‖x_t‖² at every noise level.

Norms are certified upper bounds. Scaling a skip need not lower any of these: in front of a
normalisation, the smaller κ_i is, the steeper the rest becomes. Where no κ was found, the result
says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes import ProbeBatch, SensitivityConfig
from stability_probe.runs.budget_measures import BudgetedNetwork, Norms
from stability_probe.skips import Scaling, SkipConnection, Unscaled, scale_skips
from stability_probe.theory.kappa_budget import BudgetModel, cs_multipliers, nearest_multipliers

Quantity = Literal["sensitivity", "pathwise", "energy"]
QUANTITIES: tuple[Quantity, ...] = ("sensitivity", "pathwise", "energy")

ROUNDS = 8
"""The most solutions that are measured for one candidate."""
CLOSE = 0.98
"""A measured value of this share of the budget is close enough to it."""
HALVINGS = 5
"""Measurements on the line from the κ as found to CS, where only CS meets the budget."""
_AIM = 0.99
"""The share of the budget that is aimed at, so that it is not approached from above for ever."""
_LEAST_SLOPE = 0.2
"""The least power of the model's budget that the measured value is taken to follow."""
_LARGEST_STEP = np.log(0.4)
"""The most that the logarithm of that budget is lowered at once."""
_TINY = np.finfo(float).tiny
_GAP = 1e-2
"""A part of J that no path explains, from which on the paths' norms are no bound of σ_max(J)."""
_STEP = 1e-4
"""Multipliers are rounded down to multiples of this: what is printed is what was measured."""


@dataclass(frozen=True)
class Budget:
    """What is not to be exceeded.

    Attributes:
        value: a number, or a share of the largest value that is measured as things are.
        relative: which of the two it is.

    Raises:
        StabilityProbeError: if the number is not positive, or the share above 1.
    """

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.value < np.inf or (self.relative and self.value > 1):
            raise StabilityProbeError(
                "budget: must be a positive number such as 1.2, or a percentage up to 100% of what "
                f"is measured now, got {self.value:g}"
            )

    def resolve(self, now: float) -> float:
        """The budget as a number."""
        return self.value * now if self.relative else self.value


@dataclass(frozen=True)
class Candidate:
    """A choice of κ, measured.

    Attributes:
        multipliers: of the κ that were found, for every level.
        kappa: the κ that come of it.
        predicted: the largest value by the model with everything held fixed.
        measured: the largest measured values by name, as `Suggestion.before`.
        rounds: how many solutions were measured.
        highest: the largest value that was measured in one of them.
        met: whether the budget is.
    """

    multipliers: list[float]
    kappa: list[float]
    predicted: float
    measured: dict[str, float]
    rounds: int
    highest: float
    met: bool


@dataclass(frozen=True)
class Suggestion:
    """What `suggest_kappa` found.

    Attributes:
        of: the quantity.
        budget: what it is not to exceed.
        kappa: the κ as found.
        before: the largest measured values by name: `sigma_max` and `pathwise`, or `energy`.
        best: the κ of the least change; if its `met` is false, the lowest that was measured.
        cs: the same of the CS family, κ_i times κ^(i-1).
        notes: what was assumed.
    """

    of: Quantity
    budget: float
    kappa: list[float]
    before: dict[str, float]
    best: Candidate
    cs: Candidate
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Measured:
    """A measurement at some κ: the values at every point, and what is reported of them."""

    values: np.ndarray
    report: dict[str, float]

    @property
    def largest(self) -> float:
        return float(self.values.max())


Solve = Callable[[BudgetModel, np.ndarray], np.ndarray | None]
Measure = Callable[[np.ndarray], _Measured]


def suggest_kappa(
    model: nn.Module,
    skips: Sequence[SkipConnection],
    points: Sequence[ProbeBatch],
    budget: Budget,
    *,
    of: Quantity = "sensitivity",
    scheme: Scaling | None = None,
    config: SensitivityConfig | None = None,
    seed: int = 0,
    on_measured: Callable[[], None] = lambda: None,
) -> Suggestion:
    """The κ nearest to those of a network that meet a budget, and the best CS beside them.

    Args:
        model: the network; it is left as it was.
        skips: its long skips, at least one.
        points: the samples at every noise level; norms are taken on their first `sensitive` ones.
        budget: what is not to be exceeded at any of them.
        of: the quantity.
        scheme: a scaling that the network has already; `None` for none. Where its κ, or those of
            the network's own code, are no constants, they count as 1.
        config: how norms are taken.
        seed: of their starting vectors.
        on_measured: called after every measurement.

    Raises:
        StabilityProbeError: if there are no skips or points, a value is not finite, or even κ = 0
            exceeds the budget; the message says which budget it meets.
    """
    if not skips or not points:
        raise StabilityProbeError(
            f"suggest: needs long skips and samples, got {len(skips)} and {len(points)}"
        )
    config = replace(config or SensitivityConfig(), paths=True)
    with scale_skips(model, skips, scheme or Unscaled()) as scaled:
        network = BudgetedNetwork(model, skips, points, config, seed, on_measured)
        kappa, notes = _kappa_as_found(skips, scaled.kappa)
        if of == "energy":
            fixed, now, measure, more = _energy_model(network, np.abs(kappa))
        else:
            fixed, now, measure, more = _path_model(network, np.abs(kappa), of)
        search = _Search(fixed, now, budget.resolve(now.largest), measure, kappa)
        best = search.run(_nearest, np.zeros(len(skips)))
        cs = search.run(_cs, np.eye(len(skips))[0])
        if cs.met and not (
            best.met and search.change(best.multipliers) <= search.change(cs.multipliers)
        ):
            best = search.towards(cs)
        if not best.met and not any(best.multipliers):
            raise StabilityProbeError(_infeasible(of, search, best))
    return Suggestion(of, search.limit, kappa.tolist(), now.report, best, cs, [*notes, *more])


@dataclass(frozen=True)
class _Search:
    """The search for κ that meet a budget.

    Attributes:
        fixed: the model with everything held fixed.
        now: the measurement at the κ as found.
        limit: the budget.
        measure: measures at multipliers.
        kappa: the κ as found.
    """

    fixed: BudgetModel
    now: _Measured
    limit: float
    measure: Measure
    kappa: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """What is measured at the κ as found over what the model says there, at every point."""
        return np.asarray(self.now.values / self.fixed.value(np.ones(len(self.kappa))).clip(_TINY))

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
        tried = [_Try(self.now.largest, np.ones(len(self.kappa)), self.now)]
        while len(tried) <= ROUNDS and not self._done(tried[-1]):
            aim = self._next_aim(tried)
            solved = solve(self.fixed, aim / ratio.clip(_TINY))
            m = least if solved is None else solved
            if any(np.array_equal(m, t.m) for t in tried):
                break
            tried.append(_Try(max(aim, lowest), m, self.measure(m)))
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
            highest=max(t.found.largest for t in tried[1:] or tried),
            met=bool(met),
        )

    def towards(self, known: Candidate) -> Candidate:
        """The least change, on the line to κ that are known to meet the budget, that meets it too.

        For networks on which the model misleads: where κ_i scales what a normalisation reads, the
        other paths grow as it falls.
        """
        change = 1 - np.asarray(known.multipliers)
        best, low, high = known, 0.0, 1.0
        highest = known.highest
        for rounds in range(1, HALVINGS + 1):
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
                rounds=known.rounds + rounds,
            )  # fmt: skip
        return replace(best, highest=highest)

    def _next_aim(self, tried: Sequence["_Try"]) -> float:
        """The budget to give to the model: where the measured value will be near the budget.

        By log-log interpolation between one try that meets the budget and one that does not, or
        by extrapolation from the last two, so long as none does.
        """
        goal = _AIM * self.limit
        met = [t for t in tried if self._meets(t)]
        low = max(met, key=lambda t: t.aim) if met else tried[-1]
        others = [t for t in tried if t.aim > low.aim and not self._meets(t)]
        if not others:
            return low.aim * goal / low.found.largest
        high = min(others, key=lambda t: t.aim)
        rise = np.log(high.found.largest / max(low.found.largest, _TINY))
        slope = rise / np.log(high.aim / max(low.aim, _TINY))
        step = np.log(goal / max(low.found.largest, _TINY)) / max(slope, _LEAST_SLOPE)
        return float(max(low.aim, _TINY) * np.exp(max(step, _LARGEST_STEP)))

    def _meets(self, tried: "_Try") -> bool:
        return tried.found.largest <= self.limit

    def _done(self, tried: "_Try") -> bool:
        close = tried.found is self.now or tried.found.largest >= CLOSE * self.limit
        return self._meets(tried) and close

    def change(self, multipliers: Sequence[float] | np.ndarray) -> float:
        """How far κ are from those found."""
        return float(np.linalg.norm(self.kappa * (1 - np.asarray(multipliers))))


@dataclass(frozen=True)
class _Try:
    """A measurement: the budget that the model was given, the multipliers, and what was found."""

    aim: float
    m: np.ndarray
    found: _Measured


def _nearest(model: BudgetModel, budget: np.ndarray) -> np.ndarray | None:
    m = nearest_multipliers(model, budget)
    return None if m is None else _rounded(m)


def _cs(model: BudgetModel, budget: np.ndarray) -> np.ndarray | None:
    m = cs_multipliers(model, budget)
    return None if m is None else np.asarray(_rounded(m[1:2]).sum() ** np.arange(len(m)))


def _rounded(m: np.ndarray) -> np.ndarray:
    """Multipliers rounded down."""
    return np.asarray(np.round(np.floor(m / _STEP + 1e-6) * _STEP, 6))


def _infeasible(of: Quantity, search: _Search, best: Candidate) -> str:
    least = best.measured[_REPORTED[of]]
    return (
        f"suggest: no κ meets the budget of {search.limit:.4g}: with every skip turned off the "
        f"{of} is {least:.4g} still ({search.now.largest:.4g} as found); the least budget "
        f"that is known to be met is {least:.4g}"
    )


_REPORTED = {"sensitivity": "sigma_max", "pathwise": "pathwise", "energy": "energy"}


def _kappa_as_found(
    skips: Sequence[SkipConnection], scheme: list[float] | None
) -> tuple[np.ndarray, list[str]]:
    """κ of the network's code times the scheme's, and where they are taken as 1."""
    notes = []
    if scheme is None:
        notes.append("the scaling is no constant: what is suggested are multipliers of it")
    unknown = [str(s.level) for s in skips if s.kappa is None]
    if unknown:
        notes.append(
            f"what the network does to skip {', '.join(unknown)} is no constant: what is suggested "
            "there are multipliers"
        )
    own = np.array([1.0 if s.kappa is None else s.kappa for s in skips])
    return np.asarray(own * (1.0 if scheme is None else scheme)), notes


def _path_model(
    network: BudgetedNetwork, kappa: np.ndarray, of: Quantity
) -> tuple[BudgetModel, _Measured, Measure, list[str]]:
    """The pathwise bound with its paths held fixed, and how it or σ_max(J) is measured."""

    def measured(norms: Norms) -> _Measured:
        report = {"sigma_max": norms.sigma_max, "pathwise": norms.pathwise}
        values = report[_REPORTED[of]]
        return _Measured(values, {name: float(v.max()) for name, v in report.items()})

    first = network.norms(np.ones(len(kappa)))
    notes = []
    if first.gap.max() > _GAP:
        notes.append(
            f"the paths leave {first.gap.max():.1%} of J unexplained, so that their norms do not "
            "bound it: a gate looks at the decoder"
        )
    model = BudgetModel(kappa, first.paths, first.rest, 1)
    return model, measured(first), lambda m: measured(network.norms(m)), notes


def _energy_model(
    network: BudgetedNetwork, kappa: np.ndarray
) -> tuple[BudgetModel, _Measured, Measure, list[str]]:
    """E = rest + Σ m_i² e_i at every noise level, e_i being what goes when skip i is turned off."""

    def measured(energies: np.ndarray) -> _Measured:
        return _Measured(energies, {"energy": float(energies.max())})

    first = network.energies(np.ones(len(kappa)))
    gains = first - network.energies_without()
    notes = []
    if (gains < 0).any():
        levels = np.flatnonzero((gains < 0).any(axis=1)) + 1
        notes.append(
            f"the energy grows without skip {', '.join(map(str, levels))}: what they add is taken "
            "as 0 there"
        )
    gains = gains.clip(0.0)
    gains *= np.minimum(1.0, first / gains.sum(axis=0).clip(_TINY))
    model = BudgetModel(kappa, gains, (first - gains.sum(axis=0)).clip(0.0), 2)
    return model, measured(first), lambda m: measured(network.energies(m)), notes
