"""What a verdict is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import pandas as pd

Status = Literal["HOLDS", "VIOLATED", "ASSUMPTION_UNMET", "INCONCLUSIVE"]
Theorem = Literal["3.1", "3.2", "3.3", "3.4"]


@dataclass(frozen=True)
class Verdict:
    """A claim of a theorem, held against records.

    Attributes:
        theorem: `"3.1"`, `"3.2"` (the lemma), `"3.3"` or `"3.4"` of Huang et al. (2023).
        run: the run the claim was tested on, or what the runs have in common.
        claim: the claim in words.
        status: HOLDS, VIOLATED, ASSUMPTION_UNMET or INCONCLUSIVE.
        measured: the measured quantity, in the units of `bound`; `None` if it could not be had.
        bound: what the theorem says of it; `None` where it gives an order of magnitude alone.
        slack: bound / measured; near 1 is tight, far above 1 is true and worthless.
        statistic: what the status rests on, in words.
        estimate: its value.
        interval: what the data leave possible for it, `None` where there is none.
        n: number of independent units behind the interval (networks, images, steps or runs).
        advice: what to make of it, or what more is needed.
        confidence: of the interval: 1 − α if the claim is an equality, 1 − 2α (α at either end) if
            it is one-sided, where a true claim is VIOLATED with probability α at most.

    Raises:
        ValueError: if the status or theorem is unknown, the interval is upside down, or the
            confidence is outside (0, 1).
    """

    theorem: Theorem
    run: str
    claim: str
    status: Status
    measured: float | None = None
    bound: float | None = None
    statistic: str = ""
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    n: int = 0
    advice: str = ""
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"unknown status {self.status!r}; it is one of {get_args(Status)}")
        if self.theorem not in get_args(Theorem):
            raise ValueError(f"unknown theorem {self.theorem!r}; it is one of {get_args(Theorem)}")
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ValueError(f"interval {self.interval} is upside down")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), got {self.confidence}")

    @classmethod
    def undecided(
        cls, theorem: Theorem, run: str, claim: str, advice: str, *, n: int = 0, unmet: bool = False
    ) -> "Verdict":
        """A verdict without numbers: INCONCLUSIVE, or ASSUMPTION_UNMET if `unmet`."""
        status: Status = "ASSUMPTION_UNMET" if unmet else "INCONCLUSIVE"
        return cls(theorem, run, claim, status, n=n, advice=advice)

    @property
    def slack(self) -> float | None:
        """Bound / measured.

        >>> Verdict("3.4", "cs", "chain", "HOLDS", measured=2.0, bound=8.0).slack
        4.0
        """
        if self.bound is None or not self.measured:
            return None
        return self.bound / self.measured

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {**asdict(self), "slack": self.slack}


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as a small table to look at, in a notebook: a row each, numbers with three digits.

    Returns:
        By theorem: run, claim, status, measured, bound, slack, statistic, estimate, interval and n;
        "–" where there is no number. The advice is left out.

    >>> from stability_probe.verify import Verdict, verdict_table
    >>> verdict_table([Verdict("3.4", "cs", "chain", "HOLDS", measured=2.0, bound=8192.0)]).T
    theorem      3.4
    run           cs
    claim      chain
    status     HOLDS
    measured       2
    bound      8,190
    slack      4,100
    statistic      –
    estimate       –
    interval       –
    n              0
    """
    numbers = ("measured", "bound", "slack")
    columns = ("run", "claim", "status", *numbers, "statistic", "estimate", "interval", "n")
    rows = [
        (
            v.run, v.claim, v.status, *(_digits(getattr(v, name)) for name in numbers),
            v.statistic or "–", _digits(v.estimate), _range(v.interval), v.n,
        )
        for v in verdicts
    ]  # fmt: skip
    index = pd.Index([v.theorem for v in verdicts], name="theorem")
    return pd.DataFrame(rows, index=index, columns=list(columns))


def _range(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else " … ".join(map(_digits, interval))


def _digits(value: float | None) -> str:
    """Three digits of a number, without an exponent up to a million."""
    if value is None:
        return "–"
    short = f"{value:.3g}"
    return f"{float(short):,.0f}" if 1e3 <= abs(float(short)) < 1e6 else short
