"""Numbers of one run that several claims ask for."""

import math

import numpy as np
import pandas as pd
from scipy import stats

from experiments.studies import Member, Study
from stability_probe.theory import skip_energy_sum
from stability_probe.verify.oscillation import TRANSIENT


def feature_range(member: Member, level: int | None = None) -> float:
    """Range of the batch-mean ‖h_i‖² over training, after the first sixth of the steps.

    At one level, or the geometric mean over all; infinite if training diverged.
    """
    if member.diverged:
        return math.inf
    if level is not None:
        return member.numbers[f"oscillation.h_{level}"]
    return _geometric([feature_range(member, i) for i in range(member.config.n_skips + 1)])


def output_range(member: Member) -> float:
    """Range of ‖h_0‖² over training."""
    return feature_range(member, 0)


def parameter_range(member: Member) -> float:
    """Range of ‖θ‖² of a block's parameters over the same steps, geometric mean over blocks."""
    if member.diverged:
        return math.inf
    blocks = parameter_energies(member)
    settled = blocks[blocks.index > TRANSIENT * blocks.index.max()]
    ranges = settled.max() - settled.min()
    return _geometric(ranges[ranges > 0])


def parameter_energies(member: Member) -> pd.DataFrame:
    """‖θ‖² of every block by step."""
    frame = member.evidence.frame
    rows = frame[frame.metric == "param_energy"]
    block = rows.site.astype(str).str.partition("/")[0] + rows.level.astype(str)
    return rows.assign(block=block).groupby(["step", "block"]).value.sum().unstack("block")


def gradient_energy(member: Member, first: int | None = None, over_loss: bool = False) -> float:
    """Mean ‖∇W‖² of the network's weights over the steps, or over the first so many.

    Args:
        member: the run.
        first: number of steps; all after the first sixth if not given.
        over_loss: of ‖∇W‖²/ℓ, which is what Theorem 3.3 bounds by ‖x_t‖²Σκ².
    """
    frame = member.evidence.frame
    rows = frame[frame.metric == "grad_energy"]
    steps = rows.groupby("step").value.sum()
    if over_loss:
        steps = steps / member.evidence.series("loss", "loss")[0]
    chosen = steps.iloc[:first] if first else steps[steps.index > TRANSIENT * steps.index.max()]
    return float(chosen.mean())


def final_loss(member: Member) -> float:
    """Mean loss over the last tenth of the steps; infinite if training diverged."""
    return math.inf if member.diverged else member.numbers["final_loss"]


def skip_energy(member: Member) -> float:
    """Σκ_i² over all skips; of learned κ, their measured means."""
    return float(skip_energy_sum(member.evidence.kappa, 1))


def slopes(study: Study, measured: pd.DataFrame, against: pd.DataFrame) -> list[float]:
    """Slope of log measured on log against over the schemes, one a seed.

    Schemes in which either is 0 or not finite, such as κ = 0 without Σκ², are left out.
    """
    found = []
    for seed in measured.index:
        y, x = measured.loc[seed].to_numpy(float), against.loc[seed].to_numpy(float)
        kept = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
        found.append(float(stats.linregress(np.log(x[kept]), np.log(y[kept])).slope))
    return found


def over(table: pd.DataFrame, scheme: str, other: str) -> list[float]:
    """What a scheme has over what another has, seed by seed."""
    return [float(v) for v in table[scheme] / table[other]]


def geometric_mean(values: pd.DataFrame | pd.Series) -> pd.Series:
    """Over seeds; 0 if one of them is, and not a number if one of them is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(np.log(values).mean(skipna=False))


def _geometric(values) -> float:  # type: ignore[no-untyped-def]
    return float(np.exp(np.mean(np.log(np.asarray(values, dtype=float)))))
