"""How often verdicts err: simulated records, of which it is known whether the claim is true.

A `Case` is a claim with a state of the world: "true" puts it on the boundary where it is hardest
to tell from a false one, "broken" breaks it by a stated amount, and "clear" (of claims with a "≤"
or "≥") makes it true with room to spare. Records are drawn, put into `Evidence`, and judged by the
real verdict functions.

Noise is log-normal, hence skewed, and shared within a unit between levels and steps, as it is in
records of random and of trained networks: with 200 networks of Eq. 4 (m = 256, N = 5)
‖h_i‖²/‖x‖² had a standard deviation of 0.24 to 0.35 of its mean, a skewness of 1.2 to 2.3, and a
correlation of 0.8 to 0.9 between neighbouring levels; gradients of a U-ViT after 100 to 300 steps
left residuals of 0.6 to 1.2 in the logarithm, and losses correlated 0.6 to 0.9 between steps.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from stability_probe.runs import Run
from stability_probe.verify import Evidence, Verdict, verify
from stability_probe.verify.concentration import SLOWEST, concentration_verdict
from stability_probe.verify.counterfactual import LINEAR, counterfactual_verdict
from stability_probe.verify.decays import fit_decays
from stability_probe.verify.feature_band import REQUIRED, WIDEST, feature_band_verdict
from stability_probe.verify.feature_law import feature_law_verdict
from stability_probe.verify.gradient_law import (
    allowed_ratio,
    gradient_law_table,
    gradient_law_verdict,
)
from stability_probe.verify.gradients import gradient_bound_verdict, gradient_slope_verdict
from stability_probe.verify.input_energy import input_energy_verdict
from stability_probe.verify.oscillation import oscillation_verdict
from tests.oracles.evidence import FACTORS, KAPPA, tail_sums

Rng = np.random.Generator
STEPS = (1, 100, 200, 300)
NOISE_LEVELS = (50.0, 500.0, 950.0)


@dataclass(frozen=True)
class Case:
    """A claim in one state of the world.

    Attributes:
        claim: which claim.
        state: `true`, `broken` or `clear`.
        truth: the state in words.
        n: number of units.
        draw: one verdict (several: of one call of `verify`) on fresh records.
    """

    claim: str
    state: str
    truth: str
    n: int
    draw: Callable[[Rng], Verdict | list[Verdict]]


@dataclass(frozen=True)
class Rates:
    """What came of a case: how many verdicts of each status, and how wide the intervals were."""

    replications: int
    counts: Counter[str]
    width: float

    def rate(self, status: str) -> tuple[float, float, float]:
        """Share of replications with a status, and its 95 % Clopper–Pearson interval."""
        hits = self.counts[status]
        limits = stats.binomtest(hits, self.replications).proportion_ci(0.95, method="exact")
        return hits / self.replications, float(limits.low), float(limits.high)


def simulate(case: Case, replications: int, seed: int = 0) -> Rates:
    """Draw and judge records many times; of several verdicts at once, one VIOLATED is enough."""
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    widths = []
    for _ in range(replications):
        drawn = case.draw(rng)
        verdicts = drawn if isinstance(drawn, list) else [drawn]
        statuses = [v.status for v in verdicts]
        order = ("VIOLATED", "ASSUMPTION_UNMET", "INCONCLUSIVE", "HOLDS")
        counts[min(statuses, key=order.index)] += 1
        widths += [v.interval[1] - v.interval[0] for v in verdicts if v.interval is not None]
    return Rates(replications, counts, float(np.mean(widths)) if widths else float("nan"))


def plausible(hits: int, n: int, rate: float, confidence: float = 0.99) -> bool:
    """Whether so many hits of n are in the central binomial interval of a rate."""
    low, high = stats.binom.interval(confidence, n, rate)
    return bool(low <= hits <= high)


def shared_noise(rng: Rng, shape: tuple[int, int, int]) -> np.ndarray:
    """Standard normal (steps, levels, units); correlation 0.5 in a unit, 0.7 at a step or level."""
    steps, levels, n = shape
    parts = [(0.5, (1, 1, n)), (0.2, (steps, 1, n)), (0.2, (1, levels, n)), (0.1, shape)]
    return np.asarray(sum(np.sqrt(v) * rng.normal(size=size) for v, size in parts))


def lognormal(z: np.ndarray, sd: float) -> np.ndarray:
    """A factor of mean 1 whose logarithm has a standard deviation."""
    return np.asarray(np.exp(sd * z - sd**2 / 2))


@dataclass(frozen=True)
class Rows:
    """Records of one quantity: (steps, levels, samples), or (steps, levels) of means alone."""

    metric: str
    site: str
    table: np.ndarray
    first_level: int = 0


def recorded(*parts: Rows, steps: Sequence[int], kappa: Sequence[float], **info: Any) -> Evidence:
    """Evidence of rows at steps, under constant gains; columns are categories, as in real ones."""
    metrics, sites = sorted({p.metric for p in parts}), sorted({p.site for p in parts})
    most = max((p.table.shape[2] for p in parts if p.table.ndim == 3), default=0)
    columns: list[tuple[np.ndarray, ...]] = []
    for part in parts:
        table = part.table if part.table.ndim == 3 else part.table[:, :, None]
        step, level, sample = (index.ravel() for index in np.indices(table.shape))
        stat = sample + 1 if part.table.ndim == 3 else np.zeros_like(sample)
        metric, site = metrics.index(part.metric), sites.index(part.site)
        names = np.full_like(step, metric), np.full_like(step, site)
        number = np.asarray(steps)[step]
        columns.append((number, *names, level + part.first_level, stat, table.ravel()))
    step, metric, site, level, stat, value = (np.concatenate(c) for c in zip(*columns, strict=True))
    frame = pd.DataFrame(
        {
            "step": step,
            "metric": pd.Categorical.from_codes(metric, metrics),
            "site": pd.Categorical.from_codes(site, sites),
            "level": level,
            "stat": pd.Categorical.from_codes(stat, ["mean", *(f"s{s}" for s in range(most))]),
            "value": value,
        }
    )
    return Evidence("drawn", frame, {"kind": "training", "kappa": list(kappa), "seed": 0, **info})


def gains(kappa: Sequence[float], steps: int) -> Rows:
    """The measured gain of every skip."""
    return Rows("kappa", "skip", np.tile(kappa, (steps, 1)), first_level=1)


class Remembered(Run):
    """A run that was never written."""

    def __init__(self, evidence: Evidence, name: str) -> None:
        super().__init__(Path(name))
        self.evidence = evidence

    @property
    def info(self) -> dict[str, Any]:
        return dict(self.evidence.info)

    def records(self) -> pd.DataFrame:
        return self.evidence.frame


# --- Theorem 3.1: the explicit law ----------------------------------------------------------------


def networks(
    rng: Rng, n: int, *, kappa: tuple[float, ...] = KAPPA, slope: float = 1.0, offset: float = 0.0
) -> Evidence:
    """Random networks of mean energies slope × law + offset; neighbours correlate by 0.83."""
    law = slope * (tail_sums(kappa) + 1) + offset
    z = rng.normal(size=(n, len(law)))
    for i in range(1, len(law)):
        z[:, i] = 0.83 * z[:, i - 1] + np.sqrt(1 - 0.83**2) * z[:, i]
    x = rng.uniform(200, 300, (n, 1))
    rows = (Rows("energy", "x", x), Rows("energy", "h", x * law * lognormal(z, 0.3)))
    known = {"kind": "ensemble", "block_gain": 1.0}
    return recorded(*rows, steps=range(1, n + 1), kappa=kappa, **known)


def _law(n: int, rng: Rng, **truth: float) -> Verdict:
    return feature_law_verdict(networks(rng, n, **truth))


def _law_without_skips(n: int, rng: Rng, slope: float) -> Verdict:
    return feature_law_verdict(networks(rng, n, kappa=(0.0,) * 3, slope=slope))


def _family(schemes: int, n: int, rng: Rng, broken: float = 1.0) -> list[Verdict]:
    """Ensembles under several schemes in one call of `verify`, of which the first may be wrong."""
    slopes = [broken] + [1.0] * (schemes - 1)
    found = [networks(rng, n, slope=slope) for slope in slopes]
    return verify([Remembered(run, f"run-{i}") for i, run in enumerate(found)])


# --- Theorem 3.1: counterfactual, band, oscillation -----------------------------------------------


def scaled_network(
    rng: Rng, n: int, *, explained: float = 1.0, slopes: tuple[float, float] | None = None
) -> Evidence:
    """A checkpoint whose energies under κ·s have a line and, orthogonal to it, a curve.

    Σ line² / (Σ line² + Σ curve²), the R² in the mean, is `explained` at every place. Slopes are
    log-normal, or with `slopes` of that mean and standard deviation and shifted.
    """
    kappa = (1.0, 0.5)
    shape = (len(NOISE_LEVELS), 2, n)
    slope = lognormal(shared_noise(rng, shape), 0.5)
    if slopes is not None:
        mean, sd = slopes
        slope = mean + sd * (slope - 1) / np.sqrt(np.exp(0.25) - 1)
    s2 = np.square(FACTORS)
    line = s2 - s2.mean()
    curve = s2**2 - np.polyval(np.polyfit(s2, s2**2, 1), s2)
    curve *= np.linalg.norm(line) / np.linalg.norm(curve)
    wild = lognormal(shared_noise(rng, shape), 0.4) * np.exp(-(0.4**2) / 2)  # of mean square 1
    bent = slope * wild * np.sqrt((1 - explained) / explained)
    levels = len(NOISE_LEVELS)
    rows = [Rows("sample_energy", "x", np.full((levels, 1, n), 10.0)), gains(kappa, levels)]
    for k, s in enumerate(FACTORS):
        fed = tail_sums(kappa)[:2, None] * (slope * s2[k] + bent * curve[k])
        h = np.concatenate([50 + fed, np.full((levels, 1, n), 50.0)], axis=1)
        rows.append(Rows("counterfactual_energy", f"s={s:g}", 10 * h))
    known = {"kind": "checkpoint", "noise_levels": list(NOISE_LEVELS)}
    return recorded(*rows, steps=range(1, levels + 1), kappa=kappa, **known)


def _counterfactual(n: int, rng: Rng, **truth: object) -> Verdict:
    return counterfactual_verdict(scaled_network(rng, n, **truth))  # type: ignore[arg-type]


def banded(rng: Rng, n: int, covered: float) -> Evidence:
    """A trained network whose energies spread so that the widest band covers a share of them."""
    x = rng.uniform(20, 60, (1, 1, n)) * np.ones((len(STEPS), 1, 1))
    line = 2.0 * x * tail_sums(KAPPA)[:, None] + 30.0
    half = np.log((1 + WIDEST) / (1 - WIDEST))
    sd = half / float(stats.norm.ppf((1 + covered) / 2))
    h = line * np.exp(sd * shared_noise(rng, line.shape))
    rows = (Rows("sample_energy", "x", x), Rows("sample_energy", "h", h))
    return recorded(*rows, gains(KAPPA, len(STEPS)), steps=STEPS, kappa=KAPPA)


def _band(n: int, rng: Rng, covered: float) -> Verdict:
    return feature_band_verdict(banded(rng, 2 * n, covered))


def _oscillation(n: int, rng: Rng, power: float, schemes: int = 5) -> Verdict:
    """Runs of all schemes under every seed; range ∝ (Σκ²)^power × noise × a factor of the seed."""
    runs = []
    for seed in range(n // schemes):
        whole = np.exp(0.5 * rng.normal())
        for k in np.linspace(0.3, 1.0, schemes):
            swing = 100 * k ** (2 * power) * whole * np.exp(0.4 * rng.normal())
            h = 1000 + swing * (np.arange(12) % 2)[:, None] * np.ones(2)
            rows = (Rows("energy", "h", h), Rows("energy", "x", np.full((12, 1), 32.0)))
            runs.append(recorded(*rows, steps=range(1, 13), kappa=(float(k),), seed=seed))
    return oscillation_verdict(runs)


# --- Lemma 3.2 ------------------------------------------------------------------------------------


def inputs(
    rng: Rng, steps: int, *, images: int = 1797, batch: int = 64, factor: float = 1.0
) -> Evidence:
    """Batches of noised images, drawn without replacement in epochs, `factor` times too energetic.

    Images differ in energy (log-normal, 25 %); noise levels and noise are drawn afresh.
    """
    m = 64
    x0 = 0.7 * m * lognormal(rng.normal(size=images), 0.25)
    per_epoch = images // batch
    order = np.concatenate(
        [rng.permutation(images)[: per_epoch * batch] for _ in range(-(-steps // per_epoch))]
    )[: steps * batch]
    alpha2 = rng.beta(0.5, 1.3, order.size)
    noise, along = rng.chisquare(m, order.size), rng.normal(size=order.size)
    energy = alpha2 * x0[order] + (1 - alpha2) * noise
    energy += 2 * np.sqrt(alpha2 * (1 - alpha2) * x0[order]) * along
    mean = factor * energy.reshape(steps, batch).mean(axis=1, keepdims=True)
    known = {"m": m, "second_moment": float(x0.mean()) / m, "mean_alpha_squared": 0.5 / 1.8}
    at = range(1, steps + 1)
    return recorded(Rows("energy", "x", mean), steps=at, kappa=KAPPA, input=known)


def _inputs(steps: int, rng: Rng, **setting: float) -> Verdict:
    return input_energy_verdict([inputs(rng, steps, **setting)])  # type: ignore[arg-type]


# --- Theorem 3.3 ----------------------------------------------------------------------------------


def _gradients(noise: dict[str, np.ndarray], power: float, skips: float) -> Evidence:
    """Records of ‖∇W ℓ_s‖² = c_q (ℓ_s‖x‖²(Σκ² + skips))^power × noise."""
    x, loss = noise["x"], noise["loss"]
    scale = loss * x * (tail_sums(KAPPA)[:-1] + skips)[:, None]
    rows = [
        Rows("sample_energy", "x", x),
        Rows("sample_loss", "loss", loss),
        gains(KAPPA, len(STEPS)),
    ]
    for q, c in (("a", 3.0), ("b", 30.0)):
        g = c * scale**power * noise[q]
        rows.append(Rows("sample_grad_energy", q, g, first_level=1))
    return recorded(*rows, steps=STEPS, kappa=KAPPA)


def _sizes(rng: Rng, n: int) -> dict[str, np.ndarray]:
    """‖x‖² of every sample, and losses that correlate by 0.7 between steps."""
    x = rng.uniform(20, 60, (1, 1, n)) * np.ones((len(STEPS), 1, 1))
    return {"x": x, "loss": np.exp(0.6 * shared_noise(rng, (len(STEPS), 1, n)))}


def steep(rng: Rng, n: int, power: float) -> Evidence:
    """Gradients that grow as a power of ℓ‖x‖²Σκ²; noise is skewed, and grows with ℓ as well."""
    noise = _sizes(rng, n)
    spread = 0.7 * np.sqrt(noise["loss"] / noise["loss"].mean())
    for q in "ab":
        skewed = lognormal(shared_noise(rng, (len(STEPS), len(KAPPA), n)), 0.3) - 1
        noise[q] = np.exp(spread * skewed / 0.3)
    return _gradients(noise, power, skips=0.0)


def _slope(n: int, rng: Rng, power: float) -> Verdict:
    return gradient_slope_verdict(steep(rng, n, power))


def covered(rng: Rng, n: int, share: float, worst: float) -> Evidence:
    """Gradients of which a known share of the larger half obeys the constants of the other half.

    Noise of the easy half is cut off at a quantile, which some sample surely reaches. `worst` is
    the share of block a_1, `share` that of all others.
    """
    noise = _sizes(rng, n)
    order = np.argsort(np.log(noise["loss"] * noise["x"])[:, 0].mean(axis=0))
    easy = order[: n // 2]
    for q in "ab":
        z = shared_noise(rng, (len(STEPS), len(KAPPA), n))
        cut = np.full((1, len(KAPPA), 1), stats.norm.ppf(share))
        if q == "a":
            cut[0, 0] = stats.norm.ppf(worst)
        z = z - cut  # the bound is at 0
        z[..., easy] = np.minimum(z[..., easy], 0.0)
        noise[q] = np.exp(0.8 * z)
    return _gradients(noise, power=1.0, skips=1.0)


def _bound(n: int, rng: Rng, share: float, worst: float) -> Verdict:
    return gradient_bound_verdict(covered(rng, 2 * n, share, worst))


def random_gradients(rng: Rng, n: int, *, at: float, worst: float | None = None) -> Evidence:
    """Random networks whose gradients are so many times the explicit law, `worst` times at a_1.

    `at` 1 is the middle of the allowed band, 0 its lower end, 2 its upper one.
    """
    m, skips = 256, len(KAPPA)
    config = {"m": m, "merge": "add"}
    x, y = rng.uniform(200, 300, (2, n, 1, 1))
    known = {"kind": "ensemble", "block_gain": 1.0, "config": config}
    bare = [Rows("sample_energy", "x", x), Rows("sample_energy", "target", y)]
    ones = [Rows("sample_grad_energy", q, np.ones((n, skips, 1)), first_level=1) for q in "ab"]
    empty = recorded(*bare, *ones, steps=range(1, n + 1), kappa=KAPPA, **known)
    law, _ = gradient_law_table(empty)  # (blocks, networks)
    low, high = np.log(allowed_ratio(empty))
    ratio = np.full((2 * skips, 1), np.exp(low + (high - low) * at / 2))
    ratio[0] *= worst or 1.0
    noise = lognormal(shared_noise(rng, (1, 2 * skips, n))[0], 0.6)
    g = (law * ratio * noise).T[:, :, None]
    rows = [
        Rows("sample_grad_energy", q, half, first_level=1)
        for q, half in zip("ab", np.split(g, 2, axis=1), strict=True)
    ]
    loss = Rows("sample_loss", "loss", np.ones((n, 1, 1)))
    return recorded(*bare, *rows, loss, steps=range(1, n + 1), kappa=KAPPA, **known)


def _gradient_law(n: int, rng: Rng, **truth: float) -> Verdict:
    return gradient_law_verdict(random_gradients(rng, n, **truth))


# --- Theorem 3.1: concentration -------------------------------------------------------------------


def failures(rng: Rng, n: int, gamma: float, depths: Sequence[int]) -> pd.DataFrame:
    """Failures of n networks a cell, whose probability is erfc√(r_ρ m^γ) at every ρ and m."""
    rhos, widths = (0.2, 0.3, 0.4, 0.5), (64, 128, 256, 512)
    at_128 = special.erfcinv(np.array([0.3, 0.1, 0.03, 0.01])) ** 2
    rows = []
    for n_skips in depths:
        for m in widths:
            p = special.erfc(np.sqrt(at_128 * (m / 128) ** gamma))
            between = -np.diff([1.0, *p, 0.0])  # who fails at ρ fails at every smaller ρ
            failed = rng.multinomial(n, between)[::-1].cumsum()[::-1][1:]
            rows += [
                (m, n_skips, rho, m * rho**2, "all", "both", count, n)
                for rho, count in zip(rhos, failed, strict=True)
            ]
    names = ["m", "n_skips", "rho", "m_rho2", "event", "side", "failures", "networks"]
    return pd.DataFrame(rows, columns=names)


def _concentration(n: int, rng: Rng, gamma: float, depths: Sequence[int] = (1,)) -> Verdict:
    table = failures(rng, n, gamma, depths)
    seed = int(rng.integers(2**31))
    decays = fit_decays(table, resamples=99, seed=seed)
    return concentration_verdict(decays, "drawn")


# --- All of them ----------------------------------------------------------------------------------


def _cases() -> list[Case]:
    states: dict[tuple[str, int, Callable[..., object]], dict[str, tuple[str, dict]]] = {
        ("law, 3.1", 200, _law): {
            "true": ("slope 1, intercept 0", {}),
            "broken": ("slope 0.88", {"slope": 0.88}),
        },
        ("law, 3.1, fewest networks", 20, _law): {
            "true": ("slope 1, intercept 0", {}),
            "broken": ("slope 0.65", {"slope": 0.65}),
        },
        ("law, 3.1, no skips", 200, _law_without_skips): {
            "true": ("slope 1", {"slope": 1.0}),
            "broken": ("slope 0.92", {"slope": 0.92}),
        },
        ("law, 3.1, 3 ensembles in one `verify`", 60, partial(_family, 3)): {
            "true": ("slope 1, intercept 0 in all", {}),
            "broken": ("slope 0.78 in one", {"broken": 0.78}),
        },
        ("counterfactual, 3.1: R² ≥ 0.9", 96, _counterfactual): {
            "true": ("R² = 0.9 at all 6 places", {"explained": LINEAR}),
            "broken": ("R² = 0.83", {"explained": 0.83}),
            "clear": ("R² = 0.97", {"explained": 0.97}),
        },
        ("counterfactual, 3.1: slope > 0", 96, _counterfactual): {
            "true": ("mean slope 0 at all 6 places", {"slopes": (0.0, 1.0)}),
            "broken": ("mean slope −0.4 deviations", {"slopes": (-0.4, 1.0)}),
            "clear": ("mean slope 0.4 deviations", {"slopes": (0.4, 1.0)}),
        },
        ("band, 3.1: share ≥ 85 %", 48, _band): {
            "true": ("widest band covers 85 % at all 4 levels", {"covered": REQUIRED}),
            "broken": ("it covers 65 %", {"covered": 0.65}),
            "clear": ("it covers 99 %", {"covered": 0.99}),
        },
        ("oscillation, 3.1, 5 schemes", 5, _oscillation): {
            "true": ("range has nothing to do with Σκ²", {"power": 0.0}),
            "broken": ("range ∝ (Σκ²)^−1.5", {"power": -1.5}),
            "clear": ("range ∝ (Σκ²)^1.5", {"power": 1.5}),
        },
        ("oscillation, 3.1, 5 schemes × 2 seeds", 10, _oscillation): {
            "true": ("range has nothing to do with Σκ²", {"power": 0.0}),
            "broken": ("range ∝ (Σκ²)^−0.7", {"power": -0.7}),
            "clear": ("range ∝ (Σκ²)^0.7", {"power": 0.7}),
        },
        ("input energy, 3.2", 200, _inputs): {
            "true": ("measured / predicted 1", {}),
            "broken": ("1.007", {"factor": 1.007}),
        },
        ("input energy, 3.2, 128 images", 200, partial(_inputs, images=128)): {
            "true": ("measured / predicted 1", {}),
            "broken": ("1.007", {"factor": 1.007}),
        },
        ("slope, 3.3: ≤ 1", 96, _slope): {
            "true": ("slope 1", {"power": 1.0}),
            "broken": ("slope 1.1", {"power": 1.1}),
            "clear": ("slope 0.9", {"power": 0.9}),
        },
        ("bound, 3.3: share ≥ 85 %", 48, _bound): {
            "true": ("85 % below at all 6 blocks", {"share": REQUIRED, "worst": REQUIRED}),
            "broken": ("55 % below at one of 6", {"share": REQUIRED, "worst": 0.55}),
            "clear": ("99 % below at all", {"share": 0.99, "worst": 0.99}),
        },
        ("explicit law, 3.3", 200, _gradient_law): {
            "true": ("at the upper end of the band at all 10 blocks", {"at": 2.0}),
            "broken": ("1.5 times that at one of 10", {"at": 2.0, "worst": 1.5}),
            "clear": ("in the middle of the band", {"at": 1.0}),
        },
        ("explicit law, 3.3, fewest networks", 50, _gradient_law): {
            "true": ("at the lower end of the band at all 10 blocks", {"at": 0.0}),
            "broken": ("0.5 times that at one of 10", {"at": 0.0, "worst": 0.5}),
        },
        ("decay in mρ², 3.1: exponent of m ≥ 0.75", 2000, _concentration): {
            "true": ("exponent 0.75", {"gamma": SLOWEST}),
            "broken": ("exponent 0.6", {"gamma": 0.6}),
            "clear": ("exponent 1", {"gamma": 1.0}),
        },
        ("decay in mρ², 3.1, N = 1 and 2", 2000, partial(_concentration, depths=(1, 2))): {
            "true": ("exponent 0.75 at both", {"gamma": SLOWEST}),
            "broken": ("exponent 0.6 at both", {"gamma": 0.6}),
        },
    }  # fmt: skip
    return [
        Case(claim, state, truth, n, partial(draw, n, **setting))  # type: ignore[arg-type]
        for (claim, n, draw), found in states.items()
        for state, (truth, setting) in found.items()
    ]


CASES = _cases()
