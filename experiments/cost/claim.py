"""CS costs nothing measurable, LS almost nothing.

Steps of a scaled and of a plain twin of a network are timed in turn; a unit is a couple of twins,
its value the median ratio of their steps, so that what one twin has over another by chance (where
its tensors lie) is in the interval. "Nothing measurable" is taken as less than 2 % of a step,
"almost nothing" as less than 5 %. Times are of the machine and the moment: of all tables here,
this one alone changes from one making to the next.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.contention import Meter
from benchmarks.paired import Plan, interleave, plain_seconds, ratios
from benchmarks.twins import WORKLOADS, Twin, Workload, batch, limit_threads
from experiments.examination import Examination
from experiments.findings import Question
from experiments.studies import Study, label
from stability_probe.plots.figures import MEASURED, grid, title
from stability_probe.runs import build_model
from stability_probe.runs.recording import seeded_scaling
from stability_probe.skips import find_skips, scale_skips

LIMITS = {"cs:0.7": 1.02, "ls": 1.05, "ls-non-shared": 1.05}
"""Ratios of a step's time that a scheme is said to stay below."""
COUPLES = 10
PLAN = Plan(pairs=4, warmup=2)


def scaled_twin(workload: Workload, scheme: str) -> Twin:
    """A network whose skips are scaled by a scheme, taking steps on the workload's batch."""
    model = build_model(workload.config, workload.shape[1:])
    x, t = batch(workload.shape)
    scale_skips(model, find_skips(model, x[:1], t[:1]), seeded_scaling(scheme, 0))
    return Twin(model, x, t)


def examine(studies: Sequence[Study], plan: Plan = PLAN, couples: int = COUPLES) -> Examination:
    """Time of a step with a scheme over that of a step without."""
    return examination_of(measured(plan, couples))


def measured(plan: Plan, couples: int) -> pd.DataFrame:
    """The ratio of every couple."""
    limit_threads()
    rows = []
    for workload in WORKLOADS:
        for scheme in LIMITS:
            for couple in range(couples):
                plain, scaled = workload.twin(), scaled_twin(workload, scheme)
                pairs = interleave(plain.step, scaled.step, plan, Meter())
                rows.append(
                    {
                        "network": workload.name,
                        "scheme": label(scheme),
                        "couple": couple,
                        "ratio": ratios(pairs).median,
                        "plain step, ms": 1e3 * plain_seconds(pairs),
                        "parameters added": _parameters(scaled) / _parameters(plain) - 1,
                    }
                )
    return pd.DataFrame(rows)


def examination_of(table: pd.DataFrame) -> Examination:
    """What the couples' ratios say."""
    questions = []
    for network in table.network.unique():
        for scheme, limit in LIMITS.items():
            mine = table[(table.network == network) & (table.scheme == label(scheme))]
            text = f"time of a step, {label(scheme)} over unscaled"
            questions.append(Question(network, text, list(mine.ratio), "below", limit))
    return Examination(questions, table, {"cost": _figure(table)})


def _parameters(twin: Twin) -> int:
    return sum(p.numel() for p in twin.model.parameters())


def _figure(table: pd.DataFrame) -> Figure:
    """Ratios, a point a couple."""
    networks = list(table.network.unique())
    figure, axes = grid(1, len(networks), sharey=True, size=(4.4, 3.0))
    for ax, network in zip(axes[0], networks, strict=True):
        mine = table[table.network == network]
        ax.axhline(1, color="grey", lw=1)
        ax.scatter(mine.scheme, mine.ratio, color=MEASURED, s=24)
        ax.set_title(network)
        ax.tick_params(axis="x", labelrotation=20)
    axes[0, 0].set_ylabel("time of a step over an unscaled one")
    title(figure, "What scaling costs, a point a couple of networks")
    return figure
