"""One run of a sweep, in whatever process it is done; what comes of it is said in its folder.

    runs/NAME/run.json, records/   the run (`run`)
    runs/NAME/weights.pth          its trained weights, if they are kept
    runs/NAME/outcome.json         how it ended, with its numbers: written last
    runs/NAME/attempts             a line for every time that it was started, until it has ended
    runs/NAME/lock                 held by the process that it is done in

Nobody has to be told of an outcome, so that none is lost with the process that would have told it.
"""

import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from stability_probe.errors import StabilityProbeError
from stability_probe.runs.recording import RecordConfig, record_training
from stability_probe.runs.resuming import diverged, refuse_contradiction
from stability_probe.runs.run import Run, write_json
from stability_probe.runs.training import TrainConfig

OUTCOME, ATTEMPTS, LOCK, WEIGHTS = "outcome.json", "attempts", "lock", "weights.pth"
"""Names of files in a run's folder."""

Measure = Callable[[Run], Mapping[str, float]]
"""Numbers of a finished run, by name."""


@dataclass(frozen=True)
class Cell:
    """A run of a sweep.

    Attributes:
        folder: the run's folder.
        config: its settings.
        probing: how it is probed.
        weights: whether its trained weights are kept.
        threads: of the process that it is done in.
        measure: makes numbers of it once it is finished.
    """

    folder: Path
    config: TrainConfig
    probing: RecordConfig
    weights: bool = False
    threads: int = 1
    measure: Measure | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes it the run it is, as JSON has it."""
        probing = self.probing.as_dict()
        return {**self.config.as_dict(), "probing": probing, "weights": self.weights}

    @property
    def measured_by(self) -> str:
        """The qualified name of what makes numbers of it; empty if nothing does."""
        if self.measure is None:
            return ""
        named = self.measure if hasattr(self.measure, "__qualname__") else type(self.measure)
        return f"{named.__module__}.{named.__qualname__}"

    @property
    def attempts(self) -> int:
        """How often it was started and has not ended."""
        try:
            return len((self.folder / ATTEMPTS).read_text().splitlines())
        except FileNotFoundError:
            return 0

    @property
    def divergence(self) -> str:
        """Why its training, done before, has diverged; empty if it has not."""
        with suppress(StabilityProbeError):  # no run, or damaged: it says so when it is trained
            info = Run.open(self.folder).info
            return str(info["reason"]) if diverged(info) else ""
        return ""

    def forget(self) -> None:
        """Take away that it has failed, and a training that could not be gone on with.

        Raises:
            StabilityProbeError: if the folder cannot be written, as of all that write into it.
        """
        with self._writing():
            if self.divergence:
                shutil.rmtree(self.folder)
            (self.folder / OUTCOME).unlink(missing_ok=True)

    def take_up(self) -> None:
        """Forget how often it was started before; that may have been ended by hand."""
        with self._writing():
            (self.folder / ATTEMPTS).unlink(missing_ok=True)

    def take(self) -> FileLock:
        """Keep other processes from the folder; wait for one that an earlier sweep left at work."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            return held(self.folder / LOCK)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StabilityProbeError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another folder"
            ) from error

    def refuse_another(self) -> None:
        """Check that a run in the folder, finished or not, has the same settings.

        Raises:
            StabilityProbeError: if it has not, or is damaged.
        """
        if (self.folder / "run.json").exists():
            info = Run.open(self.folder).info
            there = {**info.get("config", {}), "probing": info.get("probing")}
            # what is not complete is still to write its weights
            written = info.get("state") != "complete" or (self.folder / WEIGHTS).exists()
            there["weights"] = self.weights and written
            refuse_contradiction(self.folder, there, self.settings)

    def outcome(self) -> "Outcome | None":
        """How it has ended; `None` if it has not, or its numbers are still to be made.

        Raises:
            StabilityProbeError: as `recorded`.
        """
        found = self.recorded()
        if found is None:
            return None
        measured = self.measure is None or found.measured_by == self.measured_by
        if found.state == "complete" and not measured:
            return None
        return replace(found, measured_by="", settings={})

    def recorded(self) -> "Outcome | None":
        """How it has ended as its file says, which may be without the numbers; `None` without one.

        Raises:
            StabilityProbeError: if that cannot be read, or the folder holds a run with other
                settings.
        """
        try:
            read = json.loads((self.folder / OUTCOME).read_text())
            read = {"measured_by": "", **read}  # earlier versions did not say
            outcome = Outcome(**{name: read[name] for name in Outcome.__dataclass_fields__})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StabilityProbeError(
                f"{self.folder / OUTCOME}: cannot be read ({error}); remove it, and the run is "
                "looked at again"
            ) from error
        refuse_contradiction(self.folder, outcome.settings, self.settings)
        return outcome

    def end(self, state: str, reason: str = "", **more: Any) -> None:
        """Say how it has ended.

        Raises:
            StabilityProbeError: if it cannot be written.
        """
        ended = Outcome(state, reason, measured_by=self.measured_by, settings=self.settings, **more)
        write_json(self.folder / OUTCOME, asdict(ended))
        (self.folder / ATTEMPTS).unlink(missing_ok=True)


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep has ended.

    Attributes:
        state: `complete` or `failed`.
        reason: why it has failed.
        seconds: wall time of its last sitting.
        numbers: of a complete run, by name; `None` where one is not finite.
        warnings: what was warned of.
        measured_by: the qualified name of what made the numbers, in its file alone.
        settings: the run's, in its file alone.
    """

    state: str
    reason: str = ""
    seconds: float = 0.0
    numbers: dict[str, float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    measured_by: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def work(cell: Cell, most: int, last: bool) -> None:
    """Do a run, or what is left of it.

    A run that has been started `most` times already and never ended takes its process with it, as
    one does that needs more memory than there is. It is not started again.

    Args:
        cell: the run.
        most: how often it may be started.
        last: whether it has failed for good then, and is not to be tried in another way.

    Raises:
        StabilityProbeError: if the folder cannot be written.
    """
    with _alone(cell):
        if cell.outcome() is not None:
            return
        if cell.divergence:  # its process died before it could say so
            cell.end("failed", cell.divergence)
            return
        if cell.attempts >= most:
            if last:
                cell.end(
                    "failed", f"its process was killed each of the {most} times it was started"
                )
            return
        with (cell.folder / ATTEMPTS).open("a") as file:
            file.write(f"{platform.node()} {os.getpid()}\n")
        _train(cell)


def _train(cell: Cell) -> None:
    """Train and measure; an error is the run's outcome, an interrupt is not.

    What is known of the training stays where that was done before, and only numbers are missing.
    """
    before, began = cell.recorded(), time.perf_counter()
    state, reason, numbers = "complete", "", {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            with _threads(cell.threads):
                weights = cell.folder / WEIGHTS if cell.weights else None
                run = record_training(
                    cell.config, cell.folder, cell.probing, weights=weights, resume=True
                )
                numbers = dict(cell.measure(run)) if cell.measure else {}
        except Exception as error:
            state, reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    cell.end(
        state,
        reason,
        seconds=before.seconds if before else time.perf_counter() - began,
        numbers=numbers,
        warnings=list(dict.fromkeys([*before.warnings, *said])) if before else said,
    )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _alone(cell: Cell) -> Iterator[None]:
    """No other process works in the cell's folder."""
    lock = cell.take()
    try:
        yield
    finally:
        lock.release()
        if cell.outcome() is not None:
            (cell.folder / LOCK).unlink(missing_ok=True)


def held(file: Path, wait: bool = True) -> FileLock:
    """A lock that is held, or is not where the file system has none.

    Raises:
        filelock.Timeout: if another process holds it, and it is not to be waited for.
        OSError: if the file cannot be written.
    """
    lock = FileLock(file)
    with suppress(NotImplementedError):
        lock.acquire(timeout=-1 if wait else 0)
    return lock
