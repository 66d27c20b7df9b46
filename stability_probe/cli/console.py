"""What the commands print: verdict tables, progress, one-line errors."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from stability_probe.runs import Run
from stability_probe.runs.run import short_names
from stability_probe.skips import SkipConnection
from stability_probe.verify import Verdict

PIPE_WIDTH = 164
"""Columns of a table that is not printed to a terminal."""
_COLUMNS = {
    "run": 24,
    "verdict": 16,
    "measured": 10,
    "bound": 10,
    "slack": 10,
    "rests on": 76,
    "n": 5,
}
_COLOURS = {
    "HOLDS": "green",
    "VIOLATED": "red",
    "ASSUMPTION_UNMET": "yellow",
    "INCONCLUSIVE": "yellow",
}


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print verdicts claim by claim, and below them what to make of those that do not hold.

    The columns: run, verdict, measured value, bound, slack = bound / measured, the statistic that
    the verdict rests on with its interval and that one's level, number of independent units.
    """
    console = out()
    header = {name: name for name in _COLUMNS} | {"rests on": "rests on: value [interval] level"}
    console.print(_table([[Text(text, style="bold") for text in header.values()]]))
    for (theorem, claim), group in groupby(verdicts, key=lambda v: (v.theorem, v.claim)):
        kind = "Lemma" if theorem == "3.2" else "Theorem"
        console.print(Text(f"\n{kind} {theorem}: {claim}", style="bold"), soft_wrap=True)
        console.print(_table([_row(v) for v in group]))
    print()
    for v in verdicts:
        if v.status != "HOLDS":
            console.print(Text(f"{v.status}  {v.theorem} {v.run}: {v.advice}"), soft_wrap=True)


def _row(v: Verdict) -> list[Text]:
    numbers = [number(x) for x in (v.measured, v.bound, v.slack)]
    cells = [Text(text) for text in (*numbers, _rests_on(v), str(v.n))]
    return [Text(v.run), Text(v.status, style=_COLOURS[v.status]), *cells]


def _table(rows: Sequence[Sequence[Text]]) -> Table:
    """Rows with the widths of `_COLUMNS`, so that one table's columns continue the last one's."""
    table = Table.grid(padding=(0, 1))
    for name, width in _COLUMNS.items():
        left = name in ("run", "rests on", "verdict")
        table.add_column(width=width, justify="left" if left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def print_costs(runs: Sequence[Run]) -> None:
    """Print what the probe itself took in every run that says so, in seconds.

    The overhead is that of hooks, steps and storing, over the time in which the probe did nothing;
    the scheduled measurements are apart.
    """
    costs = [(run.path, run.info.get("probe")) for run in runs]
    known = [(path, cost) for path, cost in costs if cost]
    if not known:
        return
    names = {
        "hooks_s": "hooks", "step_s": "steps", "flush_s": "storing",
        "sensitivity_s": "measurements", "elapsed_s": "whole run",
    }  # fmt: skip
    table = plain_table(["run", "overhead", *names.values()], left=["run"])
    for name, (_, cost) in zip(short_names([path for path, _ in known]), known, strict=True):
        seconds = [number(cost.get(key)) for key in names]
        overhead = f"{cost['overhead']:.1%}" if "overhead" in cost else number(None)
        table.add_row(name, overhead, *seconds)
    console = out()
    console.print(Text("\nWhat the probe took, in seconds", style="bold"))
    console.print(table)


def print_skips(skips: Sequence[SkipConnection]) -> None:
    """Print long skips as a table, the outermost first."""
    if not skips:
        print("no long skips (N = 0)")
        return
    names = ("level", "source", "sink", "merge", "shape", "κ as found")
    table = plain_table(names, left=names[1:])
    for s in skips:
        kappa = "changed on its way" if s.kappa is None else f"{s.kappa:.4g}"
        shape = "×".join(map(str, s.shape))
        table.add_row(
            str(s.level), s.source or "(input)", s.sink or "(model)", s.merge, shape, kappa
        )
    out().print(table, soft_wrap=True)


def print_sensitivity(rows: Sequence[Mapping[str, Any]], levels: Sequence[float] | None) -> None:
    """Print the hierarchy of Theorem 3.4, and what every skip carries, by noise level."""
    names = {
        "measured": "random", "worst": "worst direction", "exact": "σmax(J)",
        "pathwise": "path by path", "blockwise": "block by block", "paper": "Theorem 3.4",
    }  # fmt: skip
    cells = [[row[key] for key in names] for row in rows]
    _print_numbers("Sensitivity to the input, mean over samples", names.values(), cells, levels)
    skips = [f"skip {i}" for i in range(1, len(rows[0]["paths"]) + 1)]
    paths = [*skips, "middle", "around"]
    cells = [[*row["paths"], row["middle"], row["around"]] for row in rows]
    title = "Norm of every path, κᵢ‖Pᵢ‖: which skip carries it"
    _print_numbers(title, paths, cells, levels)
    cells = [row["shares"] for row in rows]
    _print_numbers("Share of every path in the worst case, wᵀκᵢPᵢv/σmax", paths, cells, levels)
    cells = [row["energy_shares"] for row in rows]
    title = "Share of every skip in the energy that its merge reads"
    _print_numbers(title, skips, cells, levels)
    print()


def print_global_bound(bound: float | None, refused: str | None) -> None:
    """Print Theorem 3.4 with global constants, or why it has none."""
    if bound is None:
        print(f"Theorem 3.4 with global constants: none ({refused})\n")
    else:
        print(f"Theorem 3.4 with global constants (for any two inputs, certified): {bound:.3g}\n")


def _print_numbers(
    title: str,
    names: Iterable[str],
    rows: Sequence[Sequence[float | None] | None],
    levels: Sequence[float] | None,
) -> None:
    """A table of numbers, a row a noise level; nothing if they were not measured."""
    table = plain_table([*(["t"] if levels else []), *names])
    for k, row in enumerate(rows):
        if row is None:
            return
        table.add_row(*([f"{levels[k]:g}"] if levels else []), *map(number, row))
    console = out()
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def note(text: str) -> None:
    """Print one line on stderr."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr)


def out() -> Console:
    """Standard output."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display with the time left, on stderr."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as display:
        yield display


def plain_table(names: Iterable[str], left: Sequence[str] = ()) -> Table:
    """A table without lines; columns are flush right but for those named in `left`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}g}"


def _rests_on(verdict: Verdict) -> str:
    if verdict.estimate is None:
        return "–"
    if verdict.interval is None:
        return f"{verdict.statistic}: {number(verdict.estimate)}"
    low, high = verdict.interval
    level = "" if verdict.confidence is None else f" {100 * verdict.confidence:.4g} %"
    return f"{verdict.statistic}: {number(verdict.estimate)} [{low:.3g}, {high:.3g}]{level}"
