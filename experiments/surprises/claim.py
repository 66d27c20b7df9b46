"""Two things seen in a training that Σκ² does not predict, and what would explain them.

Both were seen with one seed, so it is also asked whether they are so with five.

**κ = 0 oscillates most.** Theorem 3.1 is about initialisation, where κ = 0 has the least energy of
all. If training makes up for it, energies grow far more from the first steps to the last than with
skips, and so do the weights.

**CS oscillates more at h_0 than 1/√2, with a smaller Σκ².** Σκ² counts all skips alike. If the
outermost carries most of what reaches h_0, then what a scheme does to that one decides: scaling the
outermost alone by 1/√2 damps more than scaling all the others and not that one. With weights w_i,
the energies that the skips of the unscaled networks bring to h_0, Σκ_i²w_i then ranks the schemes
better than Σκ_i². They are the norms of the paths through the unscaled network of the same seed,
w_i = ‖P_i‖².
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from experiments.examination import Examination
from experiments.figures import scheme_colours, scheme_legend
from experiments.findings import Question
from experiments.measures import (
    geometric_mean,
    output_range,
    over,
    parameter_energies,
    skip_energy,
)
from experiments.studies import OTHERS, OUTERMOST, UNSCALED, Member, Study, label
from stability_probe.plots.figures import grid, title
from stability_probe.verify.robustness import sensitivity_table

NONE, ROOT, CS = "uniform:0", "inverse-sqrt2", "cs:0.7"
FIRST = 3
"""Steps at the start, where all weights are next to their initial ones."""


def energy_at_start(member: Member) -> float:
    """Mean ‖h_0‖² over the first steps."""
    return float(member.evidence.series("energy", "h")[0].iloc[:FIRST].mean())


def energy_growth(member: Member) -> float:
    """Mean ‖h_0‖² over the last tenth of the steps, over that of the first steps."""
    energy = member.evidence.series("energy", "h")[0]
    return float(energy.iloc[-len(energy) // 10 :].mean()) / energy_at_start(member)


def weight_growth(member: Member) -> float:
    """‖θ‖² at the end over that at the start, of all blocks on the long way: a_i, middle, b_i."""
    blocks = parameter_energies(member)
    through = blocks[[c for c in blocks.columns if not c.startswith("other")]].sum(axis=1)
    return float(through.iloc[-1] / through.iloc[0])


def weighted_sums(study: Study) -> pd.DataFrame:
    """Σκ_i²w_i of every run, by seed and scheme; w_i of the unscaled network of its seed."""
    weights = {
        m.config.seed: np.square(sensitivity_table(m.evidence)[-1]["paths"])
        for m in study.where(scheme=UNSCALED).members
    }
    return study.table(lambda m: float(np.square(m.evidence.kappa) @ weights[m.config.seed]))


def rank_correlations(ranges: pd.DataFrame, sums: pd.DataFrame) -> np.ndarray:
    """Of ranges with sums over schemes with skips, a seed each."""
    chosen = [s for s in ranges if s != NONE]
    found = [
        stats.spearmanr(ranges.loc[seed, chosen], sums.loc[seed, chosen]).statistic
        for seed in ranges.index
    ]
    return np.array(found)


def examine(studies: Sequence[Study]) -> Examination:
    """Both, and their explanations, put as questions that could be answered otherwise."""
    questions, rows = [], []
    for study in studies:
        ranges, starts = study.table(output_range), study.table(energy_at_start)
        growths, weights = study.table(energy_growth), study.table(weight_growth)
        sums, weighed = study.table(skip_energy), weighted_sums(study)
        asked = [
            ("κ = 0: range of ‖h_0‖², over unscaled", over(ranges, NONE, UNSCALED), "above"),
            ("κ = 0: ‖h_0‖² at the first steps, over unscaled", over(starts, NONE, UNSCALED),
             "below"),
            ("κ = 0: growth of ‖h_0‖², over unscaled", over(growths, NONE, UNSCALED), "above"),
            ("κ = 0: growth of ‖θ‖², over unscaled", over(weights, NONE, UNSCALED), "above"),
            ("CS over 1/√2: range of ‖h_0‖²", over(ranges, CS, ROOT), "above"),
            ("1/√2 at the outermost alone, over unscaled: range of ‖h_0‖²",
             over(ranges, OUTERMOST, UNSCALED), "below"),
            ("1/√2 at the outermost alone, over at all others: range of ‖h_0‖²",
             over(ranges, OUTERMOST, OTHERS), "below"),
        ]  # fmt: skip
        questions += [Question(study.grid, text, v, side) for text, v, side in asked]
        gain = list(rank_correlations(ranges, weighed) - rank_correlations(ranges, sums))
        text = "rank correlation of the range of ‖h_0‖² with Σκ²w, less that with Σκ²"
        questions.append(Question(study.grid, text, gain, "above", 0.0, ratio=False))
        rows += [
            {"grid": study.grid, "scheme": label(s), "Σκ²": sums[s].mean(),
             "Σκ²w": weighed[s].mean(), "range of ‖h_0‖²": geometric_mean(ranges[s]),
             "‖h_0‖² at the start": geometric_mean(starts[s]),
             "growth of ‖h_0‖²": geometric_mean(growths[s]),
             "growth of ‖θ‖²": geometric_mean(weights[s])}
            for s in study.schemes
        ]  # fmt: skip
    return Examination(questions, pd.DataFrame(rows), {"surprises": _figure(studies)})


def _figure(studies: Sequence[Study]) -> Figure:
    """Energy of h_0 over training; its range against Σκ², and against Σκ²w."""
    figure, axes = grid(1, 3, sharey=False, size=(3.9, 3.6))
    study = studies[0]
    colours = scheme_colours(studies)
    ranges = study.table(output_range)
    shown = ((axes[0, 1], study.table(skip_energy)), (axes[0, 2], weighted_sums(study)))
    for scheme in study.schemes:
        runs = study.where(scheme=scheme).members
        if scheme in (UNSCALED, ROOT, CS, NONE):
            for member in runs:
                curve = member.evidence.series("energy", "h")[0].rolling(20).mean()
                axes[0, 0].plot(curve.index, curve, color=colours[scheme], lw=0.9)
        for ax, sums in shown:
            ax.scatter(sums[scheme], ranges[scheme], color=colours[scheme], s=26, edgecolor="white",
                       lw=0.4)  # fmt: skip
            ax.set(yscale="log", ylabel="range of ‖h$_0$‖² over training")
    axes[0, 0].set(yscale="log", xlabel="training step", ylabel="‖h$_0$‖² (running mean)")
    axes[0, 0].set_title("a line a run of four schemes")
    axes[0, 1].set(xlabel="Σκ$_i$²", title="all skips alike")
    axes[0, 2].set(xlabel="Σκ$_i$²‖P$_i$‖²", title="by what each carries")
    scheme_legend(figure, colours)
    title(figure, "Does κ = 0 oscillate most, CS more than 1/√2, and which sum orders them?")
    return figure
