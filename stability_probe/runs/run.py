"""A run folder on disk.

    run.json               configuration, seed, versions, skips, κ, state, the probe's own cost
    records/part-*.parquet  records, each part written whole and renamed into place
    training-state.pt       what a training that stops can go on from (`resuming`)
    verdicts.json, figures/ what was made of them
    tensorboard/, wandb/    what trackers were told of it (`tracking`); nothing here reads them

A part appears under its final name when it is complete and not before, so a run that was killed
at any moment is read up to its last part. What has a name ending in `.partial` was never finished.
"""

import errno
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.records import COLUMNS, empty_frame
from stability_probe.runs.run_json import refuse_wrong_types

SCHEMA = 1
"""Version of the layout; raised when a reader of the old one would misread the new."""

STATE_FILE = "training-state.pt"
"""The name of the training state in a run folder."""

_CATEGORIES = ("metric", "site", "stat")


class Run:
    """A folder that a training run is recorded in.

    Making a `Run` touches nothing; `begin` makes the folder, `open` reads one that is there.

    Args:
        path: the folder.
        config: what the run is: anything JSON can hold, stored in `run.json`.
        about: what else `run.json` says from the start, beside the configuration.

    >>> import tempfile
    >>> run = Run(Path(tempfile.mkdtemp()) / "cs", {"scheme": "cs:0.7"})
    >>> run.begin({"skips": []})
    >>> run.info["state"]
    'running'
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.config, self.about = dict(config or {}), dict(about or {})
        self._last_part: int | None = None  # number of the last part, once it is known
        self._cleared = False

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """A run that is on disk.

        Raises:
            StabilityProbeError: if the folder is not a run, or its `run.json` cannot be read or has
                a field of another type than it should have.
        """
        run = cls(path)
        if not (run.path / "run.json").is_file():
            raise StabilityProbeError(
                f"{run.path}: not a run folder (it has no run.json); "
                "give a folder that `stability-probe train` or a StabilityProbe wrote"
            )
        info = run.info
        schema = info.get("schema")
        if schema != SCHEMA:
            raise StabilityProbeError(
                f"{run.path}: run.json has schema {schema!r} and this version reads {SCHEMA}"
            )
        refuse_wrong_types(run.path / "run.json", info)
        run.config = dict(info.get("config", {}))
        return run

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def info(self) -> dict[str, Any]:
        """The contents of `run.json` as they are on disk.

        Raises:
            StabilityProbeError: if they are no JSON object.
        """
        file = self.path / "run.json"
        try:
            info = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise StabilityProbeError(f"{file}: cannot be read as JSON ({error})") from error
        if not isinstance(info, dict):
            raise StabilityProbeError(f"{file}: a JSON object is needed, got {type(info).__name__}")
        return info

    def begin(self, info: Mapping[str, Any]) -> None:
        """Make the folder and write `run.json` with state `running`.

        Raises:
            StabilityProbeError: if `refuse_if_taken` says so and the run has not been cleared, or
                the folder cannot be written.
        """
        if not self._cleared:
            self.refuse_if_taken()
        try:
            (self.path / "records").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StabilityProbeError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder"
            ) from error
        start = {"schema": SCHEMA, "state": "running", "reason": None, "config": self.config}
        if self._cleared:
            start["resumed"] = self._resumed(0)
        self._write_info({**start, "versions": _versions(), **self.about, **info})

    def resume(self, step: int) -> None:
        """Go on with a run that stopped after `step`: later records are dropped, the last first.

        `run.json` says `running` again, and lists under `resumed` the steps after which the run
        was gone on with.

        Raises:
            StabilityProbeError: if it is no run, has a damaged part, or cannot be written.
        """
        self.update({"state": "running", "reason": None, "resumed": self._resumed(step)})
        self._drop_after(step)

    def clear(self) -> None:
        """Drop all records, the last first, so that `begin` can start the run anew.

        Until it does, `run.json` stays as it is: a run that is killed in between is still known.

        Raises:
            StabilityProbeError: if the folder cannot be written.
        """
        self._drop_after(0)
        self._cleared = True

    def refuse_if_taken(self) -> None:
        """Check that the folder is free for a run: one that failed with no record may be replaced.

        Raises:
            StabilityProbeError: if it holds another run, or cannot be looked at.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file")
            there, empty = (self.path / "run.json").exists(), self._nothing_recorded()
        except OSError as error:
            raise StabilityProbeError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder"
            ) from error
        state = self._state() if there else "failed"
        if empty and state == "failed":
            return
        if empty and state == "running":
            raise StabilityProbeError(
                f"{self.path}: holds a run already, with no records yet, that may still be "
                "running; if it is not, remove the folder, or choose another one"
            )
        raise StabilityProbeError(
            f"{self.path}: holds a run already, which would be lost; choose another folder"
        )

    def _nothing_recorded(self) -> bool:
        """Whether there is no record, whole or not, and nothing that a training could go on from.

        Raises:
            OSError: if that cannot be seen.
        """
        records = self.path / "records"
        if records.is_dir() and any(records.iterdir()):
            return False
        return not (self.path / STATE_FILE).exists()

    def _state(self) -> str:
        """What `run.json` says of how the run stands; `unknown` if it cannot be read."""
        try:
            return str(self.info.get("state"))
        except StabilityProbeError:
            return "unknown"

    def update(self, info: Mapping[str, Any]) -> None:
        """Add to `run.json`, or replace what is there."""
        self._write_info({**self.info, **info})

    def append(self, frame: pd.DataFrame) -> None:
        """Store records as a new part, whole or not at all.

        Raises:
            StabilityProbeError: if the part cannot be written.
        """
        if self._last_part is None:
            self._last_part = max(
                (int(p.stem.removeprefix("part-")) for p in self._parts()), default=0
            )
        self._write_part(self.path / "records" / f"part-{self._last_part + 1:06d}.parquet", frame)
        self._last_part += 1

    def end(self, state: str, reason: str | None, info: Mapping[str, Any]) -> None:
        """Write how the run ended: `complete`, or `failed` with the reason."""
        self.update({"state": state, "reason": reason, **info})

    def records(self) -> pd.DataFrame:
        """All records in completed parts.

        Raises:
            StabilityProbeError: if a part is damaged.
        """
        frames = [self._read_part(part) for part in self._parts()]
        if not frames:
            return empty_frame()
        frame = pd.concat([f.astype(dict.fromkeys(_CATEGORIES, object)) for f in frames])
        return frame.reset_index(drop=True).astype(dict.fromkeys(_CATEGORIES, "category"))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the folder, whole or not at all."""
        write_json(self.path / name, value)

    def _parts(self) -> list[Path]:
        """The completed parts, in order."""
        return sorted((self.path / "records").glob("part-*.parquet"))

    def _read_part(self, part: Path) -> pd.DataFrame:
        try:
            return pd.read_parquet(part, columns=list(COLUMNS))
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise StabilityProbeError(
                f"{part}: damaged ({str(error).splitlines()[0]}); move it away to read the rest"
            ) from error

    def _write_part(self, part: Path, frame: pd.DataFrame) -> None:
        partial = part.with_suffix(".partial")
        try:
            frame.astype(dict.fromkeys(_CATEGORIES, "category")).to_parquet(partial, index=False)
            put_in_place(partial, part)
        except OSError as error:
            raise StabilityProbeError(f"{part}: cannot be written ({error})") from error

    def _drop_after(self, step: int) -> None:
        """Drop the records of later steps and what was never finished."""
        try:
            for partial in [*self.path.glob("*.partial"), *self.path.glob("records/*.partial")]:
                partial.unlink()
            for part in reversed(self._parts()):
                frame = self._read_part(part) if step else empty_frame()
                kept = frame[frame.step <= step]
                if len(kept) == 0:
                    part.unlink()
                    continue
                if len(kept) < len(frame):
                    self._write_part(part, kept)
                break
        except OSError as error:
            raise StabilityProbeError(
                f"{self.path}: cannot be written ({error.strerror}), and so not be gone on with"
            ) from error
        self._last_part = None

    def _resumed(self, step: int) -> list[int]:
        """The steps after which the run was gone on with, one more added."""
        return [*self.info.get("resumed", []), step]

    def _write_info(self, info: Mapping[str, Any]) -> None:
        self.write_json("run.json", info)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinities become null, as JSON has none.

    Raises:
        StabilityProbeError: if the file cannot be written.
    """
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        StabilityProbeError: if the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        partial.write_text(text, encoding="utf-8")
        put_in_place(partial, path)
    except OSError as error:
        raise StabilityProbeError(f"{path}: cannot be written ({error.strerror})") from error


