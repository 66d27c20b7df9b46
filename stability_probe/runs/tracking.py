r"""Curves of a training under way, in TensorBoard, Weights & Biases and what else there is.

| name | of | number at a step |
|---|---|---|
| `loss/mean` | the network | mean loss |
| `kappa/skip_i` | each skip | mean κ_i, measured: ‖κu‖/‖u‖ |
| `energy/h_i` | each level | mean $\lVert h_i\rVert^2$ |
| `gradient/a_i`, `/b_i`, `/mid`, `/other` | each block | $\lVert\nabla_W\rVert^2$ |
| `sensitivity/exact`, `/pathwise` | the network | mean $\sigma_{\max}(J)$, its bound by paths |
| `path/skip_i`, `path/mid` | each path | mean $\kappa_i\lVert P_i\rVert$, $\lVert P_{mid}\rVert$ |

They are the names of `regression`, with a stroke for the dot. A probe hands its records over when
it stores them (`StabilityProbe(on_records=...)`): a step waits for nothing, and curves lag behind
by some fifty recorded steps (`ProbeConfig.flush_every`).
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import pandas as pd
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.ranks import RecordWarning
from stability_probe.probes.store import OnRecords
from stability_probe.runs.processes import from_main
from stability_probe.runs.run import Run

BLOCKS = {"a": "a_{}", "b": "b_{}", "mid": "mid", "other": "other"}
"""Kinds of blocks, and what a block of level i is called."""

_SINGLE = {
    ("loss", "loss"): "loss/mean",
    ("kappa", "skip"): "kappa/skip_{}",
    ("energy", "h"): "energy/h_{}",
    ("sigma_max", "J"): "sensitivity/exact",
    ("path", "skip"): "path/skip_{}",
    ("path", "mid"): "path/mid",
    ("path", "around"): "path/around",
}
"""Names by metric and site; the numbers are means over samples."""


def scalars(frame: pd.DataFrame) -> Iterator[tuple[int, dict[str, float]]]:
    """What to draw of records: numbers by name, for one step after another.

    Args:
        frame: records, as `StabilityProbe.frame` and `Run.records` have them.

    Yields:
        Steps that have some of these numbers, in rising order.

    >>> frame = pd.DataFrame({
    ...     "step": [1, 1, 2], "metric": ["energy", "kappa", "energy"], "site": ["h", "skip", "h"],
    ...     "level": [0, 1, 0], "stat": "mean", "value": [9.0, 0.7, 4.0]})
    >>> list(scalars(frame))
    [(1, {'energy/h_0': 9.0, 'kappa/skip_1': 0.7}), (2, {'energy/h_0': 4.0})]
    """
    found: dict[int, dict[str, list[float]]] = {}
    rows = frame[frame.metric.isin(_METRICS)]
    for step, *key, value in zip(*(rows[name].tolist() for name in rows), strict=True):
        name = _name(*key)
        if name is not None:
            found.setdefault(step, {}).setdefault(name, []).append(value)
    for step in sorted(found):
        totals = {name: sum(values) for name, values in found[step].items()}
        # A block's energy is that of all its parameters; other numbers are means over samples.
        means = {
            name: total if name.startswith("gradient/") else total / len(found[step][name])
            for name, total in totals.items()
        }
        paths = [mean for name, mean in means.items() if name.startswith("path/")]
        yield step, means | ({"sensitivity/pathwise": sum(paths)} if paths else {})


_METRICS = {"grad_energy", *(metric for metric, _ in _SINGLE)}


@cache
def _name(metric: str, site: str, level: int, stat: str) -> str | None:
    """What a recorded number is called, or `None` if it is not drawn."""
    if metric == "grad_energy":
        kind = site.partition("/")[0]
        return f"gradient/{BLOCKS.get(kind, kind).format(level)}"
    of_a_sample = stat.startswith("s") and metric in ("sigma_max", "path")
    name = _SINGLE.get((metric, site)) if stat == "mean" or of_a_sample else None
    return name and name.format(level)


def log_to(accelerator: Accelerator) -> OnRecords:
    """Log a probe's records beside what a training script logs: `StabilityProbe(on_records=...)`.

    Each tracker of the accelerator gets the numbers (`scalars`) of every step under its own number.
    A W&B run takes no step twice and none before the last, which the script's own logging has
    reached by then: it gets the newest numbers once a flush, with its next entry; where that is
    too seldom, lower `ProbeConfig.flush_every`.

    Args:
        accelerator: whose `init_trackers` is called before records come.
    """

    def log(frame: pd.DataFrame) -> None:
        newest: dict[str, float] = {}
        for step, values in scalars(frame):
            newest |= values
            for tracker in accelerator.trackers:
                if tracker.name != "wandb":
                    tracker.log(values, step=step)
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log(newest, commit=False)

    return log


class Trackers:
    """Trackers of a run, in its folder (`tensorboard/`, `wandb/`); enter it before the probe.

    The main process logs, the others do nothing. A tracker that fails ends no training: there is
    one warning, and it gets nothing more. Where a run is gone on with, TensorBoard forgets what it
    has of later steps; W&B goes on with the run of the same id and ignores steps that it has, but
    offline it makes one more folder, of that id, which has them again.

    Args:
        names: `tensorboard`, `wandb`.
        run: the run.

    Raises:
        StabilityProbeError: if a name is not known, or its package not installed.
    """

    def __init__(self, names: Sequence[str], run: Run) -> None:
        self._names = list(dict.fromkeys(names))
        for name in self._names:
            if name not in _MADE:
                known = ", ".join(_MADE)
                raise StabilityProbeError(f"unknown tracker {name!r}; choose from {known}")
            if find_spec(name) is None:
                raise StabilityProbeError(
                    f"tracker {name!r} needs the package {name}, which is not installed; "
                    f"install stability_probe[{name}]"
                )
        self._run = run
        self._after = 0
        self._trackers: list[GeneralTracker] = []
        self._notes: dict[int, dict[str, float]] = {}

    def go_on(self, after: int) -> "Trackers":
        """Go on after a step, and not from the first."""
        self._after = after
        return self

    def __enter__(self) -> "Trackers":
        from_main(self._start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()

    def note(self, step: int, **values: float) -> None:
        """Have numbers logged with the records of a step, should it be recorded."""
        if self._trackers:
            self._notes[step] = values

    def __call__(self, frame: pd.DataFrame) -> None:
        """Log records."""
        if not self._trackers:
            return
        for step, values in scalars(frame):
            values = {**values, **self._notes.get(step, {})}
            for tracker in list(self._trackers):
                self._guarded(tracker, partial(tracker.log, values, step=step))
        last = frame.step.max()
        self._notes = {step: values for step, values in self._notes.items() if step > last}

    def _start(self) -> None:
        """Start them all.

        Raises:
            StabilityProbeError: if one cannot be started.
        """
        for name in self._names:
            try:
                self._run.path.mkdir(parents=True, exist_ok=True)
                tracker = _MADE[name](self._run, self._after)
                tracker.start()
            except Exception as error:
                self._finish()
                raise StabilityProbeError(
                    f"{self._run.path}: the tracker {name} cannot be started ({_said(error)}); "
                    f"see to that, or train without --track {name}"
                ) from error
            self._trackers.append(tracker)

    def _finish(self) -> None:
        for tracker in list(self._trackers):
            self._guarded(tracker, tracker.finish)

    def _guarded(self, tracker: GeneralTracker, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            self._trackers.remove(tracker)
            text = f"{self._run.path}: the tracker {tracker.name} failed ({_said(error)})"
            warnings.warn(
                f"{text}; training goes on, and it gets nothing more", RecordWarning, stacklevel=2
            )


def _tensorboard(run: Run, after: int) -> GeneralTracker:
    purge = {"purge_step": after + 1} if (run.path / "tensorboard").exists() else {}
    return TensorBoardTracker("tensorboard", run.path, **purge)


def _wandb(run: Run, after: int) -> GeneralTracker:
    from wandb import Settings

    # A folder is called run-TIME-ID, or offline-run-TIME-ID.
    earlier = sorted((run.path / "wandb").glob("*run-*-*"), key=lambda path: path.stat().st_mtime)
    same: dict[str, Any] = {}
    if earlier:
        same = {"id": earlier[-1].name.rpartition("-")[2], "resume": "allow"}
    return WandBTracker(
        os.environ.get("WANDB_PROJECT", "stability_probe"),
        dir=str(run.path),
        name=run.name,
        config=run.config,
        settings=Settings(console="off"),
        **same,
    )


_MADE: dict[str, Callable[[Run, int], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def _said(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
