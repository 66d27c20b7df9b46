"""Lemma 3.2: the mean energy of x_t is what the noise schedule and the data's second moment say."""

from collections.abc import Sequence

import numpy as np

from stability_probe.verify.advice import input_missing
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import (
    ALPHA,
    FEWEST_UNITS,
    equality_status,
    mean_interval,
)
from stability_probe.verify.verdict import Verdict

WIDEST = 0.1
"""An interval of measured / predicted wider than this supports nothing."""


def input_energy_verdict(runs: Sequence[Evidence], alpha: float = ALPHA) -> Verdict:
    """Measured against predicted mean ‖x_t‖², over runs that share data and noise schedule.

    An equality, tested on both sides at α, about the data set at hand: s₀² is its own second
    moment. The units are training steps: noise and noise levels are drawn afresh in each, and
    images without replacement within an epoch, which makes means over steps vary less than those of
    independent ones. So with few images, each seen often, the interval errs on the wide side. Runs
    with one seed are trained on the same x_t, so one run a seed is used, the longest.
    """
    claim = "mean ‖x_t‖² = (1 − (1 − s₀²) E[α²]) m"
    described = [run for run in runs if run.predicted_input_energy is not None]
    if not described:
        return Verdict.undecided("3.2", _names(runs), claim, input_missing())
    longest_last = sorted(described, key=lambda run: len(run.input_energies))
    by_seed = {run.info.get("seed"): run for run in longest_last}
    energies = np.concatenate([run.input_energies.to_numpy() for run in by_seed.values()])
    if len(energies) < FEWEST_UNITS:
        advice = f"{len(energies)} steps were recorded; {FEWEST_UNITS} are needed"
        return Verdict.undecided("3.2", _names(runs), claim, advice, n=len(energies))
    if not np.isfinite(energies).all():
        advice = "some ‖x_t‖² is infinite or NaN"
        return Verdict.undecided("3.2", _names(runs), claim, advice, n=len(energies), unmet=True)
    predicted = described[0].predicted_input_energy or 0.0
    ratio = energies / predicted
    interval = mean_interval(ratio, 1 - alpha)
    needed = int(np.ceil(len(ratio) * ((interval[1] - interval[0]) / WIDEST) ** 2))
    status = equality_status(interval, 1.0, WIDEST)
    return Verdict(
        "3.2",
        _names(runs),
        claim,
        status,
        measured=float(energies.mean()),
        bound=predicted,
        statistic="measured / predicted",
        estimate=float(ratio.mean()),
        interval=interval,
        n=len(ratio),
        advice={
            "HOLDS": "the inputs have the energy that the theorems assume",
            "VIOLATED": "the data or the noise schedule is not what run.json says",
            "INCONCLUSIVE": f"the interval is too wide to tell; record about {needed} steps",
        }[status],
        confidence=1 - alpha,
    )


def _names(runs: Sequence[Evidence]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
