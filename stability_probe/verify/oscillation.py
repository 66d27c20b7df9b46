"""Theorem 3.1 across training runs: features oscillate more where Σκ² is larger."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from stability_probe.theory import skip_energy_sum
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import bootstrap_interval
from stability_probe.verify.verdict import Status, Verdict

TRANSIENT = 1 / 6
"""Share of the steps at the start, while energies rise from initialisation, that is left out."""
FEWEST_RUNS = 5
"""Below this many runs no correlation is tested."""


def oscillation_table(runs: Sequence[Evidence]) -> pd.DataFrame:
    """The range of ‖h_i‖² over training, for every run and level.

    Returns:
        A frame of unit (the run's place in `runs`), run, level, `skip_energy` = ‖x‖² Σ_{j≥i} κ_j²,
        and `range` = max − min over steps of the batch-mean ‖h_i‖², both in units of energy; the
        range is infinite where an energy was not finite.
    """
    rows = []
    for unit, run in enumerate(runs):
        energy = run.series("energy", "h")
        settled = energy[energy.index > TRANSIENT * energy.index.max()]
        x = float(run.input_energies.mean())
        for level in settled.columns:
            values = settled[level].to_numpy()
            rows.append(
                {
                    "unit": unit,
                    "run": run.name,
                    "level": int(level),
                    "skip_energy": x * skip_energy_sum(run.kappa, int(level)),
                    "range": float(np.ptp(values)) if np.isfinite(values).all() else np.inf,
                }
            )
    return pd.DataFrame(rows, columns=["unit", "run", "level", "skip_energy", "range"])


def oscillation_verdict(runs: Sequence[Evidence]) -> Verdict:
    """Rank correlation over runs of the range of ‖h_i‖² with Σκ², averaged over levels.

    The units are runs. The theorem gives the order of the range alone, so there is no bound to
    set beside the measurement; it holds if the correlation is surely positive.
    """
    claim = "range of ‖h_i‖² over training rises with Σκ²"
    table = oscillation_table(runs)
    ranges = table.pivot(index="unit", columns="level", values="range").to_numpy()
    sums = table.pivot(index="unit", columns="level", values="skip_energy").to_numpy()
    if len(ranges) < FEWEST_RUNS:
        advice = f"a correlation across runs needs at least {FEWEST_RUNS} of them"
        return Verdict.undecided("3.1", f"{len(ranges)} runs", claim, advice, n=len(ranges))

    def correlation(units: np.ndarray) -> float:
        pairs = [(sums[units, i], ranges[units, i]) for i in range(ranges.shape[1])]
        ranks = [(stats.rankdata(s), stats.rankdata(r)) for s, r in pairs]
        varied = [(s, r) for s, r in ranks if np.ptp(s) > 0 and np.ptp(r) > 0]
        if not varied:
            return float("nan")
        return float(np.mean([stats.spearmanr(s, r).statistic for s, r in varied]))

    estimate = correlation(np.arange(len(ranges)))
    interval = bootstrap_interval(correlation, len(ranges), resamples=1000)
    status = _status(interval)
    bare = [run.name for run in runs if not any(run.kappa)]
    at_zero = f"; {', '.join(bare)} (no skips) counts too" if bare else ""
    return Verdict(
        "3.1",
        f"{len(ranges)} runs",
        claim,
        status,
        measured=float(np.median(ranges[:, 0])),
        statistic="rank correlation",
        estimate=estimate,
        interval=interval,
        n=len(ranges),
        advice={
            "HOLDS": "runs with a larger Σκ² oscillate more",
            "VIOLATED": "runs with a larger Σκ² oscillate less: at this scale training, "
            "which the theorem does not cover, outweighs initialisation",
            "INCONCLUSIVE": "the interval contains 0; add runs with more seeds or schemes",
        }[status] + at_zero,
    )  # fmt: skip


def _status(interval: tuple[float, float] | None) -> Status:
    if interval is None:
        return "INCONCLUSIVE"
    return "HOLDS" if interval[0] > 0 else "VIOLATED" if interval[1] < 0 else "INCONCLUSIVE"
