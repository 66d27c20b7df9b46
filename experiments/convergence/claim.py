"""Training to a given loss takes about 1.5 times fewer steps.

The given loss is what the unscaled run of the same seed has at the end; who has the same seed sees
the same batches, noise and noise levels, so that their losses rise and fall together. Curves are
smoothed over a tenth of the steps, and the first step counts at which a smoothed curve is as low. A
run that never gets there is counted with all its steps, the least that it can take. "About 1.5
times" is taken as at least 1.25 times, so at most 0.8 of the steps.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.examination import Examination
from experiments.figures import scheme_colours, scheme_legend
from experiments.findings import Question
from experiments.measures import geometric_mean
from experiments.studies import UNSCALED, Member, Study, label
from stability_probe.plots.figures import grid, title

SCALED = ("inverse-sqrt2", "cs:0.7", "ls")
ABOUT = 0.8
"""Steps over those of the unscaled run; claimed are 1/1.5."""


def smoothed(member: Member) -> pd.Series:
    """The loss, a mean over the last tenth of the training's steps."""
    loss = member.evidence.series("loss", "loss")[0]
    return loss.rolling(max(1, member.config.steps // 10), min_periods=1).mean()


def steps_to(curve: pd.Series, loss: float) -> int:
    """The first step at which a curve is as low as a loss, or the last one if it never is.

    >>> steps_to(pd.Series([3.0, 2.0, 1.0], index=[1, 2, 3]), 2.5)
    2
    """
    reached = curve.index[curve <= loss]
    return int(reached[0]) if len(reached) else int(curve.index[-1])


def table(study: Study) -> pd.DataFrame:
    """Steps to the unscaled run's final loss over those of that run, by seed and scheme."""
    goals = {m.config.seed: m for m in study.where(scheme=UNSCALED).members}

    def ratio(member: Member) -> float:
        goal = goals[member.config.seed]
        if member.diverged or goal.diverged:
            return float("nan")
        curve = smoothed(goal)
        loss = float(curve.iloc[-1])
        return steps_to(smoothed(member), loss) / steps_to(curve, loss)

    return study.table(ratio)


def got_there(study: Study, scheme: str) -> int:
    """How many runs reach the loss that the unscaled run of their seed has at the end."""
    goals = {m.config.seed: smoothed(m).iloc[-1] for m in study.where(scheme=UNSCALED).members}
    runs = study.where(scheme=scheme).members
    return sum(bool((smoothed(m) <= goals[m.config.seed]).any()) for m in runs)


def examine(studies: Sequence[Study]) -> Examination:
    """Steps with a scheme over steps without."""
    questions, rows = [], []
    for study in studies:
        ratios = table(study)
        for scheme in SCALED:
            text = f"steps to the unscaled run's final loss, {label(scheme)} over unscaled"
            questions.append(Question(study.grid, text, list(ratios[scheme]), "below", ABOUT))
        rows += [
            {"grid": study.grid, "scheme": label(s),
             "steps over unscaled": geometric_mean(ratios[s]),
             "got there": got_there(study, s), "of": len(ratios)}
            for s in study.schemes
        ]  # fmt: skip
    return Examination(questions, pd.DataFrame(rows), {"convergence": _figure(studies)})


def _figure(studies: Sequence[Study]) -> Figure:
    """Loss over that of the unscaled run of the same seed, step by step, mean over seeds."""
    figure, axes = grid(1, len(studies), sharey=False, size=(3.8, 3.4))
    colours = scheme_colours(studies)
    for ax, study in zip(axes[0], studies, strict=True):
        base = {m.config.seed: smoothed(m) for m in study.where(scheme=UNSCALED).members}
        for scheme in (UNSCALED, *SCALED):
            ratios = pd.concat(
                [np.log(smoothed(m) / base[m.config.seed])
                 for m in study.where(scheme=scheme).members], axis=1
            )  # fmt: skip
            mean, error = np.exp(ratios.mean(axis=1)), ratios.std(axis=1) / len(base) ** 0.5
            ax.plot(mean.index, mean, color=colours[scheme])
            ax.fill_between(mean.index, mean * np.exp(-error), mean * np.exp(error),
                            color=colours[scheme], alpha=0.2, lw=0)  # fmt: skip
        ax.set(xlabel="training step", title=study.grid)
    axes[0, 0].set_ylabel("loss over that of the unscaled run")
    scheme_legend(figure, {scheme: colours[scheme] for scheme in (UNSCALED, *SCALED)})
    title(figure, "Training loss against the unscaled run's of the same seed (± standard error)")
    return figure
