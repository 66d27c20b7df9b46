"""The explicit law of Theorem 3.3 on random networks of Eq. 4, where its constants are known."""

import numpy as np

from stability_probe.theory import gradient_bound, gradient_energy_law
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import (
    ALPHA,
    Interval,
    mean_limits,
    units_needed,
)
from stability_probe.verify.verdict import Status, Verdict

CLAIM = "explicit law of E‖∇_W ℓ_s‖² on random networks"
TOLERANCE = 1.25
"""The factor by which gradients may differ from the law, beside the law's own error."""
GAIN_VARIANCE = 7.0
"""m times the relative variance of a random block's gain: 5 of its ReLU, 2 of its last layer.

The law takes energies for independent that share blocks, 2N + 1 at most, so it is too low by a
factor of at most about exp(7(2N + 1)/m): 1.35 for N = 5, m = 256, where 1.06 to 1.27 are
measured over 1500 networks, and 1.5 to 2.5 for m = 64, of 3.3.
"""
FEWEST = 50
"""Networks below which intervals of such skewed energies miss more often than they say."""
WIDEST = 4.0
"""Where a larger ratio would be allowed, networks are too narrow for the law to say anything."""


def gradient_law_table(run: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """The law's value and the measured largest ‖∇_W ℓ_s‖² of every block, means over samples.

    The law is A‖x‖⁴ + B‖x‖²‖y‖², evaluated on each sample's energies. Where κ depends on the input,
    the energy-weighted gain E‖κu‖²/E‖u‖² takes the place of κ²; what reaches the encoder through
    the gates themselves is left out.

    Returns:
        Law and measurement, each (blocks, networks): a_1..a_N, then b_1..b_N.
    """
    config, gain = run.info["config"], float(run.info.get("block_gain", 1.0))
    kappa, m = run.law_kappa, int(config["m"])
    x, y = (run.samples("sample_energy", site, 0) for site in ("x", "target"))

    def law(target: float) -> np.ndarray:
        return gradient_energy_law(
            kappa, m, 1.0, target, alpha=gain, beta=gain, gamma=gain, merge=config["merge"]
        )[..., None]

    of_weights = law(0.0) * (x**2).mean(1) + (law(1.0) - law(0.0)) * (x * y).mean(1)
    measured = [run.samples("sample_grad_energy", site).mean(2).T for site in ("a", "b")]
    return of_weights.max(axis=2).reshape(2 * len(kappa), -1), np.concatenate(measured)


def gradient_law_verdict(run: Evidence, alpha: float = ALPHA) -> Verdict:
    """The mean of measured over predicted gradient energies at every block a_i, b_i.

    The units are networks, drawn independently. The law is of leading order in N/m, so the mean
    ratio is not tested against 1 but against the band [1/1.25, 1.25 exp(7(2N + 1)/m)]: HOLDS if
    its interval lies inside at every block, VIOLATED if it lies outside at some block. Each of the
    2N intervals has confidence 1 - α/2N, so that a true law is VIOLATED with probability α at most.
    The interval that decides is shown.
    """
    unusable = _unusable(run)
    if unusable:
        return unusable
    law, measured = gradient_law_table(run)
    band, confidence = allowed_ratio(run), 1 - alpha / len(law)
    means = (measured / law).mean(axis=1)
    low, high = mean_limits(measured / law, confidence)
    worst, status = _deciding(low, high, band)
    interval, estimate = (float(low[worst]), float(high[worst])), float(means[worst])
    needed = _needed(measured.shape[1], estimate, interval, band)
    meaning = {
        "HOLDS": "the constants of Theorem 3.3 are what the derivation says",
        "VIOLATED": "a premise fails: κ as stated, zero-mean last layers, or the blocks' gains",
        "INCONCLUSIVE": f"too few networks to tell; record {needed}",
    }[status]
    typical = int(means.argsort()[len(means) // 2])
    return Verdict(
        "3.3",
        run.name,
        CLAIM,
        status,
        measured=float(measured[typical].mean()),
        bound=float(law[typical].mean()),
        statistic=f"mean of measured over predicted at {_block(worst, len(law))}",
        estimate=estimate,
        interval=interval,
        n=measured.shape[1],
        advice=f"{meaning}; allowed are {band[0]:.2f} to {band[1]:.2f}{_naive(run, measured)}",
        confidence=confidence,
    )


def _unusable(run: Evidence) -> Verdict | None:
    """The verdict on records that cannot be tested; `None` if they can."""
    gradients = [run.samples("sample_grad_energy", site) for site in ("a", "b")]
    count, unmet = len(gradients[0]), False
    if count < FEWEST:
        advice = f"too few networks: {count} have recorded gradients, {FEWEST} are needed"
    elif not {"m", "merge"} <= set(run.info.get("config") or {}):
        advice = "`config` in run.json does not say m and merge, which the law depends on"
    elif allowed_ratio(run)[1] > WIDEST:
        wide = np.ceil(GAIN_VARIANCE * (2 * run.n_skips + 1) / np.log(WIDEST / TOLERANCE))
        advice = f"networks too narrow for a law of leading order in N/m; m must be {wide:.0f}"
    elif not all(np.isfinite(g).all() for g in gradients):
        advice, unmet = "some ‖∇_W ℓ_s‖² is infinite or NaN: a network has broken down", True
    else:
        return None
    return Verdict.undecided("3.3", run.name, CLAIM, advice, n=count, unmet=unmet)


def allowed_ratio(run: Evidence) -> Interval:
    """[1/1.25, 1.25 exp(7(2N + 1)/m)], where the mean of measured over predicted may lie."""
    own_error = np.exp(GAIN_VARIANCE * (2 * run.n_skips + 1) / run.info["config"]["m"])
    return 1 / TOLERANCE, float(TOLERANCE * own_error)


def _deciding(low: np.ndarray, high: np.ndarray, band: Interval) -> tuple[int, Status]:
    """The block farthest outside the band for certain; failing that, possibly."""
    for_certain = np.maximum(low - band[1], band[0] - high)
    if for_certain.max() > 0:
        return int(for_certain.argmax()), "VIOLATED"
    possibly = np.maximum(high - band[1], band[0] - low)
    worst = int(possibly.argmax())
    return worst, "INCONCLUSIVE" if possibly[worst] > 0 else "HOLDS"


def _needed(count: int, estimate: float, interval: Interval, band: Interval) -> str:
    above = interval[1] - band[1] > band[0] - interval[0]
    return units_needed(count, estimate, interval, band[1] if above else band[0])


def _block(index: int, blocks: int) -> str:
    kind, level = divmod(index, blocks // 2)
    return f"{'ab'[kind]}_{level + 1}"


def _naive(run: Evidence, measured: np.ndarray) -> str:
    """How far off (4ℓ/m)‖x‖²(Σ_{j≥i} κ_j² + 1) is at the worst block, in words; for unit gains."""
    if run.info.get("block_gain", 1.0) != 1.0:
        return ""
    kappa = run.law_kappa
    loss, x = run.samples("sample_loss", "loss", 0), run.samples("sample_energy", "x", 0)
    c = 4 / run.info["config"]["m"]
    bounds = [
        gradient_bound(kappa, level, loss, x, c=c, c4=c * loss * x).mean()
        for level in range(1, len(kappa) + 1)
    ]
    off = measured.mean(axis=1) / np.tile(bounds, 2)
    worst = int(np.abs(np.log(off)).argmax())
    return (
        f"; with the backward pass taken for independent of the forward pass, "
        f"{_block(worst, len(off))} would be off by a factor of {off[worst]:.3g}"
    )
