"""Folders of weights: what is in them, and what a diffusers folder says of its model.

    a model saved by diffusers     config.json with _class_name, diffusion_pytorch_model.*
    a pipeline saved by diffusers  model_index.json; its unet/ or transformer/ is taken
    accelerate, training scripts   model.safetensors, pytorch_model.bin, nnet.pth, nnet_ema.pth, ...

Large weights are stored in parts with an index. Nothing is downloaded: a folder is all there is.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stability_probe.checkpoints.reading import listed, problem, read_json_object, reading
from stability_probe.checkpoints.state import is_other

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
PARTS = ("unet", "transformer", "unet_ema", "transformer_ema")
"""Folders of a pipeline, or of a diffusers training script, that hold a denoiser."""

LARGEST_SETTING = 2**24
_SHARD = re.compile(r"-\d{5}-of-\d{5}(\..+)?$")
_INDEX = re.compile(r"(.+)\.(?:safetensors|bin)\.index(\..+)?\.json")


def weight_files(folder: Path) -> dict[str, list[Path]]:
    """The weights in a folder by name: one file each, or the parts that an index lists.

    Raises:
        StabilityProbeError: if an index is damaged or leads elsewhere.
    """
    found: dict[str, list[Path]] = {}
    with reading(folder, "a folder"):
        files = sorted(file for file in folder.iterdir() if file.is_file())
    for suffix in SUFFIXES:  # the first suffix wins: the same weights are often stored twice
        for file in files:
            index = _INDEX.fullmatch(file.name)
            if index and f"{suffix}.index" in file.name:
                found.setdefault(index[1] + (index[2] or ""), _shards(file))
            elif file.suffix == suffix and not _SHARD.search(file.stem):
                found.setdefault(file.stem, [file])
    return {name: paths for name, paths in found.items() if not is_other(name)}


def part_of(folder: Path, ema: bool) -> Path | None:
    """The sub-folder that holds the denoiser, if there is one.

    Raises:
        StabilityProbeError: if there are several.
    """
    with reading(folder, "a folder"):
        parts = [folder / name for name in PARTS if (folder / name / "config.json").is_file()]
    wanted = [part for part in parts if part.name.endswith("_ema") is ema]
    if len(wanted) > 1:
        raise problem(folder, f"has {listed([p.name for p in wanted])}; give one of these folders")
    return wanted[0] if wanted else None


def diffusers_class(folder: Path, config: Mapping[str, Any]) -> Any:
    """The class that a `config.json` names.

    Raises:
        StabilityProbeError: if diffusers has no model of that name, or a size is absurd.
    """
    file, name = folder / "config.json", config["_class_name"]
    import diffusers  # seconds to import, and most checkpoints do not need it

    with reading(file, "a model's configuration"):
        if absurd := [str(k) for k, v in config.items() if not _sane(v)]:
            raise problem(file, f"{listed(absurd)} holds a number above {LARGEST_SETTING}; damaged")
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise problem(file, f"_class_name must be a model of diffusers {diffusers.__version__}, "
                      f"got {str(name)[:80]!r}; give its factory")  # fmt: skip
    return found


def diffusers_builder(folder: Path, config: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A function that builds the model which a folder's `config.json` describes."""
    found = diffusers_class(folder, config)
    return lambda: found.from_config(dict(config))


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, each once."""
    table = read_json_object(index).get("weight_map")
    names = table.values() if isinstance(table, Mapping) else []
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise problem(index, "weight_map must give a file of the same folder for each tensor")
    shards = [index.parent / name for name in dict.fromkeys(names)]
    with reading(index, "an index"):
        if absent := [shard.name for shard in shards if not shard.is_file()]:
            raise problem(index, f"lists {listed(absent)}, and no such file is in its folder")
    return shards


def _sane(value: Any) -> bool:
    """Whether all numbers in a setting could be sizes of a model."""
    if isinstance(value, Mapping):
        return all(map(_sane, value.values()))
    if isinstance(value, list):
        return all(map(_sane, value))
    return not isinstance(value, int) or abs(value) <= LARGEST_SETTING
