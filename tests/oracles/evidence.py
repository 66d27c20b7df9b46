"""Records with a known truth, written down directly: no network, no probe, no training.

Every builder returns `Evidence` whose law holds as stated, up to log-normal noise of a given
standard deviation (0: exactly), unless an argument breaks it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stability_probe.runs import Run
from stability_probe.verify import Evidence

COLUMNS = ["step", "metric", "site", "level", "stat", "value"]
KAPPA = (1.0, 0.7, 0.49)
SCHEDULE = (1, 50, 100)
"""Steps at which the probe batch is measured."""
INPUT = {"m": 64, "second_moment": 1 / 3, "mean_alpha_squared": 0.75}
"""E‖x_t‖² = (1 − 2/3 · 3/4) · 64 = 32."""


def traced(
    metric: str,
    site: str,
    table: Any,
    *,
    first_level: int = 0,
    spread: float = 0.0,
    steps: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Rows of a quantity (steps, levels): `mean`, and `min` and `max` at ∓spread of it."""
    table = np.asarray(table, float)
    stats = {"mean": table, "min": table * (1 - spread), "max": table * (1 + spread)}
    return pd.concat(
        _rows(metric, site, values[:, :, None], first_level, steps, lambda _, stat=stat: stat)
        for stat, values in stats.items()
    )


def sampled(
    metric: str, site: str, table: Any, *, first_level: int = 0, steps: Sequence[int] = SCHEDULE
) -> pd.DataFrame:
    """Rows of a scheduled measurement (steps, levels, samples), as stats s0, s1, ...."""
    return _rows(metric, site, np.asarray(table, float), first_level, steps, lambda s: f"s{s}")


def _rows(metric, site, table, first_level, steps, stat) -> pd.DataFrame:
    number = np.arange(1, len(table) + 1) if steps is None else np.asarray(steps)
    t, level, sample = (index.ravel() for index in np.indices(table.shape))
    return pd.DataFrame(
        {
            "step": number[t],
            "metric": metric,
            "site": site,
            "level": level + first_level,
            "stat": [stat(s) for s in sample],
            "value": table.ravel(),
        }
    )


def training(
    *frames: pd.DataFrame, scheme: str = "cs:0.7", kappa: Sequence[float] = KAPPA, **info: Any
) -> Evidence:
    """Evidence of a training run."""
    known = {"kind": "training", "scheme": scheme, "kappa": list(kappa), "seed": 0, **info}
    return Evidence(scheme, _concat(frames), known)


def bare(evidence: Evidence) -> Evidence:
    """The same records without a `run.json`."""
    return Evidence("records", evidence.frame)


def joined(*parts: Evidence) -> Evidence:
    """The records of several, under the name and the info of the first."""
    return Evidence(parts[0].name, _concat([p.frame for p in parts]), parts[0].info)


def stored(evidence: Evidence, folder: Path, config: dict[str, Any] | None = None) -> Run:
    """The evidence as a complete run on disk."""
    run = Run(folder, config)
    run.begin(evidence.info)
    if len(evidence.frame):
        run.append(evidence.frame)
    run.end("complete", None, {})
    return run


