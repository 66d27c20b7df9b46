"""Theorem 3.1 across training runs: features oscillate more where Σκ² is larger."""

import itertools
import math
from collections.abc import Callable, Sequence

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
ONE_SIDED = 0.025
"""Probability under shuffled runs below which a correlation is believed, on either side."""
PERMUTATIONS = 5040
"""Most shuffles of the runs that are looked at; all of them up to seven runs."""


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
    set beside the measurement; it holds if shuffling the runs seldom gives as large a correlation.
    """
    claim = "range of ‖h_i‖² over training rises with Σκ²"
    table = oscillation_table(runs)
    ranges = table.pivot(index="unit", columns="level", values="range").to_numpy()
    sums = table.pivot(index="unit", columns="level", values="skip_energy").to_numpy()
    if len(ranges) < FEWEST_RUNS:
        advice = f"a correlation across runs needs at least {FEWEST_RUNS} of them"
        return Verdict.undecided("3.1", f"{len(ranges)} runs", claim, advice, n=len(ranges))

    def correlation(units: np.ndarray, paired: np.ndarray | None = None) -> float:
        """Mean over levels of the rank correlation of Σκ² of `units` with ranges of `paired`."""
        others = units if paired is None else paired
        found = []
        for i in range(ranges.shape[1]):
            s, r = stats.rankdata(sums[units, i]), stats.rankdata(ranges[others, i])
            if np.ptp(s) > 0 and np.ptp(r) > 0:
                found.append(np.corrcoef(s, r)[0, 1])
        return float(np.mean(found)) if found else float("nan")

    runs_in_order = np.arange(len(ranges))
    estimate = correlation(runs_in_order)
    interval = bootstrap_interval(correlation, len(ranges), resamples=1000)
    above, below = _permutation_p(lambda paired: correlation(runs_in_order, paired), len(ranges))
    status: Status = (
        "HOLDS" if above <= ONE_SIDED else "VIOLATED" if below <= ONE_SIDED else "INCONCLUSIVE"
    )
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
            "INCONCLUSIVE": "shuffled runs often do as well; add runs with more seeds or schemes",
        }[status]
        + f"; p = {min(above, below):.2g} one-sided"
        + at_zero,
    )  # fmt: skip


def _permutation_p(statistic: Callable[[np.ndarray], float], n: int) -> tuple[float, float]:
    """One-sided p-values, for a statistic this large and this small, when n runs are shuffled.

    All runs' levels move together; exact for up to seven runs.
    """
    rng = np.random.default_rng(0)
    everything = math.factorial(n) <= PERMUTATIONS
    shuffles = (
        itertools.permutations(range(n))
        if everything
        else (rng.permutation(n) for _ in range(PERMUTATIONS))
    )
    observed = statistic(np.arange(n))
    if not np.isfinite(observed):
        return 1.0, 1.0
    drawn = np.array([statistic(np.asarray(shuffle)) for shuffle in shuffles])
    extra = 0 if everything else 1  # the runs as they are count among random shuffles
    close = 1e-9
    above = (np.sum(drawn >= observed - close) + extra) / (len(drawn) + extra)
    below = (np.sum(drawn <= observed + close) + extra) / (len(drawn) + extra)
    return float(above), float(below)