def finite(value: Any) -> Any:
    """The same JSON value with null in the place of NaN and infinities.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def open_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Runs from folders, each once; a folder that is not a run stands for the runs below it.

    A run's `run.json` stands for its folder.

    Raises:
        StabilityProbeError: if a path is neither a run nor contains one.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        path = path.parent if path.name == "run.json" and path.is_file() else path
        here = [path] if (path / "run.json").exists() else []
        inside = here or sorted(file.parent for file in path.rglob("run.json"))
        if not inside:
            raise StabilityProbeError(
                f"{path}: neither a run folder (no run.json) nor a folder with runs in it"
            )
        folders.update({folder.resolve(): folder for folder in inside})
    return [Run.open(folder) for folder in folders.values()]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of every path that no other ends with.

    >>> short_names([Path("out/a/run"), Path("out/b/run"), Path("out/b/cs")])
    ['a/run', 'b/run', 'cs']
    """
    parts = [path.absolute().parts for path in paths]

    def short(own: tuple[str, ...]) -> str:
        ends = (own[-n:] for n in range(1, len(own)))
        alone = (end for end in ends if sum(p[-len(end) :] == end for p in parts) == 1)
        return str(Path(*next(alone, own)))

    return [short(own) for own in parts]


def put_in_place(partial: Path, final: Path) -> None:
    """Flush a file to disk and give it its final name, in the place of what has it.

    Raises:
        OSError: if that cannot be done.
    """
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, final)


def _versions() -> dict[str, str]:
    packages = ("stability_probe", "torch", "diffusers", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
