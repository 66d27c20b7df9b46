"""`stability-probe sweep`: from a grid to the table of its runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stability_probe.cli.console import note, out, plain_table, progress
from stability_probe.regression import run_numbers
from stability_probe.runs import Grid, survey, sweep
from stability_probe.runs.cells import Outcome
from stability_probe.runs.run import finite
from stability_probe.runs.sweep import RESULTS, OnDone


@dataclass(frozen=True)
class SweepOptions:
    """What a user said of a sweep.

    Attributes:
        grid: the YAML file.
        out: folder of the sweep.
        backend: who does the runs.
        address: of a cluster.
        jobs: runs at once.
        threads: of each run.
        retry: whether to do those again that have failed.
        dry_run: whether to do nothing.
    """

    grid: Path
    out: Path
    backend: str = "local"
    address: str | None = None
    jobs: int | None = None
    threads: int | None = None
    retry: bool = False
    dry_run: bool = False


def run_sweep(options: SweepOptions) -> pd.DataFrame:
    """Do what is left of a sweep, with a progress display.

    Returns:
        A row for every run, as `sweep`.

    Raises:
        StabilityProbeError: if the grid, the folder or the options cannot be used.
    """
    grid = Grid.from_yaml(options.grid)
    before = survey(grid, options.out, run_numbers)
    if options.dry_run:
        return before
    try:
        with sweep_progress(before, options.retry) as on_done, _silence():
            return sweep(
                grid, options.out, backend=options.backend, address=options.address,
                jobs=options.jobs, threads=options.threads, retry=options.retry,
                measure=run_numbers, on_done=on_done,
            )  # fmt: skip
    except KeyboardInterrupt:
        done = (survey(grid, options.out, run_numbers).state == "complete").sum()
        note(f"{done} of {len(before)} runs are complete; the same command goes on with the others")
        raise


@contextmanager
def sweep_progress(before: pd.DataFrame, retry: bool, what: str = "runs") -> Iterator[OnDone]:
    """What moves a progress display: runs that have ended, and how many of them failed.

    Args:
        before: the survey of the sweep.
        retry: whether runs that failed are done again.
        what: the name of the runs in the display.
    """
    states = before.state.value_counts()
    failed = 0 if retry else int(states.get("failed", 0))

    def described(count: int) -> str:
        return f"{what} ({count} failed)" if count else what

    with progress() as display:
        task = display.add_task(
            described(failed),
            total=len(before),
            completed=int(states.get("complete", 0)) + failed,
        )

        def on_done(name: str, outcome: Outcome) -> None:
            nonlocal failed
            failed += outcome.state == "failed"
            display.update(task, advance=1, description=described(failed))

        yield on_done


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stdout but our own: Ray prints there what its machines say."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def print_sweep(table: pd.DataFrame, folder: Path, every: bool = False) -> None:
    """Print how many runs there are of each state, those that failed with their reasons, and where.

    Args:
        table: a row for every run.
        folder: of the sweep.
        every: list the runs that have not failed as well.
    """
    listed = table if every else table[table.state == "failed"]
    if len(listed):
        rows = plain_table(["run", "state", "reason"], left=["run", "state", "reason"])
        for row in listed.itertuples():
            rows.add_row(str(row.run), str(row.state), str(row.reason))
        out().print(rows, soft_wrap=True)
    states = table.state.value_counts()
    counts = ", ".join(f"{states[s]} {s}" for s in ("complete", "failed", "open") if s in states)
    print(f"{len(table)} runs: {counts}")
    if (table.state == "failed").any():
        print("those that have failed are done again with --retry")
    if (folder / RESULTS).exists():
        print(f"results: {folder / RESULTS}\nruns: {folder / 'runs'}")


def as_dict(table: pd.DataFrame, folder: Path) -> dict[str, Any]:
    """The table as JSON has it, with how many runs there are of each state."""
    states = table.state.value_counts()
    return {
        "results": str(folder / RESULTS) if (folder / RESULTS).exists() else None,
        **{state: int(states.get(state, 0)) for state in ("complete", "failed", "open")},
        "runs": finite(table.astype(object).where(table.notna(), None).to_dict("records")),
    }
