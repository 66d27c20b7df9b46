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
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes import ProbeBatch, SensitivityConfig
from stability_probe.runs.budget_measures import BudgetedNetwork, Norms
from stability_probe.runs.budget_search import (
    TINY,
    Candidate,
    Measure,
    Measured,
    Search,
    cs_family,
    nearest,
)
from stability_probe.skips import Scaling, SkipConnection, Unscaled, scale_skips
from stability_probe.theory.kappa_budget import BudgetModel

Quantity = Literal["sensitivity", "pathwise", "energy"]
QUANTITIES: tuple[Quantity, ...] = ("sensitivity", "pathwise", "energy")

_GAP = 1e-2
"""A part of J that no path explains, from which on the paths' norms are no bound of σ_max(J)."""


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
class Suggestion:
    """What `suggest_kappa` found.

    Attributes:
        of: the quantity.
        budget: what it is not to exceed.
        kappa: the κ as found.
        before: the largest measured values by name: `sigma_max` and `pathwise`, or `energy`.
        best: the κ of the least change that was found; if its `met` is false, those with the lowest
            value that was measured.
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
        StabilityProbeError: if there are no skips or points, or a value is not finite.
    """
    if not skips or not points:
        raise StabilityProbeError(
            f"suggest: needs long skips and samples, got {len(skips)} and {len(points)}"
        )
    config = config or SensitivityConfig()
    with scale_skips(model, skips, scheme or Unscaled()) as scaled:
        network = BudgetedNetwork(model, skips, points, config, seed, on_measured)
        kappa, notes = _kappa_as_found(skips, scaled.kappa)
        if of == "energy":
            fixed, now, measure, more = _energy_model(network, np.abs(kappa))
        else:
            fixed, now, measure, more = _path_model(network, np.abs(kappa), of)
        search = Search(fixed, now, budget.resolve(now.largest), measure, kappa)
        best = search.run(nearest, np.zeros(len(skips)))
        cs = search.run(cs_family, np.eye(len(skips))[0])
        best = search.nearer(best, cs)
    return Suggestion(of, search.limit, kappa.tolist(), now.report, best, cs, [*notes, *more])


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
) -> tuple[BudgetModel, Measured, Measure, list[str]]:
    """The pathwise bound with its paths held fixed, and how it or σ_max(J) is measured."""

    def measured(norms: Norms) -> Measured:
        report = {"sigma_max": norms.sigma_max, "pathwise": norms.pathwise}
        values = report[_REPORTED[of]]
        return Measured(values, {name: float(v.max()) for name, v in report.items()})

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
) -> tuple[BudgetModel, Measured, Measure, list[str]]:
    """E = rest + Σ m_i² e_i at every noise level, e_i being what goes when skip i is turned off."""

    def measured(energies: np.ndarray) -> Measured:
        return Measured(energies, {"energy": float(energies.max())})

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
    gains *= np.minimum(1.0, first / gains.sum(axis=0).clip(TINY))
    model = BudgetModel(kappa, gains, (first - gains.sum(axis=0)).clip(0.0), 2)
    return model, measured(first), lambda m: measured(network.energies(m)), notes
