"""`stability-probe baseline` and `check`: files and options in, a table and an exit code out."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.text import Text

from stability_probe.cli.console import note, number, out, plain_table
from stability_probe.errors import StabilityProbeError
from stability_probe.regression import Baseline, Check, Group, check, collect, parse_requirement
from stability_probe.regression.check import GroupCheck, refuse_settings
from stability_probe.regression.groups import group_runs
from stability_probe.regression.reports import junit, markdown, p_value, sensitivity
from stability_probe.regression.requirements import hold
from stability_probe.runs import open_runs
from stability_probe.runs.own_files import refuse_run_file
from stability_probe.runs.run import write_text

SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable by which GitHub names the file of a job's summary."""
ENOUGH_SEEDS = 5
"""Seeds with which the usual regressions are seen."""
_COLOURS = {"worse": "red", "better": "green", "same": ""}


@dataclass(frozen=True)
class CheckOptions:
    """What a user said of a check.

    Attributes:
        runs: run folders, or folders with runs in them.
        baseline: the baseline's file.
        require: thresholds.
        margin: the relative rise that is no regression.
        alpha: rate of false alarms.
        anyway: compare though the configurations differ.
        update: rewrite the baseline.
        junit: file for JUnit's XML.
        markdown: file for Markdown.
    """

    runs: list[Path]
    baseline: Path | None
    require: list[str] = field(default_factory=list)
    margin: float = 0.1
    alpha: float = 0.05
    anyway: bool = False
    update: bool = False
    junit: Path | None = None
    markdown: Path | None = None


def run_baseline(runs: Sequence[Path], file: Path) -> Baseline:
    """Write the baseline of runs.

    Raises:
        StabilityProbeError: if they cannot be put into one, or the file cannot be written.
    """
    refuse_run_file(file, "a baseline")
    baseline = collect(open_runs(runs), _command("baseline", runs, file))
    baseline.write(file)
    return baseline


def run_check(options: CheckOptions) -> Check:
    """Compare, and write what is asked for.

    Raises:
        StabilityProbeError: if anything cannot be used.
    """
    if options.baseline is None and not options.require:
        raise StabilityProbeError(
            "check: there is nothing to check against; give --baseline FILE, or --require with a "
            "threshold"
        )
    if options.update and options.baseline is None:
        raise StabilityProbeError("check: --update rewrites a baseline; say which with --baseline")
    refuse_settings(options.margin, options.alpha)
    for report in filter(None, (options.junit, options.markdown)):
        refuse_run_file(report, "the check")
    requirements = [parse_requirement(text) for text in options.require]
    file, then = options.baseline, Baseline([])
    if file is not None and (file.exists() or not options.update):
        then = Baseline.read(file)
    groups = group_runs(open_runs(options.runs))
    compared = [] if file is None else groups
    if options.update:
        compared = [group for group in groups if _comparable(then.group(group.name), group)]
    found = check(
        compared, then, margin=options.margin, alpha=options.alpha,
        anyway=options.anyway or options.update, source=str(file),
    )  # fmt: skip
    found = replace(found, requirements=[hold(r, groups) for r in requirements])
    _write_reports(found, options)
    if options.update and file is not None and all(r.met for r in found.requirements):
        refuse_run_file(file, "a baseline")
        for group in groups:
            before = then.group(group.name)
            if before is not None and len(before.seeds) > len(group.seeds):
                counts = f"{len(group.seeds)} in the place of {len(before.seeds)}"
                note(f"{group.name}: the baseline now has fewer seeds, {counts}")
        then.with_groups(groups, _command("check", options.runs, file)).write(file)
    return found


def _comparable(then: Group | None, now: Group) -> bool:
    return then is not None and bool({*then.tested} & {*now.tested})


def _command(name: str, runs: Sequence[Path], file: Path) -> str:
    option = "-o" if name == "baseline" else "--update --baseline"
    return f"stability-probe {name} {shlex.join(map(str, runs))} {option} {file}"


def _write_reports(found: Check, options: CheckOptions) -> None:
    if options.junit is not None:
        write_text(options.junit, junit(found))
    if options.markdown is not None:
        write_text(options.markdown, markdown(found))
    summary = os.environ.get(SUMMARY)
    if summary:
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(markdown(found) + "\n")
        except OSError as error:
            note(f"{summary}: the job's summary cannot be written ({error.strerror})")


def print_check(found: Check, every: bool, replaced: Path | None = None) -> None:
    """Print what changed, or every number, and what to look at first.

    Args:
        found: the check.
        every: whether numbers are printed that have not changed.
        replaced: the file, where the runs have been put into the baseline.
    """
    for group in found.groups:
        _print_group(group, every)
    console = out()
    for r in found.requirements:
        mark = Text("met   " if r.met else "BROKEN", style="green" if r.met else "red")
        console.print(mark, Text(f"{r.requirement}   {r.found}"), soft_wrap=True)
    if replaced is not None and all(r.met for r in found.requirements):
        word = "as it was or better" if found.passed else "worse than before, and accepted"
        console.print(Text(f"\n{replaced}: written; training is {word}", style="bold"))
        return
    style, word = ("green", "passed") if found.passed else ("red", "FAILED")
    console.print(Text(f"\nstability check: {word}", style=f"bold {style}"))


def _print_group(group: GroupCheck, every: bool) -> None:
    console, (n, m) = out(), group.seeds
    console.print(
        Text(f"\n{group.name}: {m} run{'s' * (m > 1)} against {n} of the baseline", style="bold")
    )
    shown = [c for c in group.compared if every or c.change != "same"]
    if shown:
        names = ("number", "change", "baseline", "now", "p", "would show from", "verdict")
        table = plain_table(names, left=("number", "verdict"))
        for c in shown:
            cells = [c.name, c.percent, number(c.was, 4), number(c.is_now, 4)]
            cells += [p_value(c), f"×{c.visible:.3g}"]
            table.add_row(*cells, Text(c.change, style=_COLOURS[c.change]))
        console.print(table)
    same = [c for c in group.compared if c.change == "same"]
    if same:
        text = f"not worse, as far as can be told: {len(same)} numbers; {sensitivity(same)}"
        console.print(text, soft_wrap=True)
    for flip in group.flips:
        if flip.change != "same":
            text = f"verdict {flip.change}: {flip.claim}: {flip.baseline[0]} -> {flip.now[0]}"
            console.print(Text(text, style=_COLOURS[flip.change]), soft_wrap=True)
    if group.cause:
        console.print(Text(f"likely cause: {group.cause}", style="bold"), soft_wrap=True)
    for text in group.notes:
        note(text)
