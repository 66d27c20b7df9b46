"""The file of a baseline: small, sorted, and a line a number, so that a diff reads well."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stability_probe.errors import StabilityProbeError
from stability_probe.regression.groups import Group, group_runs, runs_of
from stability_probe.runs import Run
from stability_probe.runs.run import finite, write_text

SCHEMA = 1
"""Version of the layout; raised when a reader of the old one would misread the new."""
DIGITS = 6
"""Significant digits that numbers are kept with."""
AGAIN = "write it again with `stability-probe baseline`, or with `check --update`"


@dataclass(frozen=True)
class Baseline:
    """Groups of runs that later runs are compared with.

    Attributes:
        groups: one a configuration.
        command: what wrote the file.
    """

    groups: list[Group]
    command: str = ""

    def group(self, name: str) -> Group | None:
        """The group of a name, if there is one."""
        return next((group for group in self.groups if group.name == name), None)

    def with_groups(self, groups: Sequence[Group], command: str) -> "Baseline":
        """The same with groups added, or put in the place of those of their names."""
        there = {group.name for group in groups}
        kept = [group for group in self.groups if group.name not in there]
        return Baseline(sorted([*kept, *groups], key=lambda group: group.name), command)

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            StabilityProbeError: if it cannot be written, or a number is not finite.
        """
        for group in self.groups:
            for name, values in group.tested.items():
                if finite(values) != values:
                    raise StabilityProbeError(
                        f"{runs_of(group.name)}: {name} is not finite in one of them; a baseline "
                        "needs runs that did not diverge"
                    )
        content = _content(self)
        write_text(Path(path), _pretty({"digest": _digest(content), **content}))

    @classmethod
    def read(cls, path: str | Path) -> "Baseline":
        """The baseline in a file.

        Raises:
            StabilityProbeError: if it cannot be read, is of another schema, or has been changed
                since it was written.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise StabilityProbeError(
                f"{path}: cannot be read ({error.strerror}); write one with "
                "`stability-probe baseline`"
            ) from error
        except ValueError as error:
            raise StabilityProbeError(
                f"{path}: is no JSON ({error}), perhaps cut off; {AGAIN}"
            ) from error
        if not isinstance(content, dict) or "schema" not in content:
            raise StabilityProbeError(f"{path}: is no baseline (it has no schema); {AGAIN}")
        if content["schema"] != SCHEMA:
            raise StabilityProbeError(
                f"{path}: has schema {content['schema']!r} and this version reads {SCHEMA}; {AGAIN}"
            )
        if content.pop("digest", None) != _digest(content):
            raise StabilityProbeError(
                f"{path}: was changed after it was written (its digest tells); {AGAIN}"
            )
        try:
            return cls([Group(**group) for group in content["groups"]], content["command"])
        except (KeyError, TypeError) as error:
            raise StabilityProbeError(f"{path}: is no baseline ({error}); {AGAIN}") from error


def collect(runs: Sequence[Run], command: str = "") -> Baseline:
    """A baseline of runs.

    Args:
        runs: complete runs; those of one scheme differ by their seed alone.
        command: what to say that it was made with.

    Raises:
        StabilityProbeError: if runs cannot be put into one.
    """
    return Baseline(group_runs(runs, failed=False), command)


def _content(baseline: Baseline) -> dict[str, Any]:
    content = {"schema": SCHEMA, **asdict(baseline)}
    rounded: dict[str, Any] = json.loads(json.dumps(finite(_rounded(content))))
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _digest(content: Mapping[str, Any]) -> str:
    """Tells whether a file has been changed; it protects from mistakes and not from intent."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _pretty(content: Mapping[str, Any]) -> str:
    """Sorted JSON with lists of plain values on one line each."""
    text = json.dumps(finite(content), indent=1, sort_keys=True, ensure_ascii=False)
    flat = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    return flat.sub(lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", text) + "\n"
