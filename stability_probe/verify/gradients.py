"""Theorem 3.3: per-sample gradient energies against ℓ‖x_t‖²Σκ²."""

import numpy as np

from stability_probe.theory import gradient_bound, gradient_scale
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import (
    at_most_status,
    bootstrap_interval,
    share_interval,
    share_status,
)
from stability_probe.verify.verdict import Verdict

REQUIRED = 0.85
"""Share of the held-out half that has to lie below the bound ("with high probability")."""
FEWEST_SAMPLES = 40
"""Below this many samples in the probe batch nothing is tested."""
BLOCKS = ("a", "b")


def gradient_slope_verdict(run: Evidence) -> Verdict:
    """Log–log slope of gradient energy on ℓ‖x‖²Σκ²: at most 1 if the bound has the right order.

    Each kind of block has a constant of its own at every step, so the slope is taken within
    (block kind, step), over levels and samples. The units are samples. A slope above 1 does not
    contradict the inequality on the samples at hand, which `gradient_bound_verdict` tests.
    """
    claim = "order: ‖∇W ℓ_s‖² grows no faster than ℓ_s‖x_t‖²Σκ² (slope ≤ 1)"
    unfit = _unfit(run, claim)
    if unfit is not None:
        return unfit
    if not any(run.kappa):
        return Verdict(
            "3.3", run.name, claim, "ASSUMPTION_UNMET",
            advice="Σκ² = 0 without skips: the theorem leaves the constant c₄ alone",
        )  # fmt: skip
    loss, x, gradients = _measurements(run)
    levels = [i for i in range(1, run.n_skips + 1) if any(run.kappa[i - 1 :])]
    scale = np.stack([gradient_scale(run.kappa, i, loss, x) for i in levels], axis=1)
    kept = {q: g[:, [i - 1 for i in levels]] for q, g in gradients.items()}
    cross, square = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for g in kept.values():
        dx, dy = _within_steps(np.log(scale)), _within_steps(np.log(g))
        cross += (dx * dy).sum(axis=(0, 1))
        square += (dx * dx).sum(axis=(0, 1))
    estimate = float(cross.sum() / square.sum())
    sample_slope, level_slope = _slopes_apart(np.log(scale), [np.log(g) for g in kept.values()])
    interval = bootstrap_interval(lambda s: float(cross[s].sum() / square[s].sum()), len(cross))
    status = at_most_status(interval, 1.0)
    return Verdict(
        "3.3",
        run.name,
        claim,
        status,
        measured=float(np.median(np.stack(list(kept.values())))),
        statistic="log–log slope",
        estimate=estimate,
        interval=interval,
        n=len(cross),
        advice={
            "HOLDS": "the order of the bound is right",
            "VIOLATED": "gradients grow faster than the bound over this range, which therefore "
            "holds through its constant alone",
            "INCONCLUSIVE": "a slope of 1 is inside the interval; enlarge the probe batch",
        }[status]
        + f"; {sample_slope:.2g} over samples within a level, {level_slope:.2g} over levels"
        + _gains(run),
    )  # fmt: skip


