"""Thresholds without a baseline: `sensitivity.exact<20`, `theorem_3_1=HOLDS`.

    requirement = name operator value
    name        = a number of `measures` (loss, energy.h_0), the first words of several (energy),
                  or theorem_3_1, theorem_3_2, theorem_3_3, theorem_3_4
    operator    = "<" | "<=" | ">" | ">=" | "=" | "!="
    value       = a number, or HOLDS, VIOLATED, ASSUMPTION_UNMET or INCONCLUSIVE

It has to be met by every number that the name stands for, in every run.
"""

import difflib
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from stability_probe.errors import StabilityProbeError
from stability_probe.regression.groups import Group, runs_of
from stability_probe.verify import Status

OPERATORS = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
    "=": operator.eq,
}  # fmt: skip
THEOREMS = ("theorem_3_1", "theorem_3_2", "theorem_3_3", "theorem_3_4")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Requirement:
    """A condition on every run."""

    text: str
    name: str
    operator: str
    value: float | str


@dataclass(frozen=True)
class Outcome:
    """A requirement, and whether it is met.

    Attributes:
        requirement: as it was written.
        met: whether every number meets it.
        found: the number or status that decides, with its name, run and group.
    """

    requirement: str
    met: bool
    found: str


def parse_requirement(text: str) -> Requirement:
    """Read a requirement.

    Raises:
        StabilityProbeError: if it is none; it says at which character.

    >>> parse_requirement("sensitivity.exact < 20")
    Requirement(text='sensitivity.exact < 20', name='sensitivity.exact', operator='<', value=20.0)
    """
    place = _after_space(text, 0)
    name = _NAME.match(text, place)
    if name is None:
        raise _error(text, place, "a name such as loss or energy.h_0")
    if name.group().startswith(("theorem", "lemma")) and name.group() not in THEOREMS:
        raise _error(text, place, f"one of {', '.join(THEOREMS)} (the lemma is theorem_3_2)")
    place = _after_space(text, name.end())
    sign = next((o for o in OPERATORS if text.startswith(o, place)), None)
    if sign is None:
        raise _error(text, place, f"one of {' '.join(OPERATORS)}")
    place = _after_space(text, place + len(sign))
    word = text[place:].strip()
    about_theorem = name.group() in THEOREMS
    if about_theorem:
        if sign not in ("=", "!="):
            raise _error(text, text.index(sign), "= or != after the name of a theorem")
        if word not in get_args(Status):
            raise _error(text, place, f"one of {', '.join(get_args(Status))}")
        return Requirement(text, name.group(), sign, word)
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _error(text, place, "a number")
    return Requirement(text, name.group(), sign, value)


def hold(requirement: Requirement, groups: Sequence[Group]) -> Outcome:
    """Whether runs meet a requirement.

    Raises:
        StabilityProbeError: if its name stands for nothing that they have.
    """
    found = [
        (f"{name} of {group.name}, seed {seed}", value)
        for group in groups
        for name, values in _named(requirement.name, group)
        for seed, value in zip(group.seeds, values, strict=True)
    ]
    for group in groups:
        if not _named(requirement.name, group):
            raise _unknown(requirement, group)
    meets = OPERATORS[requirement.operator]
    broken = [(what, value) for what, value in found if not meets(value, requirement.value)]
    if broken or isinstance(requirement.value, str):
        what, value = (broken or found)[0]
        if broken and not isinstance(requirement.value, str):
            what, value = max(broken, key=lambda pair: _distance(pair[1], requirement.value))
        return Outcome(requirement.text, not broken, f"{what}: {_shown(value)}")
    what, value = min(found, key=lambda pair: _distance(pair[1], requirement.value))
    return Outcome(requirement.text, True, f"{what}: {_shown(value)}, the nearest")


def _named(name: str, group: Group) -> list[tuple[str, Sequence[float | str]]]:
    """The numbers, or statuses, that a name stands for."""
    if name in THEOREMS:
        theorem = name.removeprefix("theorem_").replace("_", ".")
        return [(c, s) for c, s in group.verdicts.items() if c.startswith(f"{theorem}: ")]
    return [(n, v) for n, v in group.tested.items() if n == name or n.startswith(f"{name}.")]


def _distance(value: float | str, limit: float | str) -> float:
    distance = abs(float(value) - float(limit))
    return distance if math.isfinite(distance) else math.inf


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _unknown(requirement: Requirement, group: Group) -> StabilityProbeError:
    known = [*group.tested, *THEOREMS]
    near = difflib.get_close_matches(requirement.name, known, n=3) or known[:3]
    paths = "; paths are recorded with `train --paths`" if "path" in requirement.name else ""
    words = ", ".join(dict.fromkeys(name.partition(".")[0] for name in group.tested))
    every = f" (they begin with {words}; a file that `baseline` writes has all)" if words else ""
    return _error(
        requirement.text,
        requirement.text.index(requirement.name),
        f"a name that all of {runs_of(group.name)} have, such as {', '.join(near)}{every}{paths},",
    )


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _error(text: str, place: int, expected: str) -> StabilityProbeError:
    rest = text[place:]
    got = f"got {rest!r}" if rest else "it ends there"
    return StabilityProbeError(
        f"--require {text!r}, character {place + 1}: {expected} is needed, {got}"
    )
