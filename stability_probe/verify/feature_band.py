"""Theorem 3.1 on a trained network: its band, with constants fitted on half of the samples."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from stability_probe.theory import feature_band, skip_energy_sum
from stability_probe.theory.huang2023_features import Index
from stability_probe.verify.advice import larger_batch, nothing_measured
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import (
    ALPHA,
    enough_units,
    fewest_for_share,
    least_share_interval,
    share_status,
)
from stability_probe.verify.verdict import Verdict

COVERED = 0.99
"""Share of the calibration half that the band is made to cover, if a ρ up to `WIDEST` can."""
WIDEST = 0.8
"""Largest ρ: the band's sides are then a factor ((1+ρ)/(1−ρ))² = 81 apart, and it says little."""
REQUIRED = 0.85
"""Share of the held-out half that has to lie in the band ("with high probability")."""


@dataclass(frozen=True)
class Band:
    """Constants of Theorem 3.1 fitted at one step; c_2 = c_3.

    Attributes:
        c1: the constant before ‖x_t‖² Σκ².
        c2: the additive constant.
        rho: ρ in (0, 1).
    """

    c1: float
    c2: float
    rho: float


def fit_band(signal: np.ndarray, energy: np.ndarray) -> Band:
    """Fit the ratio of c_1 to c_2 = c_3 in log energy, then their size and ρ to cover the samples.

    With r the energies over the fitted line, a band from (1−ρ)² to (1+ρ)² times g covers all r from
    r₀ to r₁ if ρ = (√r₁ − √r₀)/(√r₁ + √r₀) and g = √(r₀r₁)/(1−ρ²). Where `WIDEST` is less than that
    ρ, the same g leaves out as much above as below, in log energy.

    Args:
        signal: ‖x_t‖² Σκ² of every value; all zero if there are no skips.
        energy: ‖h_i‖² of every value, of the same shape, positive.

    >>> signal = np.linspace(1, 10, 50)
    >>> band = fit_band(signal, 3 * signal + 2)
    >>> round(band.c1, 2), round(band.c2, 2), round(band.rho, 2)
    (3.0, 2.0, 0.0)
    """
    signal, energy = signal.ravel(), energy.ravel()
    scale, unit = float(np.median(energy)), float(signal.max())
    if unit > 0:
        shape = signal / unit

        def misfit(constants: np.ndarray) -> np.ndarray:
            c1, c2 = np.exp(constants)
            return np.asarray(np.log(c1 * shape + c2) - np.log(energy / scale))

        c1, c2 = np.exp(least_squares(misfit, np.log([0.5, 0.5]), bounds=(-30, 30)).x)
        c1, c2 = c1 * scale / unit, c2 * scale
    else:
        c1, c2 = 0.0, scale
    low, high = np.sqrt(
        np.quantile(energy / (c1 * signal + c2), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    )
    rho = float(np.clip((high - low) / (high + low), 1e-6, WIDEST))
    g = high * low / (1 - rho**2)
    return Band(float(c1 * g), float(c2 * g), rho)


def fit_bands(run: Evidence, index: Index = "tight") -> list[Band]:
    """A band for each step at which the probe batch was measured, from its even samples.

    None if nothing was measured, or some energy is zero or not finite.
    """
    x, h, kappa = _measurements(run)
    if not _sound(x, h):
        return []
    return [fit_band(_signal(x[t], kappa, index)[:, ::2], h[t][:, ::2]) for t in range(len(h))]


def feature_band_verdict(run: Evidence, index: Index = "tight", alpha: float = ALPHA) -> Verdict:
    """The share of held-out energies inside the band, at the level where it is smallest.

    The constants hide the weights, which training changes, so they are fitted at every measured
    step, on the even samples, and the odd ones are held against them. A band of ρ up to `WIDEST`
    has to do, so energies that Σκ² does not explain fall out.

    The claim, that every level's share is `REQUIRED` at least, is about this network, so the units
    are samples: the same ones at every step, those held out never among those fitted. The interval
    is of the smallest share; VIOLATED has probability α at most over all levels together.
    """
    claim = f"‖h_i‖² in the band (1±ρ)²(c₁‖x_t‖²Σκ² + c₂), {index} sum"
    x, h, kappa = _measurements(run)
    n = h.shape[2] // 2 if h.size else 0
    fewest = fewest_for_share(REQUIRED, alpha)
    if n < fewest:
        advice = (
            f"{n} held-out samples; a probe batch of {2 * fewest} is needed: "
            + larger_batch(run, 2 * fewest)
            if h.size
            else nothing_measured(run)
        )
        return Verdict.undecided("3.1", run.name, claim, advice, n=n)
    if not _sound(x, h):
        advice = "some energy is zero, infinite or NaN: the network has broken down"
        return Verdict.undecided("3.1", run.name, claim, advice, n=n, unmet=True)
    bands = fit_bands(run, index)
    held_out, levels = h[:, :, 1::2], range(h.shape[1])
    lower, upper = np.empty_like(held_out), np.empty_like(held_out)
    for t, band in enumerate(bands):
        for i in levels:
            lower[t, i], upper[t, i] = feature_band(
                kappa, i, x[t, 0, 1::2], rho=band.rho, c1=band.c1, c2=band.c2, c3=band.c2,
                index=index,
            )  # fmt: skip
    inside = (held_out >= lower) & (held_out <= upper)
    worst = int(inside.mean(axis=(0, 2)).argmin())
    share = float(inside[:, worst].mean())
    interval = least_share_interval(share, n, alpha, len(levels))
    status = share_status(interval, REQUIRED)
    typical = int(np.argsort(upper.ravel() / held_out.ravel())[upper.size // 2])
    rho = [band.rho for band in bands]
    explained = np.mean(
        [_explained(_signal(x[t], kappa, index), h[t], b) for t, b in enumerate(bands)]
    )
    meaning = {
        "HOLDS": f"ρ = {min(rho):.2f}..{max(rho):.2f} does",
        "VIOLATED": f"energies spread more than Σκ² and ρ ≤ {WIDEST} allow",
        "INCONCLUSIVE": "too few samples to tell; "
        + larger_batch(run, enough_units(2 * n, share, interval, REQUIRED)),
    }[status] + f"; Σκ²‖x_t‖² explains {max(explained, 0):.0%} of the variation of log ‖h_i‖²"
    measured_gains = "; κ is the mean measured gain, as it depends on the input"
    return Verdict(
        "3.1",
        run.name,
        claim,
        status,
        measured=float(held_out.ravel()[typical]),
        bound=float(upper.ravel()[typical]),
        statistic=f"share inside, worst level h_{worst} (needs {REQUIRED:.0%})",
        estimate=share,
        interval=interval,
        n=n,
        advice=meaning + (measured_gains if run.input_dependent else ""),
        confidence=1 - 2 * alpha,
    )


def _explained(signal: np.ndarray, energy: np.ndarray, band: Band) -> float:
    """Share of the variance of log energy that the fitted line accounts for."""
    residual = np.log(energy) - np.log(band.c1 * signal + band.c2)
    variance = float(np.log(energy).var())
    return 1 - float(residual.var()) / variance if variance > 0 else 0.0


def _measurements(run: Evidence) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """‖x_t‖² (steps, 1, samples), ‖h_i‖² (steps, levels, samples) and κ."""
    return run.samples("sample_energy", "x"), run.samples("sample_energy", "h"), run.kappa


def _sound(x: np.ndarray, h: np.ndarray) -> bool:
    """Whether there are energies, all of them positive and finite."""
    values = np.concatenate([x.ravel(), h.ravel()])
    return bool(values.size and np.isfinite(values).all() and (values > 0).all())


def _signal(x: np.ndarray, kappa: list[float], index: Index) -> np.ndarray:
    """‖x_t‖² Σκ² for every level and sample, from ‖x_t‖² (1, samples)."""
    return np.concatenate([x * skip_energy_sum(kappa, i, index) for i in range(len(kappa) + 1)])
