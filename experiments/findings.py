"""What an experiment finds: questions put to runs over seeds, and how they are answered.

A question is about one number that every seed gives, such as how often as large a range is with a
scheme as without, or the slope of one quantity against another. The claim names the side of a
`limit` that the number lies on. All questions of a claim are answered together: each interval has
confidence 1 − 0.05 / questions, so that all of them cover with 95 %.

    REPRODUCED                     the whole interval is on the claimed side of the limit
    NOT REPRODUCED AT THIS SCALE   the whole interval is on the other side of the limit; or, of a
                                   ratio to be told from 1, within 5 % of it: that would not matter
    INCONCLUSIVE                   these seeds cannot tell
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stability_probe.verify.statistics import ALPHA, student_interval

Status = Literal["REPRODUCED", "NOT REPRODUCED AT THIS SCALE", "INCONCLUSIVE"]
NEGLIGIBLE = 0.05
"""An effect on a ratio that is surely smaller is none."""


@dataclass(frozen=True)
class Question:
    """A number over units, and the side of a limit that a claim says it lies on.

    Attributes:
        grid: the runs it is put to.
        text: the question, as the left side of a comparison: "range of ‖h_0‖², 1/√2 over unscaled".
        values: of the units: seeds, unless the text names others.
        side: `below` or `above` the limit.
        limit: compared with the mean of the values.
        ratio: whether the values are positive ratios, whose mean is the geometric one.
    """

    grid: str
    text: str
    values: Sequence[float]
    side: Literal["below", "above"]
    limit: float = 1.0
    ratio: bool = True

    def answer(self, questions: int = 1) -> "Finding":
        """What the values say, as one of so many questions.

        >>> Question("digits", "loss, a over b", [0.5, 0.6, 0.55], "below").answer().status
        'REPRODUCED'
        """
        scaled = np.asarray(self.values, dtype=float)
        if self.ratio:
            with np.errstate(divide="ignore"):  # a ratio of 0 leaves no interval
                scaled = np.log(scaled)
        if len(scaled) < 2 or not np.isfinite(scaled).all():
            return Finding(self, math.nan, (math.nan, math.nan), 0.0, "INCONCLUSIVE")
        confidence = 1 - ALPHA / questions
        interval = student_interval(scaled, confidence)
        estimate = float(scaled.mean())
        if self.ratio:
            estimate, interval = math.exp(estimate), (math.exp(interval[0]), math.exp(interval[1]))
        return Finding(self, estimate, interval, confidence, self._status(interval))

    def _status(self, interval: tuple[float, float]) -> Status:
        low, high = interval if self.side == "below" else (-interval[1], -interval[0])
        limit = self.limit if self.side == "below" else -self.limit
        if high < limit:
            return "REPRODUCED"
        matters = limit - NEGLIGIBLE * (self.ratio and self.limit == 1)
        return "NOT REPRODUCED AT THIS SCALE" if low > matters else "INCONCLUSIVE"


@dataclass(frozen=True)
class Finding:
    """A question with its answer.

    Attributes:
        question: what was asked.
        estimate: the mean.
        interval: at the confidence that follows.
        confidence: two-sided.
        status: whether the claim is reproduced.
    """

    question: Question
    estimate: float
    interval: tuple[float, float]
    confidence: float
    status: Status

    @property
    def claimed(self) -> str:
        """What the claim says of the number."""
        asked = self.question
        return f"{'<' if asked.side == 'below' else '>'} {asked.limit:g}"

    def as_dict(self) -> dict[str, Any]:
        """A row of a table, numbers to three digits, and the values of the units."""
        asked = self.question
        return {
            "grid": asked.grid,
            "question": asked.text,
            "claimed": self.claimed,
            "estimate": rounded(self.estimate),
            "low": self._rounded_end(0),
            "high": self._rounded_end(1),
            "n": len(asked.values),
            "verdict": self.status,
            "values": [rounded(float(value), 4) for value in asked.values],
        }

    def _rounded_end(self, which: int) -> float | None:
        """An end of the interval; with so many digits that it is not the limit where it is not."""
        end = self.interval[which]
        short = rounded(end)
        return rounded(end, 6) if short == self.question.limit else short


def rounded(value: float, digits: int = 3) -> float | None:
    """A number to so many significant digits; `None` if it is not finite.

    >>> rounded(0.123456), rounded(float("nan"))
    (0.123, None)
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def answer_all(questions: Sequence[Question]) -> list[Finding]:
    """Answers at one level for all."""
    return [question.answer(len(questions)) for question in questions]


def overall(findings: Sequence[Finding]) -> str:
    """The verdict on a claim: that of all its findings, or how many of each.

    Where none is reproduced, it is what most of them are.

    >>> a = Question("g", "a", [0.5, 0.51], "below").answer()
    >>> b = Question("g", "b", [2.0, 2.1], "below").answer()
    >>> overall([a, a]), overall([a, b])
    ('REPRODUCED', 'PARTLY REPRODUCED (1 of 2; 1 not, 0 inconclusive)')
    """
    count = {status: sum(f.status == status for f in findings) for status in Status.__args__}  # type: ignore[attr-defined]
    for status, n in count.items():
        if n == len(findings):
            return status
    yes, no, open_ = count.values()
    word = "NOT REPRODUCED AT THIS SCALE" if no > open_ else "INCONCLUSIVE"
    word = "PARTLY REPRODUCED" if yes else word
    return f"{word} ({yes} of {len(findings)}; {no} not, {open_} inconclusive)"
