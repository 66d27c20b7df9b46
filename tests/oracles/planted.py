"""Runs of a grid whose records are made up, so that what a claim must find is known."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from experiments.studies import Member, Study
from stability_probe.regression.measures import measures_of
from stability_probe.runs import Run, TrainConfig
from stability_probe.skips import parse_scaling
from stability_probe.verify import Evidence

STEPS, N = 60, 3
SCHEMES = ("unscaled", "inverse-sqrt2", "uniform:0", "cs:0.7", "ls")
LEARNED = [0.95, 0.9, 0.85]

Effect = Callable[[str], float]
"""What a quantity of a scheme is multiplied by."""


def kappa_of(scheme: str) -> list[float]:
    """κ_1..κ_N; made up for learned ones."""
    return parse_scaling(scheme).coefficients(N) or LEARNED


def one(scheme: str) -> float:
    return 1.0


def planted(
    features: Effect = one,
    parameters: Effect = one,
    gradients: Effect = one,
    loss: Effect = one,
    faster: Effect = one,
    seeds: int = 5,
    schemes: tuple[str, ...] = SCHEMES,
    failed: Callable[[TrainConfig], bool] = lambda config: False,
    **settings: object,
) -> Study:
    """Five seeds of every scheme, with noise of 3 % between seeds.

    Args:
        features: multiplies the range of ‖h_i‖².
        parameters: multiplies the range of ‖θ‖².
        gradients: multiplies ‖∇W‖².
        loss: multiplies the loss at the end.
        faster: the loss falls so many times as fast.
        seeds: of every scheme.
        schemes: their names.
        failed: which runs diverge.
        settings: of all runs.
    """
    members = []
    for scheme in schemes:
        for seed in range(seeds):
            config = TrainConfig(scheme=scheme, seed=seed, steps=STEPS, n_skips=N, **settings)
            rng = np.random.default_rng([seed, schemes.index(scheme)])
            noise = np.exp(0.03 * rng.standard_normal(4))
            frame = _frame(
                scheme,
                np.array([f(scheme) for f in (features, parameters, gradients, loss)]) * noise,
                faster(scheme),
            )
            kappa = parse_scaling(scheme).coefficients(N)
            info = {"kappa": kappa, "state": "failed" if failed(config) else "complete"}
            evidence = Evidence(scheme, frame, {**info, "kind": "training", "scheme": scheme})
            members.append(_member(config, evidence))
    return Study("planted", members)


def _member(config: TrainConfig, evidence: Evidence) -> Member:
    loss = evidence.series("loss", "loss")[0]
    numbers = {
        **measures_of(evidence).tested,
        "final_loss": float(loss.iloc[-STEPS // 10 :].mean()),
    }
    folder = Run(f"planted/{config.scheme}-{config.seed}")
    member = Member(config, folder, evidence.failed, {} if evidence.failed else numbers)
    member.__dict__["evidence"] = evidence  # a cached property
    return member


def _frame(scheme: str, factors: np.ndarray, faster: float) -> pd.DataFrame:
    steps = np.arange(1, STEPS + 1)
    wave = 2 + np.sin(steps)
    falling = np.exp(-steps * faster / STEPS)
    series = {
        ("energy", "x", 0, "mean"): np.full(STEPS, 10.0),
        ("loss", "loss", 0, "mean"): factors[3] * falling,
    }
    for level in range(N + 1):
        series["energy", "h", level, "mean"] = 5 + factors[0] * wave
    for level, kappa in enumerate(kappa_of(scheme), start=1):
        series["kappa", "skip", level, "mean"] = np.full(STEPS, kappa)
    for block in ("a", "b"):
        for level in range(1, N + 1):
            series["param_energy", f"{block}/weight", level, "value"] = 9 + factors[1] * wave
            series["grad_energy", f"{block}/weight", level, "value"] = factors[2] * wave
    frames = [
        pd.DataFrame(
            {"step": steps, "metric": metric, "site": site, "level": level, "stat": stat,
             "value": values}
        )
        for (metric, site, level, stat), values in series.items()
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)
