"""Where records go: into a run folder or into memory. A full disk does not end a training."""

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.ranks import RecordWarning
from stability_probe.probes.records import RunFolder, joined

OnRecords = Callable[[pd.DataFrame], object]
"""What is told of records: it is called with every part of them, a frame."""

WAITING = 8
"""Parts that wait in memory for a folder that cannot be written."""


class Store:
    """Keeps records, whatever the disk does.

    A part that cannot be written waits, in memory, and is tried again with the next; there is one
    warning. Where too many wait, the oldest is given up.

    Args:
        run: the run folder, or `None` for memory.
        on_records: who else is told of the records. If that fails, there is a warning, and it is
            told of no more; a folder that cannot be written does not concern it.
    """

    def __init__(self, run: RunFolder | None, on_records: OnRecords | None = None) -> None:
        self._run = run
        self._on_records = on_records
        self._frames: list[pd.DataFrame] = []
        self._waiting: deque[pd.DataFrame] = deque()
        self._given_up: list[tuple[int, int]] = []
        self._error: str | None = None

    @property
    def missing(self) -> str | None:
        """Which records are not in the run folder and why, or `None` if all of them are."""
        waiting = [_span(frame) for frame in self._waiting]
        spans = [*self._given_up, *waiting]
        if not spans:
            return None
        steps = ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in spans)
        return f"records of steps {steps} could not be stored: {self._error or 'interrupted'}"

    def put(self, frame: pd.DataFrame) -> None:
        """Store records, and those that wait, if there are any; then tell of them."""
        if self._run is None:
            self._frames.append(frame)
        else:
            if not frame.empty:
                self._waiting.append(frame)
            self._write(self._run)
        self._tell(frame)

    def frame(self) -> pd.DataFrame:
        """All records so far, those that wait included."""
        stored = joined(self._frames) if self._run is None else self._run.records()
        return joined([stored, *self._waiting]) if self._waiting else stored

    def end(self, reason: str | None, info: Mapping[str, Any]) -> None:
        """Write how the run ended: that it has failed, if there is a reason to say so."""
        if self._run is None:
            return
        try:
            self._run.end("complete" if reason is None else "failed", reason, info)
        except (OSError, StabilityProbeError) as error:
            self._warn(error, "its run.json does not say how it ended")

    def _write(self, run: RunFolder) -> None:
        try:
            while self._waiting:
                run.append(self._waiting[0])
                self._waiting.popleft()
        except (OSError, StabilityProbeError) as error:
            self._warn(error, "training goes on, and the records wait in memory")
            if len(self._waiting) > WAITING:
                self._given_up.append(_span(self._waiting.popleft()))

    def _tell(self, frame: pd.DataFrame) -> None:
        if self._on_records is None or frame.empty:
            return
        try:
            self._on_records(frame)
        except Exception as error:
            self._on_records = None
            what = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"StabilityProbe: on_records failed ({what}); training goes on, and it is told of "
                "no more records",
                RecordWarning,
                stacklevel=2,
            )

    def _warn(self, error: Exception, consequence: str) -> None:
        """Warn the first time."""
        if self._error is None:
            warnings.warn(f"StabilityProbe: {error}; {consequence}", RecordWarning, stacklevel=2)
        self._error = str(error)


def _span(frame: pd.DataFrame) -> tuple[int, int]:
    return int(frame.step.min()), int(frame.step.max())
