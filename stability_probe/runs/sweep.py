"""A grid of training runs, done by many processes, and the table of what came of them.

    OUT/runs/NAME/    one folder a run (`cells`)
    OUT/results.csv   one row a run

What is done is read from the folders, so that a sweep may be stopped at any moment by any means,
and the same call goes on with it. Several machines have to share the file system that OUT is on.
"""

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import joblib
import pandas as pd
from filelock import Timeout

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.ranks import RecordWarning
from stability_probe.runs.cells import OUTCOME, Cell, Measure, Outcome, held, work
from stability_probe.runs.grid import Grid
from stability_probe.runs.run import write_text
from stability_probe.runs.workers import Request, Workers, hire

TRIES = 3
"""How often a run is started among others, where its process dies; then once more alone."""
GLANCE = 0.2
"""Seconds between two looks at a run that is under way; a hundred of them take twice that."""
RUN_FILES = ("run.json", OUTCOME)
"""A folder with one of them is that of a run."""
RESULTS = "results.csv"
"""The name of the table in a sweep's folder."""

OnDone = Callable[[str, Outcome], None]


def sweep(
    grid: Grid,
    out: str | Path,
    *,
    backend: str = "local",
    address: str | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    retry: bool = False,
    measure: Measure | None = None,
    on_done: OnDone | None = None,
) -> pd.DataFrame:
    """Do the runs of a grid, but for those that are done, and write `results.csv`.

    Runs that were started and not finished are gone on with. A run that fails does not stop the
    others; nor does a process that dies.

    Args:
        grid: the runs.
        out: folder of the sweep; on several machines, one that all of them see.
        backend: `local`, `ray` or `dask`.
        address: of a Ray or Dask cluster; without it, one is started on this machine, unless
            the environment variable RAY_ADDRESS has that of a Ray cluster.
        jobs: runs at once; as many as there is room for if not given.
        threads: of each run; an equal share of the cores if not given.
        retry: also do the runs again that have failed.
        measure: makes numbers of a finished run, for the table; a function that processes can
            import, such as `stability_probe.regression.run_numbers`. Finished runs are measured
            again where it has another name than the one before.
        on_done: called with the name and outcome of every run that ends, in another thread.

    Returns:
        A frame with a row for every run: its name, the axes of the grid, state (`complete`,
        `failed`, or `open` where it has not ended), reason, seconds, and what `measure` gives.

    Raises:
        StabilityProbeError: if the folder holds other runs or is in use, or there are no workers.
    """
    out, request = Path(out), Request(backend, address, jobs, threads)
    cells = _cells(grid, out, measure)
    with _only_sweep(out):
        ledger = _Ledger(_outcomes(out, cells), on_done)
        if retry:
            ledger.forget_failures(cells)
        todo = ledger.left(cells)
        for cell in todo:
            cell.take_up()
        try:
            if todo:
                with hire(request, len(todo)) as workers:
                    _do(todo, workers, ledger)
        finally:
            frame = _table(grid, cells, ledger.outcomes)
            write_text(out / RESULTS, frame.to_csv(index=False))
    return frame


def survey(grid: Grid, out: str | Path, measure: Measure | None = None) -> pd.DataFrame:
    """What `sweep` would return now, if it did nothing.

    Raises:
        StabilityProbeError: if the folder holds other runs.
    """
    cells = _cells(grid, Path(out), measure)
    return _table(grid, cells, _outcomes(Path(out), cells))


def _cells(grid: Grid, out: Path, measure: Measure | None) -> list[Cell]:
    """The runs of a grid in a sweep's folder, by the names that they have there.

    A name that has the same values in another order is of the same run.
    """
    probing, runs = grid.record_config(), out / "runs"
    there = {frozenset(name.split(",")): name for name in _folders(runs)}
    named = [(there.get(frozenset(name.split(",")), name), run) for name, run in grid.cells()]
    return [
        Cell(runs / name, config, probing, grid.weights, measure=measure) for name, config in named
    ]


def _outcomes(out: Path, cells: Sequence[Cell]) -> dict[str, Outcome]:
    """How runs have ended, by name; those that have.

    Raises:
        StabilityProbeError: if there are others in the folder, or with other settings.
    """
    runs = out / "runs"
    there = _folders(runs)
    unknown = there - {cell.name for cell in cells}
    strange = sorted(
        name for name in unknown if any((runs / name / file).exists() for file in RUN_FILES)
    )
    if strange:
        raise StabilityProbeError(
            f"{out}: holds the run {strange[0]}, which the grid has not; add it to the grid, or "
            "choose another folder"
        )
    found = {}
    for cell in cells:
        if cell.name in there:
            outcome = cell.outcome()
            if outcome is None:
                cell.refuse_another()
            else:
                found[cell.name] = outcome
    return found


