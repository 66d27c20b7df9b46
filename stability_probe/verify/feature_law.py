"""The explicit law of Theorem 3.1 on random networks of Eq. 4, where its constants are known."""

import numpy as np

from stability_probe.theory import feature_energy_law
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import (
    ALPHA,
    FEWEST_UNITS,
    equality_status,
    mean_interval,
)
from stability_probe.verify.verdict import Verdict

WIDEST = 0.5
"""A wider interval of the slope supports nothing."""
FLAT = 0.05
"""Relative spread of the predictions below which an intercept cannot be told from a slope."""


def law_table(run: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """The law's prediction and the measurement of ‖h_i‖²/‖x_t‖².

    Where κ depends on the input, the energy-weighted gain E‖κu‖²/E‖u‖² takes the place of κ², which
    keeps the law exact: decoder blocks are independent of the gates.

    Returns:
        Predicted (levels,), and measured (networks, levels).
    """
    gain = float(run.info.get("block_gain", 1.0))
    predicted = feature_energy_law(run.law_kappa, alpha=gain, beta=gain, gamma=gain)
    energy = run.series("energy", "h").to_numpy() / run.series("energy", "x").to_numpy()
    return predicted, energy


def feature_law_verdict(run: Evidence, alpha: float = ALPHA) -> Verdict:
    """Slope and intercept of measured against predicted energies over levels.

    The units are networks, drawn independently: each has a slope and an intercept of its own, and
    their means are tested against 1 and 0, each on both sides at α/2, so that a true law is
    VIOLATED with probability α at most. Where all predictions are the same (no skips), the line is
    put through the origin and its slope is tested at α.
    """
    claim = "explicit law of E‖h_i‖² on random networks"
    count = len(run.input_energies)
    if count < FEWEST_UNITS:
        advice = f"too few networks: {count} were recorded and {FEWEST_UNITS} are needed"
        return Verdict.undecided("3.1", run.name, claim, advice, n=count)
    predicted, measured = law_table(run)
    if not np.isfinite(measured).all():
        advice = "some ‖h_i‖² is infinite or NaN: a network has broken down"
        return Verdict.undecided("3.1", run.name, claim, advice, n=count, unmet=True)
    flat = bool(np.ptp(predicted) <= FLAT * predicted.mean())
    slopes, intercepts = _lines(predicted, measured, flat)
    confidence = 1 - alpha if flat else 1 - alpha / 2
    interval = mean_interval(slopes, confidence)
    offset = mean_interval(intercepts, confidence)
    status = equality_status(interval, 1.0, WIDEST)
    if equality_status(offset, 0.0, np.inf) == "VIOLATED":
        status = "VIOLATED"
    line = "line through the origin" if flat else (
        f"intercept {intercepts.mean():.2g} [{offset[0]:.2g}, {offset[1]:.2g}]"
    )  # fmt: skip
    needed = int(np.ceil(count * ((interval[1] - interval[0]) / WIDEST) ** 2))
    meaning = {
        "HOLDS": "the constants of Theorem 3.1 are what the derivation says",
        "VIOLATED": "a premise fails: κ as stated, zero-mean last layers, or the blocks' gains",
        "INCONCLUSIVE": f"too few networks to tell; record about {needed}",
    }[status]
    return Verdict(
        "3.1",
        run.name,
        claim,
        status,
        measured=float(measured[:, 0].mean()),
        bound=float(predicted[0]),
        statistic="slope",
        estimate=float(slopes.mean()),
        interval=interval,
        n=count,
        advice=f"{meaning}; {line}",
        confidence=confidence,
    )


def _lines(
    predicted: np.ndarray, measured: np.ndarray, flat: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares slope and intercept of every network; through the origin if `flat`."""
    centred = predicted - (0.0 if flat else predicted.mean())
    slopes = measured @ centred / (centred @ centred)
    intercepts = np.zeros_like(slopes) if flat else measured.mean(1) - slopes * predicted.mean()
    return slopes, intercepts