def _concat(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    if not frames:
        return pd.DataFrame({name: [] for name in COLUMNS})
    return pd.concat(frames, ignore_index=True)


def tail_sums(kappa: Sequence[float]) -> np.ndarray:
    """Σ_{j>i} κ_j² for i = 0..N, by hand."""
    return np.array([sum(k**2 for k in kappa[i:]) for i in range(len(kappa) + 1)])


def gains(
    kappa: Sequence[float], steps: Sequence[int] = SCHEDULE, spread: float = 0.0
) -> pd.DataFrame:
    """The measured gain of every skip over training, ±spread of it over samples."""
    table = np.tile(kappa, (len(steps), 1))
    return traced("kappa", "skip", table, first_level=1, spread=spread, steps=steps)


def ensemble(
    n: int = 60,
    *,
    kappa: Sequence[float] = KAPPA,
    slope: float = 1.0,
    intercept: float = 0.0,
    noise: float = 0.3,
    seed: int = 0,
    **info: Any,
) -> Evidence:
    """Random networks: ‖h_i‖² = ‖x‖²(slope (Σ_{j>i} κ_j² + 1) + intercept), times noise.

    Each network has a factor of its own (mean 1) and each level a smaller one.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(50, 80, (n, 1))
    law = slope * (tail_sums(kappa) + 1) + intercept
    whole, own = rng.normal(size=(n, 1)), rng.normal(size=(n, len(law)))
    factor = np.exp(noise * whole - noise**2 / 2) * np.exp(noise / 4 * own - noise**2 / 32)
    known = {"kind": "ensemble", "scheme": "cs:0.7", "kappa": list(kappa), "block_gain": 1.0}
    networks = gains(kappa, range(1, n + 1))
    frame = _concat([traced("energy", "x", x), traced("energy", "h", x * law * factor), networks])
    return Evidence("cs:0.7", frame, {**known, **info})


def band(
    samples: int = 96,
    *,
    kappa: Sequence[float] = KAPPA,
    c1: float = 2.0,
    c2: float = 30.0,
    noise: float = 0.1,
    odd: float = 1.0,
    seed: int = 0,
    **info: Any,
) -> Evidence:
    """A trained network: ‖h_i‖² = g_t (c_1‖x‖² Σ_{j>i} κ_j² + c_2) with g_t = 1, 10, 100.

    `odd` multiplies the energies of the odd samples, those that are held out.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(20, 60, (3, 1, samples))
    h = 10.0 ** np.arange(3)[:, None, None] * (c1 * x * tail_sums(kappa)[:, None] + c2)
    h *= np.exp(noise * rng.normal(size=h.shape))
    h[:, :, 1::2] *= odd
    frames = (sampled("sample_energy", "x", x), sampled("sample_energy", "h", h), gains(kappa))
    return training(*frames, kappa=kappa, **info)


def gradients(
    samples: int = 96,
    *,
    kappa: Sequence[float] = KAPPA,
    power: float = 1.0,
    c: float = 3.0,
    noise: float = 0.1,
    sums: Sequence[float] | None = None,
    seed: int = 0,
    **info: Any,
) -> Evidence:
    """‖∇W ℓ_s‖² = c (ℓ_s‖x‖² (Σ_{j≥i} κ_j² + 1))^power; for blocks b ten times that.

    `sums` replaces Σ_{j≥i} κ_j² + 1, i = 1..N.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(20, 60, (3, 1, samples))
    loss = np.exp(rng.normal(size=x.shape))
    factor = np.asarray(tail_sums(kappa)[:-1] + 1 if sums is None else sums)[:, None]
    frames = [sampled("sample_energy", "x", x), sampled("sample_loss", "loss", loss), gains(kappa)]
    for block, constant in (("a", c), ("b", 10 * c)):
        g = constant * (loss * x * factor) ** power
        g = g * np.exp(noise * rng.normal(size=g.shape))
        frames.append(sampled("sample_grad_energy", block, g, first_level=1))
    return training(*frames, kappa=kappa, **info)


def chain(
    *,
    kappa: Sequence[float] = (1.0, 0.5),
    lip_a: Sequence[float] = (2.0, 1.0),
    lip_b: Sequence[float] = (1.0, 1.0),
    l0: float = 3.0,
    exact: Any = 4.0,
    secant: Any = 1.0,
    width: Any = 0.0,
    samples: int = 8,
    **info: Any,
) -> Evidence:
    """A point of Theorem 3.4 by hand: blockwise 1·2 + .5·2 + 3·2 = 9, paper 1·2 + .5·4 + 3·4 = 16.

    `exact`, `secant` and `width`, by which the upper bound of `exact` is above it, may be arrays
    (3, samples). What is known of the blocks is exact. Three sizes of secants are
    recorded, of which the largest exceeds everything.
    """
    shape = (3, 1, samples)

    def levels(values: Sequence[float]) -> np.ndarray:
        return np.broadcast_to(np.reshape(values, (1, -1, 1)), (3, len(values), samples))

    def one(value: Any) -> np.ndarray:
        return np.broadcast_to(value, (3, samples)).reshape(shape)

    frames = [
        sampled("sigma_max", "J", one(exact)),
        sampled("sigma_max_upper", "J", one(np.asarray(exact) + width)),
        sampled("secant", "eps=0.001", one(secant)),
        sampled("secant", "eps=0.01", one(secant)),
        sampled("secant", "eps=0.1", one(1e6)),
        sampled("lipschitz", "a", levels(lip_a), first_level=1),
        sampled("lipschitz", "b", levels(lip_b), first_level=1),
        sampled("lipschitz", "mid", one(l0)),
        sampled("sample_energy", "x", np.full((3, 1, 4 * samples), 40.0)),
        sampled("sample_kappa", "skip", np.tile(levels(kappa), 4), first_level=1),
        gains(kappa),
    ]
    return training(*frames, kappa=kappa, **info)


def with_paths(
    evidence: Evidence,
    *,
    paths: Sequence[float] = (3.0, 1.5),
    middle: float = 1.0,
    around: float = 0.0,
    gap: float = 1e-6,
    samples: int = 8,
) -> Evidence:
    """The evidence with norms of paths; these make a pathwise bound of 5.5."""

    def every(value: Any, levels: int = 1) -> np.ndarray:
        return np.broadcast_to(np.reshape(value, (1, -1, 1)), (3, levels, samples))

    frames = [
        sampled("path", "skip", every(paths, len(paths)), first_level=1),
        sampled("path", "mid", every(middle)),
        sampled("path", "around", every(around)),
        sampled("path_gap", "J", every(gap)),
    ]
    return Evidence(evidence.name, _concat([evidence.frame, *frames]), evidence.info)


FACTORS = (0.0, 0.25, 0.5, 0.71, 1.0)


def checkpoint(
    *,
    kappa: Sequence[float] = (1.0, 0.5),
    noise_levels: Sequence[float] = (50.0, 500.0, 950.0),
    slope: float = 2.0,
    offset: float = 3.0,
    bend: float = 0.0,
    noise: float = 0.02,
    samples: int = 40,
    seed: int = 0,
    **info: Any,
) -> Evidence:
    """A probed checkpoint with ‖x‖² = 10 and ‖h_i‖² = 10 (slope S + bend S² + offset), S = Σ(sκ)².

    With it goes what `chain` and `with_paths` have.
    """
    rng = np.random.default_rng(seed)
    steps = range(1, len(noise_levels) + 1)
    frames = [sampled("sample_energy", "x", np.full((len(steps), 1, samples), 10.0), steps=steps)]
    for s in FACTORS:
        signal = s**2 * tail_sums(kappa)[None, :, None]
        shape = (len(steps), len(kappa) + 1, samples)
        h = 10 * (slope * signal + bend * signal**2 + offset) * np.ones(shape)
        h = h * np.exp(noise * rng.normal(size=h.shape))
        frames.append(sampled("counterfactual_energy", f"s={s:g}", h, steps=steps))
        if s == 1:
            frames.append(sampled("sample_energy", "h", h, steps=steps))
    frames.append(gains(kappa, steps))
    known = {
        "kind": "checkpoint", "scheme": "as found", "kappa": list(kappa), "seed": 0,
        "noise_levels": list(noise_levels), "dtype": "float32", **info,
    }  # fmt: skip
    norms = without(with_paths(chain(kappa=kappa)), "sample_energy", "sample_kappa", "kappa")
    at = norms.frame.assign(step=norms.frame.step.map(dict(zip(SCHEDULE, steps, strict=False))))
    kept = at[at.step.notna()].astype({"step": int})
    gain = np.broadcast_to(np.reshape(kappa, (1, -1, 1)), (len(steps), len(kappa), samples))
    frames += [kept, sampled("sample_kappa", "skip", gain, first_level=1, steps=steps)]
    return Evidence("as found", _concat(frames), known)


def trace(
    kappa: Sequence[float] = KAPPA,
    *,
    amplitude: float | None = None,
    steps: int = 100,
    x: float = 32.0,
    scheme: str = "cs:0.7",
    **info: Any,
) -> Evidence:
    """A training run: ‖h_i‖² swings by `amplitude` after a transient.

    The amplitude is ‖x‖² Σκ², or 1 without skips; the losses fall as 1/step.
    """
    t = np.arange(1, steps + 1)
    swing = (x * tail_sums(kappa)[0] or 1.0) if amplitude is None else amplitude
    h = (1000.0 + swing * (t % 2))[:, None] * np.ones(len(kappa) + 1)
    h[t <= steps / 6] *= 50.0
    frames = (
        traced("energy", "h", h),
        traced("energy", "x", np.full((steps, 1), x)),
        traced("loss", "loss", 1 / t[:, None]),
        gains(kappa, t),
    )
    return training(*frames, scheme=scheme, kappa=kappa, **info)


def noised_inputs(mean: float = 32.0, *, steps: int = 200, seed: int = 0, **info: Any) -> Evidence:
    """A training run whose batches have mean ‖x_t‖² around `mean`, ±5 %."""
    rng = np.random.default_rng(seed)
    x = mean * (1 + 0.05 * rng.normal(size=(steps, 1)))
    return training(traced("energy", "x", x), **{"input": INPUT, "seed": seed, **info})


def complete(scheme: str = "cs:0.7", kappa: Sequence[float] = KAPPA, **info: Any) -> Evidence:
    """A training run with all records, on which every claim about one run holds."""
    slopes = gradients(power=0.9, kappa=kappa)
    norms = chain(kappa=kappa, lip_a=[2.0] * len(kappa), lip_b=[1.0] * len(kappa))
    return joined(
        trace(kappa, scheme=scheme, **{"input": INPUT, **info}),
        without(slopes, "kappa"),  # its x_t are those of `band`
        without(band(kappa=kappa), "kappa", "sample_energy/x"),
        without(norms, "kappa", "sample_energy/x"),
    )


def without(evidence: Evidence, *metrics: str) -> Evidence:
    """The evidence without some metrics, or metrics of a site."""
    frame = evidence.frame
    gone = frame.metric.isin(metrics) | (frame.metric + "/" + frame.site).isin(metrics)
    return Evidence(evidence.name, frame[~gone], evidence.info)


def relabelled(evidence: Evidence, **info: Any) -> Evidence:
    """The same records, said to come from a different run."""
    return Evidence(evidence.name, evidence.frame, {**evidence.info, **info})


def altered(evidence: Evidence, metric: str, site: str, value: float, **where: Any) -> Evidence:
    """The evidence with one quantity overwritten, at all or some levels, steps or stats."""
    frame = evidence.frame.copy()
    here = (frame.metric == metric) & (frame.site == site)
    for column, wanted in where.items():
        here &= frame[column] == wanted
    assert here.any(), "nothing to overwrite"
    frame.loc[here, "value"] = value
    return Evidence(evidence.name, frame, evidence.info)