def gradient_constants(run: Evidence) -> dict[str, np.ndarray]:
    """c of the bound c ℓ‖x‖²(Σκ² + 1) per kind of block and step.

    It is the smallest that covers the half of the samples with the smaller ℓ‖x‖².
    """
    loss, x, gradients = _measurements(run)
    unit = _bound(run, loss, x, np.ones(len(loss)))
    order = np.argsort(loss * x, axis=1)
    easy = order[:, : order.shape[1] // 2]
    return {
        q: np.take_along_axis(g / unit, easy[:, None, :], axis=2).max(axis=(1, 2))
        for q, g in gradients.items()
    }


def gradient_bound_verdict(run: Evidence) -> Verdict:
    """The share of held-out gradient energies below the bound with calibrated constants.

    The constants come from the half of the samples with the smaller ℓ‖x‖² and are held against
    the other half: the bound has to extrapolate. c_4 = c ℓ‖x‖², the derived law of unit gains.
    """
    claim = "‖∇W ℓ_s‖² ≤ c ℓ_s‖x_t‖²(Σκ² + 1)"
    unfit = _unfit(run, claim)
    if unfit is not None:
        return unfit
    loss, x, gradients = _measurements(run)
    constants = gradient_constants(run)
    order = np.argsort(loss * x, axis=1)
    hard = order[:, order.shape[1] // 2 :]
    measured, bound = [], []
    for q, g in gradients.items():
        measured.append(np.take_along_axis(g, hard[:, None, :], axis=2))
        limit = _bound(run, loss, x, constants[q])
        bound.append(np.take_along_axis(limit, hard[:, None, :], axis=2))
    g, limit = np.stack(measured), np.stack(bound)
    share = float((g <= limit).mean())
    interval = share_interval(share, hard.shape[1])
    status = share_status(interval, REQUIRED)
    typical = int(np.argsort(limit.ravel() / g.ravel())[g.size // 2])
    return Verdict(
        "3.3",
        run.name,
        claim,
        status,
        measured=float(g.ravel()[typical]),
        bound=float(limit.ravel()[typical]),
        statistic=f"share below, ≥ {REQUIRED:.0%} needed",
        estimate=share,
        interval=interval,
        n=hard.shape[1],
        advice={
            "HOLDS": "constants from easy samples cover the hard ones",
            "VIOLATED": "constants from easy samples do not cover the hard ones",
            "INCONCLUSIVE": "too few samples to tell; enlarge the probe batch",
        }[status] + _gains(run),
    )  # fmt: skip


def gradient_bounds(run: Evidence) -> dict[str, np.ndarray]:
    """The calibrated bound per kind of block: (steps, levels, samples)."""
    loss, x, _ = _measurements(run)
    return {q: _bound(run, loss, x, c) for q, c in gradient_constants(run).items()}


def _bound(run: Evidence, loss: np.ndarray, x: np.ndarray, c: np.ndarray) -> np.ndarray:
    """C ℓ‖x‖²(Σκ² + 1): (steps, levels, samples), from a constant a step."""
    c4 = c[:, None] * loss * x
    levels = range(1, run.n_skips + 1)
    per_level = [gradient_bound(run.kappa, i, c[:, None] * loss, x, c4=c4) for i in levels]
    return np.stack(per_level, axis=1)


def _measurements(run: Evidence) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """ℓ_s and ‖x_t‖² (steps, samples), and gradient energies per kind (steps, levels, samples)."""
    loss = run.samples("sample_loss", "loss")
    x = run.samples("sample_energy", "x")
    gradients = {q: run.samples("sample_grad_energy", q) for q in BLOCKS}
    return loss[:, 0], x[:, 0], gradients


def _unfit(run: Evidence, claim: str) -> Verdict | None:
    """A verdict that the records cannot carry the claim, if so."""
    loss = run.samples("sample_loss", "loss")
    n = loss.shape[2] if loss.size else 0
    if n < FEWEST_SAMPLES:
        return Verdict(
            "3.3", run.name, claim, "INCONCLUSIVE", n=n,
            advice=f"per-sample gradients of {n} samples were recorded; {FEWEST_SAMPLES} are "
            "needed, from a probe batch with a target",
        )  # fmt: skip
    values = np.concatenate([run.samples("sample_grad_energy", q).ravel() for q in BLOCKS])
    if not (np.isfinite(values).all() and (values > 0).all() and (loss > 0).all()):
        return Verdict(
            "3.3", run.name, claim, "ASSUMPTION_UNMET", n=n,
            advice="some gradient or loss is zero, infinite or NaN: the network has broken down",
        )  # fmt: skip
    return None


def _within_steps(table: np.ndarray) -> np.ndarray:
    """A table (steps, levels, samples) less the mean of its step."""
    return np.asarray(table - table.mean(axis=(1, 2), keepdims=True))


def _slopes_apart(x: np.ndarray, ys: list[np.ndarray]) -> tuple[float, float]:
    """The slope over samples within (step, level), and over levels' means within a step."""
    dx, mean_x = x - x.mean(axis=2, keepdims=True), x.mean(axis=2)
    mean_x = mean_x - mean_x.mean(axis=1, keepdims=True)
    over_samples = sum(float((dx * y).sum()) for y in ys) / (len(ys) * float((dx * dx).sum()))
    spread = len(ys) * float((mean_x * mean_x).sum())
    covariance = sum(float((mean_x * y.mean(axis=2)).sum()) for y in ys)
    return over_samples, covariance / spread if spread > 0 else float("nan")


def _gains(run: Evidence) -> str:
    return (
        "; κ is the mean measured gain, as it depends on the input" if run.input_dependent else ""
    )
