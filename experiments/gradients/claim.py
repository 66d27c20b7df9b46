"""The magnitude of gradients falls with Σκ².

Theorem 3.3 bounds ‖∇_W ℓ‖² by an order of ℓ ‖x_t‖² Σκ² at initialisation. So it is asked at the
first steps, where the weights of all schemes are the same, and over training, where they are not.
"""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from experiments.examination import Examination
from experiments.figures import against_skip_energy
from experiments.findings import Question
from experiments.measures import geometric_mean, gradient_energy, over, skip_energy, slopes
from experiments.studies import UNSCALED, Study, label

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
    figure = against_skip_energy(
        studies,
        {f"mean ‖∇W‖²\n{when}": measure for when, measure in WHEN.items()},
        "∝ Σκ², order of Theorem 3.3",
        "Gradient energy against the sum of squared coefficients",
    )
    return Examination(questions, pd.DataFrame(rows), {"gradients": figure})
