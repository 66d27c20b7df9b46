"""Theorem 3.1 on one network: its energies with all κ multiplied by s, against Σ(sκ_j)²."""

from dataclasses import dataclass

import numpy as np

from stability_probe.theory import skip_energy_sum
from stability_probe.verify.advice import larger_batch
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import (
    ALPHA,
    FEWEST_UNITS,
    Interval,
    enough_units,
    least_mean_interval,
    ratio_units,
)
from stability_probe.verify.verdict import Status, Verdict

LINEAR = 0.9
"""Share of the variation with s that a line in Σκ² has to account for."""


@dataclass(frozen=True)
class Counterfactual:
    """Energies of one network under multiples of its κ.

    Attributes:
        factors: the values of s, rising, (factors,).
        signal: Σ_{j>i} (sκ_j)² for every factor and level, (factors, levels); level N has no skips.
        energy: ‖h_i‖²/‖x_t‖², (factors, steps, levels, samples).
    """

    factors: np.ndarray
    signal: np.ndarray
    energy: np.ndarray

    @classmethod
    def of(cls, run: Evidence) -> "Counterfactual":
        """What a run recorded; no factors if it recorded nothing."""
        rows = run.frame[run.frame.metric == "counterfactual_energy"]
        sites = sorted(rows.site.unique(), key=lambda site: float(site.removeprefix("s=")))
        factors = np.array([float(site.removeprefix("s=")) for site in sites])
        if not sites:
            return cls(factors, np.empty((0, 0)), np.empty((0, 0, 0, 0)))
        x = run.samples("sample_energy", "x")
        energy = np.stack([run.samples("counterfactual_energy", site) / x for site in sites])
        sums = [skip_energy_sum(run.kappa, i, "tight") for i in range(energy.shape[2])]
        return cls(factors, np.outer(factors**2, sums), energy)

    def fits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Least-squares line of every sample's energy on the signal.

        Returns:
            Slopes, squared residuals and squared deviations from the mean over s, each
            (steps, levels, samples); levels that no skip feeds are NaN.
        """
        dx = (self.signal - self.signal.mean(0))[:, None, :, None]
        dy = self.energy - self.energy.mean(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = (dx * dy).sum(0) / (dx**2).sum(0)
        return slope, ((dy - slope * dx) ** 2).sum(0), (dy**2).sum(0)

    def unexplained(self) -> np.ndarray:
        """1 − R² pooled over samples, (steps, levels); NaN where nothing varies with s."""
        _, residual, total = self.fits()
        with np.errstate(invalid="ignore"):
            return np.asarray(residual.sum(axis=2) / total.sum(axis=2))


def counterfactual_verdict(run: Evidence, alpha: float = ALPHA) -> Verdict:
    """R² and slope of ‖h_i‖²/‖x_t‖² on Σ(sκ_j)², at the level and noise level where R² is smallest.

    The claim is about this network, so the units are samples: each has a line of its own, and R² is
    pooled over them. R² ≥ `LINEAR` and slope > 0 are claimed of every place (a level at a noise
    level); the intervals are of the smallest R² and the smallest slope, and VIOLATED has
    probability α at most over both and all places together.
    """
    claim = "same weights, all κ times s: ‖h_i‖² is linear in Σ(sκ_j)² and rises with it"
    found = Counterfactual.of(run)
    n = found.energy.shape[3]
    if n < FEWEST_UNITS:
        advice = f"{n} samples were measured and {FEWEST_UNITS} are needed"
        return Verdict.undecided("3.1", run.name, claim, advice, n=n)
    if not np.isfinite(found.energy).all():
        advice = "some ‖h_i‖² is infinite or NaN, or some ‖x_t‖² is 0"
        return Verdict.undecided("3.1", run.name, claim, advice, n=n, unmet=True)
    if not found.signal.any():
        advice = "every κ is 0: there is nothing to scale"
        return Verdict.undecided("3.1", run.name, claim, advice, n=n, unmet=True)
    slope, residual, total = found.fits()
    fed = np.isfinite(slope).all(axis=2)
    if not (total[fed].sum(axis=1) > 0).all():
        advice = "some ‖h_i‖² does not change with κ at all: skips lead past it"
        return Verdict.undecided("3.1", run.name, claim, advice, n=n, unmet=True)
    places = [(int(step), int(level)) for step, level in np.argwhere(fed)]
    explained = 1 - found.unexplained()[fed]
    slope, residual, total = slope[fed], residual[fed], total[fed]  # (places, samples)
    worst, flattest = int(explained.argmin()), int(slope.mean(axis=1).argmin())
    tested = 2 * len(places)
    share = least_mean_interval(1 - ratio_units(residual, total), alpha, tested)
    rise = least_mean_interval(slope, alpha, tested)
    status = _status(share, rise)
    advice = (
        f"least slope c₁ = {slope[flattest].mean():.3g} [{rise[0]:.3g}, {rise[1]:.3g}] at "
        f"{_place(run, places[flattest])}; the bound is the line through s < 1, drawn on to s = 1"
    )
    if status == "INCONCLUSIVE":
        needed = (
            enough_units(n, float(explained[worst]), share, LINEAR)
            if share[0] < LINEAR
            else enough_units(n, float(slope[flattest].mean()), rise, 0.0)
        )
        advice += f"; too few samples to tell: {larger_batch(run, needed)}"
    return Verdict(
        "3.1",
        run.name,
        claim,
        status,
        measured=float(found.energy[-1][places[worst]].mean()),
        bound=_extrapolated(found, places[worst]),
        statistic=f"R² of the line, worst: {_place(run, places[worst])} (needs {LINEAR:g})",
        estimate=float(explained[worst]),
        interval=share,
        n=n,
        advice=advice,
        confidence=1 - 2 * alpha,
    )


def _status(share: Interval, rise: Interval) -> Status:
    """HOLDS if the line surely fits and surely rises; VIOLATED if it surely does not."""
    if share[0] >= LINEAR and rise[0] > 0:
        return "HOLDS"
    return "VIOLATED" if share[1] < LINEAR or rise[1] <= 0 else "INCONCLUSIVE"


def _place(run: Evidence, at: tuple[int, int]) -> str:
    step, level = at
    levels = run.info.get("noise_levels")
    return f"h_{level}" + (f" at t = {levels[step]:g}" if levels else "")


def _extrapolated(found: Counterfactual, at: tuple[int, int]) -> float | None:
    """The mean energy at the largest s that the line through the smaller ones gives."""
    step, level = at
    x, y = found.signal[:, level], found.energy[:, step, level].mean(axis=1)
    if len(x) < 3:
        return None
    slope, offset = np.polyfit(x[:-1], y[:-1], 1)
    return float(offset + slope * x[-1])
