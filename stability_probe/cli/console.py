"""What the commands print: verdict tables, progress, one-line errors."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
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

from stability_probe.verify import Verdict

PIPE_WIDTH = 180
"""Columns of a table that is not printed to a terminal."""
_COLOURS = {
    "HOLDS": "green",
    "VIOLATED": "red",
    "ASSUMPTION_UNMET": "yellow",
    "INCONCLUSIVE": "yellow",
}


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print a table of verdicts, and below it what to make of those that do not hold."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("theorem", "run", "claim"):
        table.add_column(name)
    for name in ("measured", "bound", "slack"):
        table.add_column(name, justify="right")
    table.add_column("rests on")
    table.add_column("value [95 % interval]")
    table.add_column("n", justify="right")
    table.add_column("verdict", no_wrap=True)
    for v in verdicts:
        name = "Lemma 3.2" if v.theorem == "3.2" else v.theorem
        numbers = [_number(x) for x in (v.measured, v.bound, v.slack)]
        cells = [name, v.run, v.claim, *numbers, v.statistic, _estimate(v), str(v.n)]
        table.add_row(*map(Text, cells), Text(v.status, style=_COLOURS[v.status]))
    console.print(table)
    for v in verdicts:
        if v.status != "HOLDS":
            console.print(Text(f"{v.status}  {v.theorem} {v.run}: {v.advice}"), soft_wrap=True)


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


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _estimate(verdict: Verdict) -> str:
    if verdict.interval is None:
        return _number(verdict.estimate)
    low, high = verdict.interval
    return f"{_number(verdict.estimate)} [{low:.3g}, {high:.3g}]"
