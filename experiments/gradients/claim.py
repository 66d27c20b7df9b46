"""The magnitude of gradients falls with Σκ².

Theorem 3.3 bounds ‖∇_W ℓ‖² by an order of ℓ ‖x_t‖² Σκ² at initialisation. So it is asked at the
first steps, where the weights of all schemes are the same, and over training, where they are not.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.examination import Examination, scheme_colours
from experiments.findings import Question
from experiments.measures import geometric_mean, gradient_energy, over, skip_energy, slopes
from experiments.studies import UNSCALED, Study, label
from stability_probe.plots.figures import BOUND, grid, legend, title

FIRST = 3
"""Steps that count as the start: the learning rate is still next to nothing."""
WHEN = {"first steps": partial(gradient_energy, first=FIRST), "training": gradient_energy}


def examine(studies: Sequence[Study]) -> Examination:
    """Slopes of gradient energy against Σκ², at the start and over training."""
    questions, rows = [], []
    for study in studies:
        sums = study.table(skip_energy)
        for when, measure in WHEN.items():
            energies = study.table(measure)
            text = f"{when}: slope of log ‖∇W‖² on log Σκ² over schemes"
            steep = slopes(study, energies, sums)
            questions.append(Question(study.grid, text, steep, "above", 0.0, ratio=False))
            rows += [
                {"grid": study.grid, "when": when, "scheme": label(s), "Σκ²": sums[s].mean(),
                 "‖∇W‖²": geometric_mean(energies[s]),
                 "over unscaled": geometric_mean(pd.Series(over(energies, s, UNSCALED)))}
                for s in study.schemes
            ]  # fmt: skip
    return Examination(questions, pd.DataFrame(rows), {"gradients": _figure(studies)})


def _figure(studies: Sequence[Study]) -> Figure:
    """Gradient energy against Σκ², at the start above and over training below."""
    figure, axes = grid(2, len(studies), size=(3.0, 2.5))
    colours = scheme_colours(studies)
    for c, study in enumerate(studies):
        sums = study.table(skip_energy)
        for r, (when, measure) in enumerate(WHEN.items()):
            ax, energies = axes[r, c], study.table(measure)
            for scheme in study.schemes:
                ax.scatter(sums[scheme], energies[scheme], color=colours[scheme], s=28,
                           edgecolor="white", lw=0.5, label=label(scheme), zorder=3)  # fmt: skip
            ends = np.array([sums[sums > 0].min().min(), sums.max().max()])
            ax.plot(ends, geometric_mean(energies[UNSCALED]) / ends[1] * ends, color=BOUND, lw=1,
                    label="∝ Σκ², order of Theorem 3.3")  # fmt: skip
            ax.set(yscale="log", xlabel="Σκ²")
            ax.set_xscale("symlog", linthresh=1)
            ax.set_xlim(left=-0.1)
            if r == 0:
                ax.set_title(study.grid)
            if c == 0:
                ax.set_ylabel(f"mean ‖∇W‖²\n{when}")
    legend(figure, axes[0, 0])
    title(figure, "Gradient energy against the sum of squared coefficients")
    return figure
