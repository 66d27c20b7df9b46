"""Theorem 3.3: per-sample gradient energies against ℓ‖x_t‖²Σκ²."""

from dataclasses import dataclass

import numpy as np

from stability_probe.theory import gradient_bound, gradient_scale
from stability_probe.verify.advice import larger_batch, nothing_measured, target_missing
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import (
    ALPHA,
    at_most_status,
    enough_units,
    fewest_for_share,
    least_share_interval,
    ratio_units,
    share_status,
    student_interval,
)
from stability_probe.verify.verdict import Verdict

REQUIRED = 0.85
"""Share of the held-out half that has to lie below the bound ("with high probability")."""


@dataclass(frozen=True)
class Gradients:
    """Per-sample gradient energies of a run, each array (steps, samples).

    Attributes:
        loss: ℓ_s.
        x: ‖x_t‖².
        energy: the largest ‖∇W ℓ_s‖² over the weights W of a block, by kind (`a`, `b`) and level;
            frozen blocks are not there.
        kappa: κ_1..κ_N.
    """

    loss: np.ndarray
    x: np.ndarray
    energy: dict[tuple[str, int], np.ndarray]
    kappa: list[float]

    @classmethod
    def of(cls, run: Evidence) -> "Gradients":
        """The per-sample gradients in a run's records."""
        energy = {}
        for q in ("a", "b"):
            for level in range(1, run.n_skips + 1):
                values = run.samples("sample_grad_energy", q, level)
                if values.size:
                    energy[q, level] = values
        loss, x = run.samples("sample_loss", "loss", 0), run.samples("sample_energy", "x", 0)
        return cls(loss, x, energy, run.kappa)

    @property
    def sound(self) -> bool:
        """Whether all numbers are positive and finite."""
        values = np.stack([self.loss, self.x, *self.energy.values()])
        return bool(np.isfinite(values).all() and (values > 0).all())

    @property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the samples with the smaller and with the larger ℓ‖x‖².

        By the geometric mean over steps, and so the same at every step: no sample is calibrated on
        at one step and held out at another. A single sample is among the smaller ones.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            order = np.argsort(np.log(self.loss * self.x).mean(axis=0), kind="stable")
        half = max(1, len(order) // 2)
        return order[:half], order[half:]

    def constants(self) -> dict[str, np.ndarray]:
        """c of the bound c ℓ‖x‖²(Σκ² + 1), (steps,), per kind of block.

        It is the smallest that covers the half of the samples with the smaller ℓ‖x‖².
        """
        easy, _ = self.halves
        least: dict[str, np.ndarray] = {}
        for (q, level), g in self.energy.items():
            ratio = (g / self._unit_bound(level))[:, easy].max(axis=1)
            least[q] = np.maximum(least.get(q, ratio), ratio)
        return least

    def bounds(self) -> dict[tuple[str, int], np.ndarray]:
        """c ℓ‖x‖²(Σκ² + 1) for every block, (steps, samples)."""
        c = self.constants()
        return {(q, i): c[q][:, None] * self._unit_bound(i) for q, i in self.energy}

    def _unit_bound(self, level: int) -> np.ndarray:
        """ℓ‖x‖²(Σκ² + 1): the bound with c = 1 and the derived c_4 = c ℓ‖x‖²."""
        return gradient_bound(self.kappa, level, self.loss, self.x, c4=self.loss * self.x)


def gradient_slope_verdict(run: Evidence, alpha: float = ALPHA) -> Verdict:
    """Log–log slope of gradient energy on ℓ‖x‖²Σκ²: at most 1 if the bound has the right order.

    Each kind of block has a constant of its own at every step, so the slope is taken within
    (block kind, step), over levels and samples. A slope above 1 does not contradict the inequality
    on the samples at hand, which `gradient_bound_verdict` tests.

    The claim is about this network, so the units are samples, each with all its levels and steps;
    it is tested on one side at α.
    """
    claim = "order: ‖∇W ℓ_s‖² grows no faster than ℓ_s‖x_t‖²Σκ² (slope ≤ 1)"
    found = Gradients.of(run)
    unfit = _unfit(run, found, claim, alpha)
    if unfit is not None:
        return unfit
    if not any(run.kappa):
        advice = "Σκ² = 0 without skips: the theorem leaves the constant c₄ alone"
        return Verdict.undecided("3.3", run.name, claim, advice, n=found.x.shape[1], unmet=True)
    pairs = _log_pairs(found)
    if not pairs:
        advice = "the blocks that skips feed are frozen: they have no gradients"
        return Verdict.undecided("3.3", run.name, claim, advice, n=found.x.shape[1], unmet=True)
    cross, square = np.zeros(found.x.shape[1]), np.zeros(found.x.shape[1])
    for x, y in pairs:
        dx, dy = x - x.mean(axis=(1, 2), keepdims=True), y - y.mean(axis=(1, 2), keepdims=True)
        cross += (dx * dy).sum(axis=(0, 1))
        square += (dx * dx).sum(axis=(0, 1))
    estimate = float(cross.sum() / square.sum())
    interval = student_interval(ratio_units(cross, square), 1 - 2 * alpha)
    status = at_most_status(interval, 1.0)
    over_samples, over_levels = _slopes_apart(pairs)
    meaning = {
        "HOLDS": "the order of the bound is right",
        "VIOLATED": "gradients grow faster than the bound over this range, which therefore "
        "holds through its constant alone",
        "INCONCLUSIVE": "a slope of 1 is inside the interval; "
        + larger_batch(run, enough_units(len(cross), estimate, interval, 1.0)),
    }[status]
    apart = f"{over_samples:.2g} over samples within a level, {over_levels:.2g} over levels"
    return Verdict(
        "3.3",
        run.name,
        claim,
        status,
        measured=float(np.median(np.exp(np.concatenate([y.ravel() for _, y in pairs])))),
        statistic="log–log slope",
        estimate=estimate,
        interval=interval,
        n=len(cross),
        advice=f"{meaning}; {apart}{_gains(run)}",
        confidence=1 - 2 * alpha,
    )


def gradient_bound_verdict(run: Evidence, alpha: float = ALPHA) -> Verdict:
    """The share of held-out gradient energies below their bound, at the block where it is smallest.

    The constants come from the half of the samples with the smaller ℓ‖x‖² and are held against
    the other half: the bound has to extrapolate. c_4 = c ℓ‖x‖², the derived law of unit gains.

    The claim, that every block's share is `REQUIRED` at least, is about this network, so the units
    are samples. The interval is of the smallest share; VIOLATED has probability α at most over all
    blocks together.
    """
    claim = "‖∇W ℓ_s‖² ≤ c ℓ_s‖x_t‖²(Σκ² + 1)"
    found = Gradients.of(run)
    unfit = _unfit(run, found, claim, alpha)
    if unfit is not None:
        return unfit
    _, hard = found.halves
    bounds = found.bounds()
    g = np.stack([e[:, hard] for e in found.energy.values()])
    limit = np.stack([bounds[b][:, hard] for b in found.energy])
    below = (g <= limit).mean(axis=(1, 2))
    worst, level = list(found.energy)[int(below.argmin())]
    share = float(below.min())
    interval = least_share_interval(share, len(hard), alpha, len(below))
    status = share_status(interval, REQUIRED)
    typical = int(np.argsort(limit.ravel() / g.ravel())[g.size // 2])
    meaning = {
        "HOLDS": "constants from easy samples cover the hard ones",
        "VIOLATED": "constants from easy samples do not cover the hard ones",
        "INCONCLUSIVE": "too few samples to tell; "
        + larger_batch(run, enough_units(found.x.shape[1], share, interval, REQUIRED)),
    }[status]
    return Verdict(
        "3.3",
        run.name,
        claim,
        status,
        measured=float(g.ravel()[typical]),
        bound=float(limit.ravel()[typical]),
        statistic=f"share below, worst block {worst}_{level} (needs {REQUIRED:.0%})",
        estimate=share,
        interval=interval,
        n=len(hard),
        advice=meaning + _gains(run),
        confidence=1 - 2 * alpha,
    )


def _unfit(run: Evidence, found: Gradients, claim: str, alpha: float) -> Verdict | None:
    """A verdict that the records cannot carry the claim, if so."""
    n = found.loss.shape[1]
    fewest = 2 * fewest_for_share(REQUIRED, alpha)
    if n < fewest or not found.energy:
        advice = _missing(run, n, fewest)
        return Verdict.undecided("3.3", run.name, claim, advice, n=n)
    if not found.sound:
        advice = "some gradient, loss or ‖x_t‖² is 0, infinite or NaN: the network has broken down"
        return Verdict.undecided("3.3", run.name, claim, advice, n=n, unmet=True)
    return None


def _missing(run: Evidence, n: int, fewest: int) -> str:
    """Which gradients of single samples are missing, of n that were measured, and why."""
    if not run.samples("sample_energy", "x").size:
        return nothing_measured(run)
    if n == 0:
        return f"no gradients of single samples were measured: {target_missing(run, fewest)}"
    if n >= fewest:
        return "no block that a skip feeds has gradients: its parameters are frozen"
    recorded = f"per-sample gradients of {n} samples were recorded; {fewest} are needed"
    return f"{recorded}: {larger_batch(run, fewest)}"


def _log_pairs(found: Gradients) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logarithms of ℓ‖x‖²Σκ² and of the gradient energy, (steps, levels, samples), per kind.

    Levels with Σκ² = 0 are left out.
    """
    pairs = []
    for q in ("a", "b"):
        levels = [i for kind, i in found.energy if kind == q and any(found.kappa[i - 1 :])]
        if levels:
            scales = [gradient_scale(found.kappa, i, found.loss, found.x) for i in levels]
            energies = [found.energy[q, i] for i in levels]
            pairs.append((np.log(np.stack(scales, axis=1)), np.log(np.stack(energies, axis=1))))
    return pairs


def _slopes_apart(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The slope over samples within (step, level), and over levels' means within a step."""
    within, between = np.zeros(2), np.zeros(2)
    for x, y in pairs:
        dx = x - x.mean(axis=2, keepdims=True)
        mean_x = x.mean(axis=2) - x.mean(axis=(1, 2))[:, None]
        within += [(dx * y).sum(), (dx * dx).sum()]
        between += [(mean_x * y.mean(axis=2)).sum(), (mean_x * mean_x).sum()]
    return (
        float(within[0] / within[1]) if within[1] > 0 else float("nan"),
        float(between[0] / between[1]) if between[1] > 0 else float("nan"),
    )


def _gains(run: Evidence) -> str:
    return (
        "; κ is the mean measured gain, as it depends on the input" if run.input_dependent else ""
    )
