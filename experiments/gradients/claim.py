"""The magnitude of gradients falls with Σκ².

Theorem 3.3 bounds ‖∇_W ℓ‖² by an order of ℓ ‖x_t‖² Σκ² at initialisation. So it is asked at the
first steps, where the weights of all schemes are the same, also of ‖∇W‖²/ℓ, as schemes differ in ℓ;
and over training, where weights differ as well. κ = 0 has no Σκ² and is in no slope.
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
KINDS = {
    ("first steps", "‖∇W‖²"): partial(gradient_energy, first=FIRST),
    ("first steps", "‖∇W‖²/ℓ"): partial(gradient_energy, first=FIRST, over_loss=True),
    ("training", "‖∇W‖²"): gradient_energy,
}


def examine(studies: Sequence[Study]) -> Examination:
    """Slopes of gradient energy against Σκ², at the start and over training."""
    questions, rows = [], []
    for study in studies:
        sums = study.table(skip_energy)
        for (when, what), measure in KINDS.items():
            energies = study.table(measure)
            text = f"{when}: slope of log {what} on log Σκ² over schemes, κ = 0 left out"
            steep = slopes(study, energies, sums)
            questions.append(Question(study.grid, text, steep, "above", 0.0, ratio=False))
            rows += [
                {"grid": study.grid, "when": when, "what": what, "scheme": label(s),
                 "Σκ²": sums[s].mean(), "mean": geometric_mean(energies[s]),
                 "over unscaled": geometric_mean(pd.Series(over(energies, s, UNSCALED)))}
                for s in study.schemes
            ]  # fmt: skip
    figure = against_skip_energy(
        studies,
        {f"mean {what}\n{when}": measure for (when, what), measure in KINDS.items()},
        "∝ Σκ², order of Theorem 3.3",
        "Gradient energy against the sum of squared coefficients",
    )
    return Examination(questions, pd.DataFrame(rows), {"gradients": figure})
