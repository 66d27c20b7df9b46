"""Interleaved pairs of steps, one plain and one watched, and what follows from them.

A pair is `block` steps of each side, step by step in alternating order, and their sums: a block as
long as a schedule's period holds the mean cost of the schedule. Pairs in which other processes
took CPU are dropped (`contention`); where hardly any is left, all count, and the numbers are
`disturbed`.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.contention import Meter, Taken

Step = Callable[[], float]
"""Takes one optimizer step and returns the seconds it took."""
RESAMPLES, ENOUGH = 2000, 3
"""Samples of the bootstrap, and kept pairs that numbers may rest on."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        pairs: number of pairs.
        block: steps of each side in a pair.
        warmup: steps of each side before the first pair.
    """

    pairs: int
    block: int = 1
    warmup: int = 10


@dataclass(frozen=True)
class Pair:
    """Seconds of `steps` plain steps and of as many watched ones.

    `taken` is what other processes took of the machine meanwhile.
    """

    plain: float
    watched: float
    steps: int = 1
    taken: Taken | None = None

    @property
    def kept(self) -> bool:
        """Whether it counts: nothing is known of other processes, or they took little."""
        return self.taken is None or self.taken.quiet

    @property
    def ratio(self) -> float:
        """Watched over plain.

        >>> Pair(2.0, 3.0).ratio
        1.5
        """
        return self.watched / self.plain

    @property
    def added(self) -> float:
        """Seconds that watching added to a step.

        >>> Pair(2.0, 3.0, steps=10).added
        0.1
        """
        return (self.watched - self.plain) / self.steps


@dataclass(frozen=True)
class Summary:
    """Numbers of the pairs that count.

    Attributes:
        least, median, largest: of the pairs.
        error: standard error of the median, by bootstrap.
        mean: of all steps, rare expensive ones included.
        kept, dropped: undisturbed pairs, and the others.
    """

    least: float
    median: float
    largest: float
    error: float
    mean: float
    kept: int
    dropped: int

    @property
    def disturbed(self) -> bool:
        """Whether too few pairs were kept, so that all count."""
        return self.kept < min(ENOUGH, self.kept + self.dropped)


def interleave(plain: Step, watched: Step, plan: Plan, meter: Meter) -> list[Pair]:
    """Measure; the order alternates from step to step, and from pair to pair at every step."""
    for _ in range(plan.warmup):
        plain()
        watched()
    gc.collect()
    sides, pairs = (plain, watched), []
    for pair in range(plan.pairs):
        before, seconds = meter.read(), [0.0, 0.0]
        for step in range(plan.block):
            for side in ((0, 1), (1, 0))[(pair + step) % 2]:
                seconds[side] += sides[side]()
        pairs.append(Pair(seconds[0], seconds[1], plan.block, meter.taken(before)))
    return pairs


def ratios(pairs: Sequence[Pair]) -> Summary:
    """Watched over plain; the mean is that of the sums.

    >>> ratios([Pair(1.0, 2.0), Pair(3.0, 3.0)]).mean
    1.25
    """
    used = counted(pairs)
    mean = sum(pair.watched for pair in used) / sum(pair.plain for pair in used)
    return _summary(pairs, [pair.ratio for pair in used], mean)


def additions(pairs: Sequence[Pair]) -> Summary:
    """Seconds that watching added to a step.

    >>> additions([Pair(1.0, 2.0), Pair(3.0, 3.0)]).median
    0.5
    """
    used = counted(pairs)
    steps = sum(pair.steps for pair in used)
    mean = sum(pair.watched - pair.plain for pair in used) / steps
    return _summary(pairs, [pair.added for pair in used], mean)


def plain_seconds(pairs: Sequence[Pair]) -> float:
    """Median seconds of a plain step.

    >>> plain_seconds([Pair(2.0, 9.0, steps=2), Pair(3.0, 9.0), Pair(4.0, 9.0)])
    3.0
    """
    return float(np.median([pair.plain / pair.steps for pair in counted(pairs)]))


def counted(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that numbers are made of: those kept, or all if they are too few."""
    kept = [pair for pair in pairs if pair.kept]
    return kept if len(kept) >= min(ENOUGH, len(pairs)) else list(pairs)


def _summary(pairs: Sequence[Pair], values: Sequence[float], mean: float) -> Summary:
    kept = sum(pair.kept for pair in pairs)
    return Summary(
        least=min(values),
        median=float(np.median(values)),
        largest=max(values),
        error=error_of_median(values),
        mean=mean,
        kept=kept,
        dropped=len(pairs) - kept,
    )


def error_of_median(values: Sequence[float]) -> float:
    """Standard deviation of the medians of samples drawn again, with replacement, from `values`.

    Of one value nothing is known.

    >>> error_of_median([1.0, 1.0, 1.0]), error_of_median([1.0])
    (0.0, nan)
    """
    if len(values) < 2:
        return float("nan")
    generator = np.random.default_rng(0)
    drawn = generator.choice(np.asarray(values), (RESAMPLES, len(values)))
    return float(np.median(drawn, axis=1).std())