def _folders(path: Path) -> set[str]:
    """Names of the folders in one, which need not be there, but for hidden ones."""
    found = [entry.name for entry in os.scandir(path) if entry.is_dir()] if path.exists() else []
    return {name for name in found if not name.startswith(".")}


def _do(todo: Sequence[Cell], workers: Workers, ledger: "_Ledger") -> None:
    """Do runs; those whose process dies time and again are done last, each alone.

    It takes others with it that were under way, so that one which dies among others may be none to
    blame.
    """
    todo = [replace(cell, threads=workers.threads) for cell in todo]
    _until_quiet(todo, workers, ledger, TRIES, last=False)
    for cell in ledger.left(todo):
        _until_quiet([cell], workers, ledger, TRIES + 1, last=True)


def _until_quiet(
    cells: Sequence[Cell], workers: Workers, ledger: "_Ledger", most: int, last: bool
) -> None:
    """Rounds of work, each on what the one before has left, until no process dies in one."""
    idle = 0
    while left := ledger.left(cells):
        before = [cell.attempts for cell in left]
        try:
            with ledger.watching(left) as handed_out:
                workers.do(joblib.delayed(work)(cell, most, last) for cell in handed_out)
            return
        except workers.broken as error:
            moved = len(ledger.left(left)) < len(left) or [c.attempts for c in left] != before
            idle = 0 if moved else idle + 1
            said = " ".join(str(error).split())[:200]
            if idle == TRIES:
                raise StabilityProbeError(
                    f"sweep: processes die before they start a run ({said}); see whether one has "
                    "room for what it imports"
                ) from error
            text = f"a process has died; its run is gone on with by another ({said})"
            warnings.warn(text, RecordWarning, stacklevel=2)


class _Ledger:
    """Which runs have ended, as their folders say.

    Attributes:
        outcomes: how they have ended, by name.
    """

    def __init__(self, outcomes: dict[str, Outcome], on_done: OnDone | None) -> None:
        self.outcomes = outcomes
        self._on_done = on_done
        self._under_way: dict[str, Cell] = {}

    def left(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of some runs that have not ended."""
        return [cell for cell in cells if cell.name not in self.outcomes]

    def forget_failures(self, cells: Sequence[Cell]) -> None:
        """Take those that have failed for such as have not ended."""
        for cell in cells:
            if cell.name in self.outcomes and self.outcomes[cell.name].state == "failed":
                del self.outcomes[cell.name]
                cell.forget()

    @contextmanager
    def watching(self, cells: Sequence[Cell]) -> Iterator[Iterator[Cell]]:
        """Runs to hand out one by one, watched for how they end."""
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watcher.start()
        try:
            yield self._handed_out(cells)
        finally:
            over.set()
            watcher.join()
            self._look()
            self._under_way.clear()

    def _handed_out(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        for cell in cells:
            self._under_way[cell.name] = cell
            yield cell

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(GLANCE * (1 + len(self._under_way) / 100)):
            self._look()

    def _look(self) -> None:
        """Report what has ended of what is under way."""
        for name, cell in list(self._under_way.items()):
            outcome = cell.outcome()
            if outcome is not None:
                del self._under_way[name]
                self.outcomes[name] = outcome
                if self._on_done is not None:
                    self._on_done(name, outcome)


@contextmanager
def _only_sweep(out: Path) -> Iterator[None]:
    """Keep other sweeps from the folder.

    Raises:
        StabilityProbeError: if there is one at work in it, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = held(out / "sweep.lock", wait=False)
    except Timeout as error:
        raise StabilityProbeError(
            f"{out}: another sweep is at work in it; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise StabilityProbeError(
            f"{out}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _table(grid: Grid, cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> pd.DataFrame:
    """A row for every run."""
    rows = []
    for cell in cells:
        outcome = outcomes.get(cell.name, Outcome("open", seconds=math.nan))
        rows.append(
            {
                "run": cell.name,
                **grid.values(cell.config),
                "state": outcome.state,
                "reason": outcome.reason,
                "warnings": "; ".join(outcome.warnings),
                "seconds": outcome.seconds,
                **outcome.numbers,
            }
        )
    return pd.DataFrame(rows)
