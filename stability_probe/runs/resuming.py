"""What a training run that stopped needs to go on: where it was, and what it was asked to do.

    run.json            the configuration of the training (`config`) and of its probe (`probing`)
    training-state.pt   the training after some step, at which the records were stored as well

The second is written whole and renamed into place, so that a run that is killed has that of an
earlier step or none. Records of later steps than its own are dropped and taken again. It is removed
when the run has ended in a way that nothing can follow on.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch

from stability_probe.errors import StabilityProbeError, TrainingDiverged
from stability_probe.runs.run import STATE_FILE, Run, put_in_place

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """Where a training run is to start.

    Attributes:
        finished: nowhere, as it is complete.
        again: at step 1, and there are records to drop.
        state: after a step, with the training and the probe as they were then; `None` at step 1.
    """

    finished: bool = False
    again: bool = False
    state: dict[str, Any] | None = None


def find_start(run: Run, resume: bool) -> Start:
    """Where a run is to start, from what its folder holds.

    Args:
        run: the run with its settings: its configuration, and `probing` among what it is about.
        resume: whether it may be there already.

    Raises:
        StabilityProbeError: if it is there and may not be, has other settings, has diverged, or has
            a training state that cannot be read.
    """
    if not (resume and (run.path / "run.json").exists()):
        run.refuse_if_taken()
        return Start()
    info = Run.open(run.path).info
    there = {**info.get("config", {}), "probing": info.get("probing")}
    refuse_contradiction(run.path, there, {**run.config, "probing": run.about["probing"]})
    if diverged(info):
        raise StabilityProbeError(
            f"{run.path}: diverged ({info['reason'].partition(': ')[2]}) and would do so again if "
            "it were gone on with; train with other settings in another folder"
        )
    if info.get("state") == "complete":
        return Start(finished=True)
    state = load_state(run)
    return Start(again=state is None, state=state)


def refuse_contradiction(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Check that settings are those of a run.

    Args:
        path: its folder.
        there: its settings, by name.
        asked: others, or some of them.

    Raises:
        StabilityProbeError: if one is not the same.
    """
    for name, value in asked.items():
        found = there.get(name)
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            refuse_contradiction(path, found, value)
        elif found != value:
            raise StabilityProbeError(
                f"{path}: holds a run with {name} = {found}, and {name} = {value} was asked for; "
                "leave it as it was to go on, or choose another folder"
            )


def save_state(run: Run, state: Mapping[str, Any]) -> None:
    """Store a training state in the run's folder, whole or not at all.

    Args:
        run: the run.
        state: of the `training` and of its `probe`: tensors, numbers and texts, in dictionaries and
            lists.

    Raises:
        StabilityProbeError: if it cannot be written.
    """
    what = "the training state cannot be written"
    with_config = {**state, "config": run.config}
    write_whole(run.path / STATE_FILE, lambda partial: torch.save(with_config, partial), what)


def load_state(run: Run) -> dict[str, Any] | None:
    """The training state in the run's folder, on the CPU; `None` if there is none.

    Raises:
        StabilityProbeError: if it cannot be read, or is that of another run.
    """
    file = run.path / STATE_FILE
    if not file.exists():
        return None
    again = "remove it to start again from the first step"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        config, _, _ = (state[name] for name in ("config", "training", "probe"))
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise StabilityProbeError(f"{file}: damaged ({_brief(error)}); {again}") from error
    if config != run.config:
        raise StabilityProbeError(
            f"{file}: is of another configuration than the run in run.json; {again}"
        )
    return dict(state)


def discard_state(run: Run) -> None:
    """Remove the training state from the run's folder, if the run has ended for good.

    Raises:
        StabilityProbeError: if it cannot be removed.
    """
    info = Run.open(run.path).info
    if info.get("state") != "complete" and not diverged(info):
        return
    file = run.path / STATE_FILE
    try:
        file.with_name(f"{file.name}.partial").unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    except OSError as error:
        raise StabilityProbeError(f"{file}: cannot be removed ({error.strerror})") from error


def diverged(info: Mapping[str, Any]) -> bool:
    """Whether a run has diverged, by its `run.json`."""
    reason = str(info.get("reason"))
    return info.get("state") == "failed" and reason.startswith(TrainingDiverged.__name__)


def write_whole(file: Path, write: Callable[[Path], object], what: str) -> None:
    """Write a file that appears under its name when it is complete, and not before.

    Args:
        file: the file; folders on the way to it are made.
        write: writes everything into the path that it is given.
        what: what an error says, e.g. "the weights cannot be written".

    Raises:
        StabilityProbeError: if it cannot be written.
    """
    with _writing(file, what) as partial:
        write(partial)
        put_in_place(partial, file)


def refuse_unwritable(file: Path, what: str) -> None:
    """Check that `write_whole` could write a file, as far as that can be told without its content.

    Raises:
        StabilityProbeError: if it could not.
    """
    with _writing(file, what) as partial:
        partial.touch()
        partial.unlink()


@contextmanager
def _writing(file: Path, what: str) -> Iterator[Path]:
    """Where the content of a file goes until it is complete; nothing stays there after an error."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        yield partial
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        with suppress(OSError):
            partial.unlink()
        raise StabilityProbeError(f"{file}: {what} ({_brief(error)})") from error


def settings_from(cls: type[T], values: Any, run: Run) -> T:
    """A configuration, of dataclasses alone, from what its `asdict` became in `run.json`.

    Raises:
        StabilityProbeError: if the values are not those of such a configuration.

    >>> from stability_probe.runs.training import TrainConfig
    >>> asked = TrainConfig(scheme="cs:0.7")
    >>> settings_from(TrainConfig, asked.as_dict(), Run("runs/cs")) == asked
    True
    """
    try:
        return _built(cls, values)
    except TypeError as error:
        raise StabilityProbeError(
            f"{run.path}: cannot be gone on with, as its run.json has no settings of a training by "
            f"this version ({_brief(error)}); train again in another folder"
        ) from error


def _built(cls: type[T], values: Any) -> T:
    if not isinstance(values, Mapping):
        raise TypeError(f"{values!r} is no table")
    hints = get_type_hints(cls)
    made = dict(values)
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in values:
            raise TypeError(f"no {field.name!r}")
        value, hint = values[field.name], hints[field.name]
        inner = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if isinstance(value, Mapping) and isinstance(inner, type):
            made[field.name] = _built(inner, value)
        elif isinstance(value, list):
            made[field.name] = tuple(value)
    return cls(**made)


def _brief(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
