"""The weights that a checkpoint holds, wherever they lie in it.

path ──► kind (by content) ──► file, or one of a folder's files ──► weights by name
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stability_probe.checkpoints.exported import read_export
from stability_probe.checkpoints.folders import part_of, weight_files
from stability_probe.checkpoints.formats import EXPECTED, Kind, kind_of
from stability_probe.checkpoints.pickles import read_pickle
from stability_probe.checkpoints.reading import listed, problem, read_json_object, reading
from stability_probe.checkpoints.state import Weights, choose, find_weights, is_ema, tensors_of


@dataclass(frozen=True)
class Wanted:
    """Which weights are wanted, and whether code in the file may run to get at them."""

    weights: str
    trust: bool


@dataclass(frozen=True)
class Source:
    """Weights that were read, and what lay beside them.

    Attributes:
        path: the file, or the first of its parts.
        format: "diffusers" or a value of `Kind`.
        weights: state dict, parameters in order, or module.
        name: of the weights, where there was a choice.
        folder: of a diffusers model.
        config: its `config.json`.
    """

    path: Path
    format: str
    weights: Weights
    name: str = ""
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the weights.

        Raises:
            StabilityProbeError: if there are none, or other values among them.
        """
        return list(tensors_of(self.weights, self.path).values())


def read_source(path: Path, wanted: Wanted) -> Source:
    """The weights that are wanted of a checkpoint.

    Warns:
        UserWarning: if a trusted file is read, as this runs code from it.

    Raises:
        StabilityProbeError: if they are not there, or cannot be read.
    """
    kind = kind_of(path)
    if kind is Kind.FOLDER:
        return _read_folder(path, wanted)
    found = _read_file(path, kind, wanted.trust)
    return _pick(path, kind.value, found, wanted)


def _read_file(path: Path, kind: Kind, trust: bool) -> dict[str, Weights]:
    """All weights in a file, by name."""
    if kind is Kind.EXPORT:
        return {"": read_export(path, trust)}
    if kind is Kind.SAFETENSORS:
        from safetensors.torch import load_file

        with reading(path, "a safetensors file"):
            saved: Any = load_file(path)
    else:
        saved = read_pickle(path, kind, trust)
    found = find_weights(saved)
    if not found:
        keys = listed([str(key) for key in saved]) if isinstance(saved, Mapping) else ""
        of_keys = f" of {keys}" if keys else ""
        raise problem(path, f"holds no weights but a {type(saved).__name__}{of_keys}; "
                      "save model.state_dict()")  # fmt: skip
    return found


def _pick(path: Path, format: str, found: Mapping[str, Weights], wanted: Wanted) -> Source:
    name = choose(list(found), wanted.weights, path)
    return Source(path, format, found[name], name)


def _read_folder(folder: Path, wanted: Wanted) -> Source:
    """The weights that were asked for in a folder, or in the denoiser's part of it."""
    config_file = folder / "config.json"
    with reading(folder, "a folder"):
        files = {} if (folder / "model_index.json").exists() else weight_files(folder)
    if not files:
        part = part_of(folder, ema=wanted.weights == "ema") or part_of(folder, ema=False)
        if part is None:
            raise problem(
                folder, f"has no weights in it, nor a unet or transformer folder; {EXPECTED}"
            )
        averaged = part.name.endswith("_ema")
        return _read_folder(part, replace(wanted, weights="model") if averaged else wanted)
    config = read_json_object(config_file) if config_file.is_file() else {}
    source = _read_named(folder, files, wanted)
    if "_class_name" not in config:
        return source
    return replace(source, format="diffusers", folder=folder, config=config)


def _read_named(folder: Path, files: Mapping[str, list[Path]], wanted: Wanted) -> Source:
    """The file that was asked for, or what was asked for in one of the files."""
    if any(is_ema(name) for name in files) or wanted.weights in ("model", *files):
        name = choose(list(files), wanted.weights, folder)
        found, kind = _read_parts(files[name], wanted.trust)
        inner = "model" if wanted.weights in files else wanted.weights
        plain = next(iter(found)) if len(found) == 1 else choose(list(found), inner, folder)
        return Source(files[name][0], kind.value, found[plain], name)
    pool: dict[str, Weights] = {}
    for name, paths in files.items():
        found, kind = _read_parts(paths, wanted.trust)
        pool |= {f"{name}.{inner}".rstrip("."): value for inner, value in found.items()}
    return _pick(folder, kind.value, pool, wanted)


def _read_parts(paths: list[Path], trust: bool) -> tuple[dict[str, Weights], Kind]:
    """The weights in a file, or in the parts of one."""
    read = [(_read_file(path, kind := kind_of(path), trust), kind) for path in paths]
    if len(read) == 1:
        return read[0]
    merged: dict[str, Tensor] = {}
    for path, (found, _) in zip(paths, read, strict=True):
        merged |= tensors_of(found[choose(list(found), "model", path)], path)
    return {"": merged}, read[0][1]
