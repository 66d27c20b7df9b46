"""Features and parameters of unscaled networks oscillate during training; scaling damps it.

The oscillation of a feature is the range of its batch-mean energy over training: at the output
side, h_0, and as the geometric mean over all levels; that of a block's parameters is the range of
‖θ‖². Schemes are compared within a seed, so with the same weights at the start and the same
batches.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.examination import Examination
from experiments.figures import against_skip_energy
from experiments.findings import Question
from experiments.measures import (
    feature_range,
    geometric_mean,
    output_range,
    over,
    parameter_range,
    skip_energy,
    slopes,
)
from experiments.studies import UNSCALED, Study, label

SCALED = ("inverse-sqrt2", "cs:0.7", "ls")
"""Of what the paper compares with unscaled training."""
KINDS = {
    "‖h_0‖²": output_range,
    "‖h_i‖², all levels": feature_range,
    "‖θ‖² of blocks": parameter_range,
}


def examine(studies: Sequence[Study]) -> Examination:
    """Ranges with a scheme over those without, and their slope against Σκ²."""
    questions, rows = [], []
    for study in studies:
        sums = study.table(skip_energy)
        for kind, measure in KINDS.items():
            ranges = study.table(measure)
            ratios = [geometric_mean(ranges.loc[s, list(SCALED)]) for s in ranges.index]
            questions.append(
                Question(
                    study.grid,
                    f"range of {kind}: mean of 1/√2, CS and LS over unscaled",
                    list(np.array(ratios) / ranges[UNSCALED].to_numpy()),
                    "below",
                )
            )
            rows += [
                {"grid": study.grid, "kind": kind, "scheme": label(s), "Σκ²": sums[s].mean(),
                 "range": geometric_mean(ranges[s]),
                 "over unscaled": geometric_mean(pd.Series(over(ranges, s, UNSCALED)))}
                for s in study.schemes
            ]  # fmt: skip
        question = "slope of log range of ‖h_0‖² on log Σκ² over schemes, κ = 0 left out"
        steep = slopes(study, study.table(KINDS["‖h_0‖²"]), sums)
        questions.append(Question(study.grid, question, steep, "above", 0.0, ratio=False))
    figure = against_skip_energy(
        studies,
        {f"range of\n{kind}": measure for kind, measure in KINDS.items()},
        "∝ Σκ², order of Theorem 3.1",
        "Oscillation during training against the sum of squared coefficients",
    )
    return Examination(questions, pd.DataFrame(rows), {"oscillation": figure})
