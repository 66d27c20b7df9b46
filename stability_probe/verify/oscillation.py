"""Theorem 3.1 across training runs: features oscillate more where Σκ² is larger."""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from stability_probe.theory import skip_energy_sum
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import ALPHA, Interval
from stability_probe.verify.verdict import Status, Verdict

TRANSIENT = 1 / 6
"""Share of the steps at the start, while energies rise from initialisation, that is left out."""
FEWEST_RUNS = 5
"""Below this many runs no correlation is tested."""
PERMUTATIONS = 5040
"""Most shuffles of the runs that are looked at; all of them if there are no more."""


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


def oscillation_verdict(runs: Sequence[Evidence], alpha: float = ALPHA) -> Verdict:
    """Rank correlation over runs of the range of ‖h_i‖² with Σκ², averaged over levels.

    The theorem gives the order of the range alone, so there is no bound to set beside the
    measurement; it holds if shuffling the runs seldom gives as large a correlation. The units are
    runs. Runs of one seed share weights and data, and are shuffled among themselves alone; those
    whose seed no other run has are shuffled among each other.

    Each side is tested at α, exactly but for ties and the number of shuffles: where Σκ² does not
    matter at all, which is the hardest case of the claim, VIOLATED has probability α at most. The
    interval is the correlation less what the shuffles reach, and leaves 0 out if the test does.
    """
    claim = "range of ‖h_i‖² over training rises with Σκ²"
    table = oscillation_table(runs)
    ranges = table.pivot(index="unit", columns="level", values="range")
    sums = table.pivot(index="unit", columns="level", values="skip_energy").to_numpy()
    n = len(ranges)
    if n < FEWEST_RUNS:
        advice = f"a correlation across runs needs at least {FEWEST_RUNS} of them"
        return Verdict.undecided("3.1", f"{n} runs", claim, advice, n=n)
    share = _correlations(sums, ranges.to_numpy())
    seeds = [runs[unit].info.get("seed", f"of run {unit}") for unit in ranges.index]
    orders = _orders(seeds)
    estimate = float(np.trace(share))
    drawn = share[np.arange(n), orders].sum(axis=1)
    interval, p = _shuffled_interval(estimate, drawn, alpha)
    status: Status = (
        "INCONCLUSIVE" if interval is None or interval[0] <= 0 <= interval[1]
        else "HOLDS" if interval[0] > 0 else "VIOLATED"
    )  # fmt: skip
    bare = [run.name for run in runs if not any(run.kappa)]
    at_zero = f"; {', '.join(bare)} (no skips) counts too" if bare else ""
    return Verdict(
        "3.1",
        f"{n} runs",
        claim,
        status,
        measured=float(np.median(ranges[ranges.columns[0]])),
        statistic="rank correlation",
        estimate=estimate,
        interval=interval,
        n=n,
        advice={
            "HOLDS": "runs with a larger Σκ² oscillate more",
            "VIOLATED": "runs with a larger Σκ² oscillate less: at this scale training, "
            "which the theorem does not cover, outweighs initialisation",
            "INCONCLUSIVE": "shuffled runs often do as well; add runs with more seeds or schemes",
        }[status]
        + (
            f" ({len(orders)} orders of these runs can show no p below {alpha:.2g})"
            if len(orders) * alpha < 1
            else ""
        )
        + f"; p = {p:.2g} one-sided"
        + at_zero,
        confidence=1 - 2 * alpha,
    )


def _correlations(sums: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """What pairing unit u's Σκ² with unit v's range adds to the correlation, (units, units).

    The mean over levels of the rank correlation; NaN if it is defined at no level. Levels at which
    either does not vary, or which some run has not, are left out.
    """
    s, r = stats.rankdata(sums, axis=0), stats.rankdata(ranges, axis=0)
    varied = (np.ptp(s, axis=0) > 0) & (np.ptp(r, axis=0) > 0)  # NaN is not
    if not varied.any():
        return np.full((len(s), len(s)), np.nan)
    s, r = stats.zscore(s[:, varied]), stats.zscore(r[:, varied])
    return np.asarray(s @ r.T / s.size)


def _orders(seeds: Sequence[Hashable]) -> np.ndarray:
    """Shuffles of the runs within their strata, (shuffles, runs): all, or many with the identity.

    A stratum is the runs of one seed; runs whose seed no other has make up one together.
    """
    count = Counter(seeds)
    strata: dict[Hashable, list[int]] = {}
    for unit, seed in enumerate(seeds):
        strata.setdefault(seed if count[seed] > 1 else None, []).append(unit)
    groups = list(strata.values())
    if math.prod(math.factorial(len(group)) for group in groups) <= PERMUTATIONS:
        return np.array(list(_every_order(groups, len(seeds))))
    rng = np.random.default_rng(0)
    orders = np.tile(np.arange(len(seeds)), (PERMUTATIONS, 1))
    for group in groups:
        orders[1:, group] = rng.permuted(orders[1:, group], axis=1)
    return orders


def _every_order(groups: Sequence[Sequence[int]], n: int) -> Iterator[np.ndarray]:
    for shuffled in itertools.product(*(itertools.permutations(group) for group in groups)):
        order = np.arange(n)
        for group, members in zip(groups, shuffled, strict=True):
            order[list(group)] = members
        yield order


def _shuffled_interval(
    estimate: float, drawn: np.ndarray, alpha: float
) -> tuple[Interval | None, float]:
    """The estimate less the range that shuffles reach with probability 1 − 2α, and the p-value.

    The lower end is above 0 if and only if the share of shuffles with at least the estimate is at
    most α, and likewise the upper end. `None` and 1 where the estimate is not defined.
    """
    if not np.isfinite(estimate):
        return None, 1.0
    drawn = np.sort(np.where(np.abs(drawn - estimate) < 1e-9, estimate, drawn))
    above, below = float((drawn >= estimate).mean()), float((drawn <= estimate).mean())
    reached = math.floor(alpha * len(drawn) + 1e-9)
    low, high = estimate - drawn[-1 - reached], estimate - drawn[reached]
    return (max(float(low), -1.0), min(float(high), 1.0)), min(above, below)
