"""Runs held against a baseline: what got worse, where, and why perhaps."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stability_probe.errors import StabilityProbeError
from stability_probe.regression.baseline import Baseline
from stability_probe.regression.causes import likely_cause
from stability_probe.regression.compare import ALPHA, MARGIN, Comparison, Flip, compare, flips
from stability_probe.regression.groups import Group, differences, runs_of
from stability_probe.regression.requirements import Outcome


@dataclass(frozen=True)
class GroupCheck:
    """Runs of one configuration, then and now.

    Attributes:
        name: of the group.
        seeds: how many runs the baseline has, and how many there are now.
        compared: every number, the worst first.
        flips: verdicts that are not what they were.
        cause: what to look at first, where anything is worse.
        notes: what else differs, and what the comparison rests on.
    """

    name: str
    seeds: tuple[int, int]
    compared: list[Comparison]
    flips: list[Flip]
    cause: str
    notes: list[str]

    @property
    def worse(self) -> list[Comparison]:
        """The numbers that are worse."""
        return [c for c in self.compared if c.change == "worse"]

    @property
    def passed(self) -> bool:
        """Whether nothing is worse."""
        return not self.worse and all(flip.change != "worse" for flip in self.flips)


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        groups: runs that were held against the baseline.
        requirements: thresholds, each with whether it is met.
    """

    groups: list[GroupCheck]
    requirements: list[Outcome] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing is worse and every threshold is met."""
        return all(g.passed for g in self.groups) and all(r.met for r in self.requirements)

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        groups = [{**asdict(g), "passed": g.passed} for g in self.groups]
        return {
            "passed": self.passed,
            "groups": groups,
            "requirements": [asdict(r) for r in self.requirements],
        }


def check(
    now: Sequence[Group],
    baseline: Baseline,
    *,
    margin: float = MARGIN,
    alpha: float = ALPHA,
    anyway: bool = False,
    source: str = "the baseline",
) -> Check:
    """Hold groups of runs against those of a baseline.

    Args:
        now: from `group_runs`.
        baseline: what they are compared with.
        margin: the relative rise that is no regression.
        alpha: probability of a false alarm among all numbers of all groups.
        anyway: compare though the configurations differ.
        source: what to call the baseline in errors.

    Raises:
        StabilityProbeError: if a group has no match in the baseline, or its configuration is
            another, or a setting is out of range.
    """
    refuse_settings(margin, alpha)
    pairs = _pairs(now, baseline, anyway, source)
    share = alpha / max(len(pairs), 1)  # of each group, so that alpha is that of the whole check
    return Check([_check_group(then, group, margin, share) for then, group in pairs])


def refuse_settings(margin: float, alpha: float) -> None:
    """Check the settings of a check.

    Raises:
        StabilityProbeError: if one is out of range.
    """
    if not margin >= 0:
        raise StabilityProbeError(f"--margin is a relative rise of at least 0, got {margin}")
    if not 0 < alpha < 0.5:
        raise StabilityProbeError(f"--alpha is the rate of false alarms, in (0, 0.5); got {alpha}")


def _pairs(
    now: Sequence[Group], baseline: Baseline, anyway: bool, source: str
) -> list[tuple[Group, Group]]:
    """Each group with its match in the baseline."""
    pairs = []
    for group in now:
        then = baseline.group(group.name)
        if then is None and anyway and len(now) == len(baseline.groups) == 1:
            then = baseline.groups[0]
        if then is None:
            there = ", ".join(g.name for g in baseline.groups)
            raise StabilityProbeError(
                f"{source}: is of {there} and has no {runs_of(group.name)}; record runs of the "
                "same scheme, or add them with --update"
            )
        found = differences(then.about, group.about)
        if found and not anyway:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise StabilityProbeError(
                f"{source}: is of another configuration than {runs_of(group.name)}: {found[0]}, "
                f"there and here{more}; record runs like those, compare all the same with "
                "--anyway, or replace the baseline with --update"
            )
        pairs.append((then, group))
    return pairs


def _check_group(then: Group, now: Group, margin: float, alpha: float) -> GroupCheck:
    compared = compare(then.tested, now.tested, margin=margin, alpha=alpha)
    if not compared:
        raise StabilityProbeError(
            f"{runs_of(now.name)}: have no number in common with the baseline"
        )
    changed = flips(then.verdicts, now.verdicts)
    cause = likely_cause(then, now, compared)
    return GroupCheck(
        name=now.name,
        seeds=(len(then.seeds), len(now.seeds)),
        compared=compared,
        flips=changed,
        cause=cause,
        notes=_notes(then, now, compared, changed),
    )


def _notes(
    then: Group, now: Group, compared: Sequence[Comparison], changed: Sequence[Flip]
) -> list[str]:
    """What the reader has to know about a comparison."""
    changes = [*differences(then.about, now.about), *differences(then.context, now.context)]
    notes = [f"not as in the baseline: {change}, there and here" for change in changes]
    n, m = len(then.seeds), len(now.seeds)
    if n == m == 1:
        notes.append(
            "one seed there and one here: nothing is known of the spread over seeds, so a usual "
            "one is assumed; with five each, it is a test"
        )
    elif min(n, m) == 1:
        one, other = ("there is one seed here", "baseline's")
        if n == 1:
            one, other = ("the baseline has one seed", "new runs'")
        notes.append(
            f"{one}: it is held against a tolerance band from the {other} spread, which only a "
            "large change leaves; with five each, it is a test"
        )
    if {*then.seeds} & {*now.seeds}:
        notes.append(
            "seeds of the baseline are among these: where runs are alike seed by seed, alarms are "
            "rarer than at other seeds"
        )
    signed = [c.name for c in compared if min(*c.baseline, *c.now) < 0]
    if signed:
        notes.append(f"cannot be compared, as some are negative: {', '.join(signed)}")
    gone = [name for name in then.tested if name not in now.tested]
    new = [name for name in now.tested if name not in then.tested]
    for what, names in (("no longer recorded", gone), ("not in the baseline", new)):
        if names:
            notes.append(f"not compared, as {what}: {', '.join(names)}")
    for flip in changed:
        if flip.change == "same":
            notes.append(f"{flip.claim}: was {flip.baseline[0]}, is {flip.now[0]}; with so few "
                         "runs that may be chance")  # fmt: skip
    return notes
