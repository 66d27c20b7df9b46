"""Sensitivity to extra noise in the input falls with Σκ_i M_0^i.

Trained networks are given x_t, and x_t with Gaussian noise added, on images and noise levels that
are the same for all. How far the output moves for how far the input was moved is what Theorem 3.4
bounds; how much the loss rises is what a user sees. The bound is taken with the block norms
measured at the probe's samples, in the paper's form. κ = 0 is in no slope: most of those networks
have learned nothing, and do not react to anything.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from experiments.examination import Examination
from experiments.figures import scheme_colours, scheme_legend
from experiments.findings import Question
from experiments.measures import geometric_mean, over, slopes
from experiments.studies import UNSCALED, Member, Study, label
from stability_probe.plots.figures import grid, title
from stability_probe.runs.training import noise_scheduler
from stability_probe.skips.taps import first_tensor
from stability_probe.verify.robustness import sensitivity_table

SCALED, NONE = ("inverse-sqrt2", "cs:0.7", "ls"), "uniform:0"
EXTRA = (0.05, 0.1, 0.2, 0.4)
"""‖δ‖/‖x_t‖ in the mean."""
SHOWN = 0.1
"""The one that questions are about."""
IMAGES = 128


@cache
def responses(member: Member) -> pd.DataFrame:
    """By relative size of the noise: mean ‖Δout‖/‖δ‖ and the loss over that without noise."""
    model, images = member.network(), member.images
    generator = torch.Generator().manual_seed(34)
    x0 = images[torch.randint(len(images), (IMAGES,), generator=generator)]
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(member.config.noise_levels, (IMAGES,), generator=generator)
    x = noise_scheduler(member.config).add_noise(x0, noise, t)
    delta = torch.randn(x.shape, generator=generator)
    rows = []
    with torch.no_grad():
        clean = first_tensor(model(x, t))
        for size in EXTRA:
            moved = size * delta * x.square().mean().sqrt()
            noisy = first_tensor(model(x + moved, t))
            gain = (noisy - clean).flatten(1).norm(dim=1) / moved.flatten(1).norm(dim=1)
            loss = (noisy - noise).square().mean() / (clean - noise).square().mean()
            rows.append((size, float(gain.mean()), float(loss)))
    return pd.DataFrame(rows, columns=["extra", "gain", "loss"]).set_index("extra")


@cache
def bound(member: Member) -> float:
    """Σκ_i M_0^i + M_0^N L_0 at the last measurement, mean over samples."""
    return float(sensitivity_table(member.evidence)[-1]["paper"])


def examine(studies: Sequence[Study]) -> Examination:
    """Responses with a scheme over those without, and their slope against the bound."""
    questions, rows = [], []
    for study in studies:
        gains = study.table(lambda m: float(responses(m).gain[SHOWN]))
        losses = study.table(lambda m: float(responses(m).loss[SHOWN]))
        bounds = study.table(bound)
        for scheme in SCALED:
            text = f"‖Δout‖/‖δ‖, {label(scheme)} over unscaled"
            questions.append(Question(study.grid, text, over(gains, scheme, UNSCALED), "below"))
        text = "slope of log ‖Δout‖/‖δ‖ on log (Σκ_i M_0^i + c_0) over schemes, κ = 0 left out"
        steep = slopes(study, gains.drop(columns=NONE, errors="ignore"),
                       bounds.drop(columns=NONE, errors="ignore"))  # fmt: skip
        questions.append(Question(study.grid, text, steep, "above", 0.0, ratio=False))
        rows += [
            {"grid": study.grid, "scheme": label(s), "‖Δout‖/‖δ‖": geometric_mean(gains[s]),
             "over unscaled": geometric_mean(pd.Series(over(gains, s, UNSCALED))),
             "loss with noise over without": geometric_mean(losses[s]),
             "bound": geometric_mean(bounds[s]),
             "bound / measured": geometric_mean(bounds[s] / gains[s])}
            for s in study.schemes
        ]  # fmt: skip
    figures = {"input_noise": _losses(studies), "bound": _against_bound(studies)}
    return Examination(questions, pd.DataFrame(rows), figures)


def _losses(studies: Sequence[Study]) -> Figure:
    """How much the loss rises with the size of the extra noise, mean over seeds."""
    figure, axes = grid(1, len(studies), sharey=False, size=(3.0, 3.0))
    colours = scheme_colours(studies)
    for ax, study in zip(axes[0], studies, strict=True):
        for scheme in study.schemes:
            mine = [responses(m).loss for m in study.where(scheme=scheme).members]
            curve = np.exp(np.mean(np.log(np.array(mine)), axis=0))
            ax.plot(EXTRA, curve, "o-", ms=3, color=colours[scheme])
        ax.set(xlabel="‖δ‖/‖x$_t$‖", title=study.grid)
    axes[0, 0].set_ylabel("loss over that without δ")
    scheme_legend(figure, colours)
    title(figure, "Extra noise in the input of trained networks")
    return figure


def _against_bound(studies: Sequence[Study]) -> Figure:
    """How far the output moves against the bound, a point a run."""
    figure, axes = grid(1, len(studies), sharey=False, size=(3.0, 3.0))
    colours = scheme_colours(studies)
    for ax, study in zip(axes[0], studies, strict=True):
        bounds, gains = study.table(bound), study.table(lambda m: float(responses(m).gain[SHOWN]))
        for scheme in study.schemes:
            ax.scatter(bounds[scheme], gains[scheme], color=colours[scheme], s=24, lw=0)
        ax.set(xscale="log", xlabel="bound of Theorem 3.4", title=study.grid)
    axes[0, 0].set_ylabel(f"‖Δout‖/‖δ‖ at ‖δ‖ = {SHOWN:g} ‖x$_t$‖")
    scheme_legend(figure, colours)
    title(figure, "Response to extra noise against the bound of Theorem 3.4")
    return figure
