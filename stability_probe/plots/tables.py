"""From evidence to the tidy frames that figures are drawn from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stability_probe.theory import feature_band
from stability_probe.verify import Evidence
from stability_probe.verify.counterfactual import Counterfactual
from stability_probe.verify.feature_band import fit_bands
from stability_probe.verify.feature_law import law_table
from stability_probe.verify.gradient_law import allowed_ratio, gradient_law_table
from stability_probe.verify.gradients import Gradients
from stability_probe.verify.oscillation import TRANSIENT, oscillation_table
from stability_probe.verify.robustness import robustness_chain, sensitivity_table

_LABELS = {
    "unscaled": "unscaled",
    "inverse-sqrt2": "1/√2",
    "uniform:0": "no skips (κ = 0)",
    "cs": "CS",
    "uniform": "uniform",
    "ls": "LS (learned)",
    "ls-non-shared": "LS (one gate a skip)",
}


def scheme_label(run: Evidence) -> str:
    """What a figure calls a run's scaling scheme.

    >>> scheme_label(Evidence("x", pd.DataFrame(columns=["step", "metric", "site", "level",
    ...     "stat", "value"]), {"scheme": "cs:0.7"}))
    'CS (κ = 0.7)'
    """
    scheme = str(run.info.get("scheme", run.name))
    kind, _, number = scheme.partition(":")
    if number and kind in ("cs", "uniform") and scheme not in _LABELS:
        return f"{_LABELS[kind]} (κ = {number})"
    return _LABELS.get(scheme, scheme)


def feature_traces(runs: Sequence[Evidence]) -> pd.DataFrame:
    """‖h_i‖² over training: scheme, level, step, energy, and the fitted band where measured.

    Returns:
        `lower` and `upper` are NaN at the steps between scheduled measurements.
    """
    frames = []
    for run in runs:
        frame = run.series("energy", "h").reset_index().melt("step", value_name="energy")
        edges = _band_edges(run, [int(level) for level in frame.level.unique()])
        frame = frame.merge(edges, on=["step", "level"], how="outer")
        frames.append(frame.assign(scheme=scheme_label(run)))
    return pd.concat(frames, ignore_index=True)


def _band_edges(run: Evidence, levels: Sequence[int]) -> pd.DataFrame:
    """The fitted band at the mean ‖x_t‖², at every measured step: step, level, lower, upper."""
    x = float(run.input_energies.mean())
    bands = fit_bands(run)
    rows = [
        (int(step), level, *map(float, feature_band(
            run.kappa, level, x, rho=band.rho, c1=band.c1, c2=band.c2, c3=band.c2, index="tight"
        )))
        for step, band in zip(run.sampled_steps if bands else [], bands, strict=True)
        for level in levels
    ]  # fmt: skip
    edges = pd.DataFrame(rows, columns=["step", "level", "lower", "upper"])
    return edges.astype({"step": int, "level": int, "lower": float, "upper": float})


def gradient_energies(runs: Sequence[Evidence]) -> pd.DataFrame:
    """Per-sample gradient energies at the last measured step, with their calibrated bounds.

    Returns:
        scheme, block (`a` or `b`), level, sample, measured, bound.
    """
    frames = []
    for run in runs:
        found = Gradients.of(run)
        bounds = found.bounds() if found.energy else {}
        for (q, level), energy in found.energy.items():
            frames.append(
                pd.DataFrame(
                    {
                        "scheme": scheme_label(run),
                        "block": q,
                        "level": level,
                        "sample": np.arange(energy.shape[1]),
                        "measured": energy[-1],
                        "bound": bounds[q, level][-1],
                    }
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def sensitivities(runs: Sequence[Evidence]) -> pd.DataFrame:
    """The chain of Theorem 3.4 at every probed point: scheme, step, sample, quantity, value."""
    names = {
        "paper": "Theorem 3.4: Σκᵢ M₀ⁱ + M₀ᴺ L₀",
        "blockwise": "block by block",
        "exact": "σ$_{max}$(J), exact",
        "secant": "measured: largest ‖Δout‖/ε",
    }
    frames = [pd.DataFrame(columns=["scheme", "step", "sample", "quantity", "value"])]
    for run in runs:
        chain = robustness_chain(run)
        if chain is None:
            continue
        every = {
            "paper": chain.upper.paper, "blockwise": chain.upper.blockwise,
            "exact": chain.exact, "secant": chain.random,
        }  # fmt: skip
        for field, name in names.items():
            row, sample = np.indices(every[field].shape)
            frames.append(
                pd.DataFrame(
                    {
                        "scheme": scheme_label(run),
                        "step": run.sampled_steps[row.ravel()],
                        "sample": sample.ravel(),
                        "quantity": name,
                        "value": every[field].ravel(),
                    }
                )
            )
    return pd.concat(frames[1:] or frames, ignore_index=True)


def coefficients(runs: Sequence[Evidence]) -> pd.DataFrame:
    """κ_i over training: scheme, learned, level, step, mean, min, max over samples."""
    frames = []
    for run in runs:
        rows = run.frame[run.frame.metric == "kappa"]
        frame = rows.pivot(index=["step", "level"], columns="stat", values="value").reset_index()
        frames.append(frame.assign(scheme=scheme_label(run), learned=run.input_dependent))
    return pd.concat(frames, ignore_index=True)


def losses(runs: Sequence[Evidence]) -> pd.DataFrame:
    """The batch-mean loss: scheme, run, step, loss."""
    frames = []
    for run in runs:
        loss = run.series("loss", "loss")
        if 0 in loss:
            frame = loss[0].rename("loss").reset_index()
            frames.append(frame.assign(scheme=scheme_label(run), run=run.name))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def law(runs: Sequence[Evidence]) -> pd.DataFrame:
    """Predicted and measured ‖h_i‖²/‖x_t‖² of random networks.

    Returns:
        scheme, level, predicted, measured (mean over networks) and its standard error.
    """
    frames = []
    for run in runs:
        predicted, measured = law_table(run)
        error = measured.std(axis=0, ddof=1) / np.sqrt(len(measured)) if len(measured) > 1 else 0
        frames.append(
            pd.DataFrame(
                {
                    "scheme": scheme_label(run),
                    "level": np.arange(len(predicted)),
                    "predicted": predicted,
                    "measured": measured.mean(axis=0),
                    "error": error,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def law_spread(runs: Sequence[Evidence]) -> pd.DataFrame:
    """Every random network's ‖h_i‖²/‖x_t‖² beside the law: scheme, level, network, energy, law."""
    frames = []
    for run in runs:
        predicted, measured = law_table(run)
        network, level = np.indices(measured.shape)
        frames.append(
            pd.DataFrame(
                {
                    "scheme": scheme_label(run),
                    "level": level.ravel(),
                    "network": network.ravel(),
                    "energy": measured.ravel(),
                    "law": np.broadcast_to(predicted, measured.shape).ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def gradient_law(runs: Sequence[Evidence]) -> pd.DataFrame:
    """Predicted and measured gradient energies of random networks, means over networks.

    Returns:
        scheme, block (`a` or `b`), level, predicted, measured and its standard error, and
        `allowed`, the factor above the prediction that the law's own error may reach.
    """
    frames = []
    for run in runs:
        predicted, measured = gradient_law_table(run)
        levels = len(predicted) // 2
        error = measured.std(axis=1, ddof=1) / np.sqrt(measured.shape[1])
        frames.append(
            pd.DataFrame(
                {
                    "scheme": scheme_label(run),
                    "block": np.repeat(["a", "b"], levels),
                    "level": np.tile(np.arange(1, levels + 1), 2),
                    "predicted": predicted.mean(axis=1),
                    "measured": measured.mean(axis=1),
                    "error": error,
                    "allowed": allowed_ratio(run)[1],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def tradeoff(runs: Sequence[Evidence]) -> pd.DataFrame:
    """What a training run cost and how restless it was: scheme, run, loss, range.

    The loss is the mean over the last quarter of the steps; the range is that of the batch-mean
    ‖h_0‖² after the transient (`verify.oscillation`), relative to its mean over the same steps.
    Runs that diverged are left out.
    """
    ranges = oscillation_table(runs)
    rows = []
    for unit, run in enumerate(runs):
        mine = ranges[(ranges.unit == unit) & (ranges.level == 0)]
        energy, loss = run.series("energy", "h")[0], run.series("loss", "loss")[0]
        settled = energy[energy.index > TRANSIENT * energy.index.max()]
        mean = float(settled.mean()) or np.nan
        rows.append(
            {
                "scheme": scheme_label(run),
                "run": run.name,
                "loss": float(loss[loss.index > 0.75 * loss.index.max()].mean()),
                "range": float(mine["range"].iloc[0]) / mean,
            }
        )
    table = pd.DataFrame(rows, columns=["scheme", "run", "loss", "range"])
    return table.loc[np.isfinite(table.loss * table["range"])].reset_index(drop=True)


def noise_level_names(run: Evidence) -> list[str]:
    """What a figure calls the noise levels of a checkpoint, one a step."""
    levels = run.info.get("noise_levels")
    return [
        f"t = {levels[step - 1]:g}" if levels else "no noise level" for step in run.sampled_steps
    ]


def by_noise_level(run: Evidence) -> list[Evidence]:
    """The evidence of every noise level of a checkpoint, each with its name for a scheme."""
    return [
        Evidence(run.name, run.frame[run.frame.step == step], {**run.info, "scheme": name})
        for step, name in zip(run.sampled_steps, noise_level_names(run), strict=True)
    ]


def hierarchy(run: Evidence) -> pd.DataFrame:
    """The quantities of Theorem 3.4 of a checkpoint: noise_level, quantity, sample, value."""
    chain = robustness_chain(run)
    if chain is None:
        return pd.DataFrame()
    upper = chain.upper
    values = {
        "paper": upper.paper, "blockwise": upper.blockwise, "pathwise": upper.pathwise,
        "exact": chain.exact, "measured": chain.random,
    }  # fmt: skip
    return _long({name: v for name, v in values.items() if v is not None}, run, "quantity")


def paths(run: Evidence) -> pd.DataFrame:
    """Norm of every path of a checkpoint: noise_level, path, sample, value, exact (σ_max(J)).

    Empty if paths were not measured.
    """
    chain = robustness_chain(run)
    if chain is None or chain.upper.paths is None:
        return pd.DataFrame()
    values = {str(i): level for i, level in enumerate(chain.upper.paths, start=1)}
    values["mid"] = chain.upper.middle
    if chain.upper.around.any():
        values["around"] = chain.upper.around
    table = _long(values, run, "path")
    exact = _long({"exact": chain.exact}, run, "path").rename(columns={"value": "exact"})
    return table.merge(exact.drop(columns="path"), on=["noise_level", "sample"])


def blame(run: Evidence) -> pd.DataFrame:
    """What each skip carries at each noise level of a checkpoint: noise_level, level, share, value.

    The shares, means over samples: of the pathwise bound, of the worst case, and of the energy
    that its merge reads. Level N + 1 is the middle. Empty if paths were not measured.
    """
    names = noise_level_names(run)
    rows = []
    for name, row in zip(names, sensitivity_table(run), strict=False):
        if row["paths"] is None or row["shares"] is None:
            return pd.DataFrame()
        bound = np.array([*row["paths"], row["middle"]]) / row["pathwise"]
        shares = {"bound": bound, "worst case": row["shares"], "energy": row["energy_shares"]}
        rows += [
            {"noise_level": name, "level": i + 1, "share": kind, "value": values[i]}
            for kind, values in shares.items()
            for i in range(min(len(bound), len(values)))
        ]
    return pd.DataFrame(rows)


def counterfactual(run: Evidence) -> pd.DataFrame:
    """Energies under multiples of κ: noise_level, level, signal Σ(sκ)², sample, energy.

    Both relative to the largest s, the energy to its mean over samples. Three of the levels that
    skips feed and the one that a line fits worst; empty if nothing was measured.
    """
    found = Counterfactual.of(run)
    if not len(found.factors):
        return pd.DataFrame()
    fed = [i for i in range(found.signal.shape[1]) if found.signal[:, i].any()]
    if not fed:
        return pd.DataFrame()
    worst = max(fed, key=np.nan_to_num(found.unexplained()).max(axis=0).__getitem__)
    shown = sorted({fed[0], fed[len(fed) // 2], fed[-1], worst})
    signal = found.signal / np.where(found.signal[-1] > 0, found.signal[-1], 1.0)
    energy = found.energy / found.energy[-1].mean(axis=2, keepdims=True)
    frames = [
        _long({signal[k, i]: energy[k, :, i]}, run, "signal").assign(level=i)
        for i in shown
        for k in range(len(found.factors))
    ]
    return pd.concat(frames).rename(columns={"value": "energy"})


def energies(run: Evidence) -> pd.DataFrame:
    """‖h_i‖² of a checkpoint and the fitted band: noise_level, level, sample, energy, lower, upper.

    The band is NaN where it could not be fitted.
    """
    x, h = run.samples("sample_energy", "x"), run.samples("sample_energy", "h")
    bands = fit_bands(run)
    frames = []
    for i in range(h.shape[1]):
        frame = _long({i: h[:, i]}, run, "level").rename(columns={"value": "energy"})
        edges = np.full((2, *h[:, i].shape), np.nan)
        for t, band in enumerate(bands):
            edges[:, t] = feature_band(
                run.kappa, i, x[t, 0], rho=band.rho, c1=band.c1, c2=band.c2, c3=band.c2,
                index="tight",
            )  # fmt: skip
        frames.append(frame.assign(lower=edges[0].ravel(), upper=edges[1].ravel()))
    return pd.concat(frames, ignore_index=True)


def _long(values: Mapping[Any, np.ndarray], run: Evidence, name: str) -> pd.DataFrame:
    """Arrays (noise levels, samples) by name, as rows."""
    names = noise_level_names(run)
    frames = []
    for key, array in values.items():
        row, sample = np.indices(array.shape)
        frames.append(
            pd.DataFrame(
                {
                    "noise_level": [names[r] for r in row.ravel()],
                    name: key,
                    "sample": sample.ravel(),
                    "value": array.ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
