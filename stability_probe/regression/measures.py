r"""The numbers of one run that a baseline keeps: the larger, the less stable.

| name | of | number |
|---|---|---|
| `loss` | the network | mean loss |
| `gain.skip_i` | each skip | mean κ_i, measured times the κ in the code |
| `energy.h_i` | each level | mean $\lVert h_i\rVert^2$ |
| `oscillation.h_i` | each level | range over training of the batch-mean $\lVert h_i\rVert^2$ |
| `gradient.a_i`, `.b_i`, `.mid`, `.other` | each block | mean $\lVert\nabla_W\rVert^2$ |
| `sensitivity.exact` | the network | mean $\sigma_{\max}(J)$ |
| `sensitivity.pathwise` | the network | mean $\sum\kappa_i\lVert P_i\rVert+\lVert P_{mid}\rVert$ |
| `path.skip_i`, `path.mid` | each path | mean $\kappa_i\lVert P_i\rVert$, $\lVert P_{mid}\rVert$ |

Means of a training run are over its steps after the transient (the first sixth), of a sensitivity
over its last measurement; those of a checkpoint are over its noise levels. What a run has no
records for is left out.

Beside them stand numbers that are not tested, and tell where a change comes from: the loss, the
energy of h_0 or the sensitivity by noise level.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stability_probe.runs import Run
from stability_probe.runs.tracking import BLOCKS
from stability_probe.verify import Evidence
from stability_probe.verify.oscillation import TRANSIENT
from stability_probe.verify.robustness import Norms


@dataclass(frozen=True)
class Measures:
    """Numbers of one run, by name.

    Attributes:
        tested: what is compared between runs; not finite where training was not.
        hints: what tells where a change comes from.
    """

    tested: dict[str, float]
    hints: dict[str, float]


def measures_of(run: Evidence) -> Measures:
    """The numbers of a run.

    >>> frame = pd.DataFrame({
    ...     "step": [1, 2, 3], "metric": "energy", "site": "h", "level": 0, "stat": "mean",
    ...     "value": [9.0, 2.0, 4.0]})
    >>> measures_of(Evidence("run", frame)).tested
    {'energy.h_0': 5.0, 'oscillation.h_0': 7.0}
    """
    settled = _settled(run)
    tested = {**_loss(settled), **_energies(settled), **_gradients(settled)}
    tested |= {**_gains(settled), **_sensitivity(run)}
    return Measures(tested, _by_noise_level(settled))


def run_numbers(run: Run) -> dict[str, float]:
    """Numbers of a training run for a table of many: those of `measures_of`, and two more.

    `final_loss` is `Evidence.final_loss`, `probe_overhead` what the probe took as a share of a bare
    step.
    """
    evidence = Evidence.of(run)
    found = measures_of(evidence).tested
    if evidence.final_loss is not None:
        found["final_loss"] = evidence.final_loss
    if "overhead" in evidence.info.get("probe", {}):
        found["probe_overhead"] = evidence.info["probe"]["overhead"]
    return found


def _settled(run: Evidence) -> Evidence:
    """A training run without its transient; anything else as it is."""
    if run.kind != "training" or run.frame.empty:
        return run
    return Evidence(
        run.name, run.frame[run.frame.step > TRANSIENT * run.frame.step.max()], run.info
    )


def _means(table: pd.DataFrame) -> Iterator[tuple[int, float]]:
    """Means over steps, by level; not finite if one of them is not."""
    for level in table.columns:
        yield int(level), float(np.mean(table[level].to_numpy()))


def _loss(run: Evidence) -> dict[str, float]:
    means = dict(_means(run.series("loss", "loss")))
    return {"loss": means[0]} if means else {}


def _gains(run: Evidence) -> dict[str, float]:
    """Measured at the skip, times what the network's own code multiplies it by."""
    own = dict(enumerate(run.own_kappa, start=1))
    means = _means(run.series("kappa", "skip"))
    return {f"gain.skip_{i}": v * _one_if_none(own.get(i)) for i, v in means}


def _one_if_none(kappa: float | None) -> float:
    return 1.0 if kappa is None else abs(kappa)


def _energies(run: Evidence) -> dict[str, float]:
    table = run.series("energy", "h")
    found = {f"energy.h_{i}": mean for i, mean in _means(table)}
    if run.kind == "training" and len(table) > 1:
        ranges = {f"oscillation.h_{i}": np.ptp(table[i].to_numpy()) for i in table.columns}
        found |= {name: float(value) for name, value in ranges.items()}
    return found


def _gradients(run: Evidence) -> dict[str, float]:
    """Of a training run those of the loss; of a checkpoint those of single samples."""
    found: dict[str, float] = {}
    rows = run.frame[run.frame.metric == "grad_energy"]
    skipped = run.frame[(run.frame.metric == "skipped") & (run.frame.value == 1)].step
    rows = rows[~rows.step.isin(skipped)]  # an overflow of a GradScaler, and no step
    if not rows.empty:
        kinds = rows.site.astype(str).str.partition("/")[0]
        named = rows.assign(
            block=[BLOCKS.get(k, k).format(i) for k, i in zip(kinds, rows.level, strict=True)]
        )
        steps = named.groupby(["step", "block"]).value.sum(min_count=1).unstack("block")
        return {f"gradient.{name}": float(np.mean(steps[name].to_numpy())) for name in steps}
    for block in ("a", "b"):
        table = run.samples("sample_grad_energy", block)
        for level in range(table.shape[1]):
            found[f"gradient.{block}_{level + 1}"] = float(np.mean(table[:, level]))
    return found


def _sensitivity(run: Evidence) -> dict[str, float]:
    """At the last measurement of a training run, or over all noise levels of a checkpoint."""
    if not run.samples("sigma_max", "J").size:
        return {}
    norms, last = Norms.of(run, upper=False), slice(-1 if run.kind == "training" else None, None)
    found = {"sensitivity.exact": norms.exact}
    if norms.paths is not None and norms.pathwise is not None:
        found["sensitivity.pathwise"] = norms.pathwise
        found |= {f"path.skip_{i}": path for i, path in enumerate(norms.paths, start=1)}
        found["path.mid"] = norms.middle
    return {name: float(np.mean(values[last])) for name, values in found.items()}


def _by_noise_level(run: Evidence) -> dict[str, float]:
    """Loss and ‖h_0‖² by bin of a training run; sensitivity by noise level of a checkpoint."""
    if run.kind != "checkpoint":
        stats = run.frame.stat.astype(str)
        bins = sorted(set(stats[stats.str.fullmatch(r"t\d+")]), key=lambda name: int(name[1:]))
        tables = {
            f"{name}.{b}": run.series(metric, site, b)
            for name, metric, site in (("loss", "loss", "loss"), ("energy.h_0", "energy", "h"))
            for b in bins
        }
        return {
            name: float(np.nanmean(table[0].to_numpy()))
            for name, table in tables.items()
            if 0 in table
        }
    exact, levels = run.samples("sigma_max", "J", 0), run.info.get("noise_levels") or []
    return {
        f"sensitivity.exact.t={level:g}": float(np.mean(values))
        for level, values in zip(levels, exact, strict=False)
    }
