"""Lemma 3.2: the mean energy of x_t is what the noise schedule and the data's second moment say."""

from collections.abc import Sequence

import numpy as np

from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import FEWEST_UNITS, bootstrap_interval, equality_status
from stability_probe.verify.verdict import Verdict

WIDEST = 0.1
"""An interval of measured / predicted wider than this supports nothing."""


def input_energy_verdict(runs: Sequence[Evidence]) -> Verdict:
    """Measured against predicted mean ‖x_t‖², over runs that share data and noise schedule.

    The units of the interval are training steps, whose batches are drawn afresh. Runs with one seed
    are trained on the same x_t, so one run a seed is used, the longest.
    """
    claim = "mean ‖x_t‖² = (1 − (1 − s₀²) E[α²]) m"
    described = [run for run in runs if run.predicted_input_energy is not None]
    if not described:
        advice = (
            "the records do not say what data and noise schedule they come from; "
            "pass a Run whose run.json has `input`"
        )
        return Verdict.undecided("3.2", _names(runs), claim, advice)
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
    interval = bootstrap_interval(lambda steps: float(ratio[steps].mean()), len(ratio))
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
            "INCONCLUSIVE": "the interval is too wide to tell; record more steps",
        }[status],
    )


def _names(runs: Sequence[Evidence]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
