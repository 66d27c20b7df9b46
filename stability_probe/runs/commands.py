"""What makes a run again, as a line for a shell, as far as its `run.json` tells."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from stability_probe.runs.recording import EnsembleConfig, RecordConfig
from stability_probe.runs.training import TrainConfig

Settings = dict[str, Any]

TRAINING = (
    "scheme", "steps", "data", "model", "n_skips", "width", "batch_size", "learning_rate",
    "patch_size", "precision",
)  # fmt: skip
"""Settings of a training that `stability-probe train` takes as options, but for its seed."""
PROBING = ("every", "sensitivity_every", "probe_samples", "paths")
"""Settings of its probe that are options and that records depend on."""
CHECKPOINT = (
    "model", "model_args", "weights", "trust_pickle", "partial", "skips", "input", "kwargs",
    "noise_levels", "target", "scheme", "batch", "sensitive", "device", "dtype", "seed",
)  # fmt: skip
"""Settings of `stability-probe probe` that are options."""


def command_of(info: Mapping[str, Any], out: str) -> str | None:
    """What makes a run again in another folder; `None` if that is not known.

    Args:
        info: what its `run.json` says.
        out: the folder to make. Of random networks, the folder that holds one a scheme.
    """
    kind = info.get("kind")  # a loop of the user's own has none
    if kind == "training":
        return train_command(info, str(info.get("seed")), out)
    made = {"checkpoint": probe_command, "ensemble": ensemble_command}.get(str(kind))
    return made and made(info, out)


def train_command(info: Mapping[str, Any], seed: str, out: str) -> str | None:
    """The `train` of a run, with the options that differ from what they are by default.

    `None` if `train` did not make it, or has no options for all of its settings.

    >>> about = {"config": TrainConfig(scheme="cs:0.7", steps=7).as_dict()}
    >>> train_command(about, "3", "runs/new")
    'stability-probe train --scheme cs:0.7 --steps 7 --seed 3 --out runs/new'
    """
    config = _changed(TrainConfig, info.get("config") or {})
    probing = _changed(RecordConfig, info.get("probing") or RecordConfig().as_dict())
    if config is None or probing is None:
        return None
    if {*config} - {*TRAINING, "seed"} or {*probing} - {*PROBING, "save_every"}:
        return None
    asked = {name: v for name, v in {**config, **probing}.items() if name in TRAINING + PROBING}
    scheme = info["config"]["scheme"]
    return _line("train", {"scheme": scheme, **asked, "seed": seed, "out": out})


def _changed(cls: type[Any], given: Mapping[str, Any]) -> Settings | None:
    """Settings that are not as they are by default; `None` if some are not given."""
    defaults = {field.name: field.default for field in fields(cls)}
    if not defaults.keys() <= given.keys():
        return None
    return {name: given[name] for name, default in defaults.items() if given[name] != default}


def probe_command(info: Mapping[str, Any], out: str) -> str | None:
    """The `probe` of a checkpoint, with all its options; `None` if something else measured it."""
    config = info.get("config") or {}
    if not {"checkpoint", *CHECKPOINT} <= {*config}:
        return None
    return _line("probe", {name: config[name] for name in CHECKPOINT} | {"out": out},
                 str(config["checkpoint"]))  # fmt: skip


def ensemble_command(info: Mapping[str, Any], out: str) -> str | None:
    """A line of Python that records the random networks of a run, under its scheme.

    >>> about = {"config": vars(EnsembleConfig(networks=9)), "scheme": "ls"}
    >>> shlex.split(ensemble_command(about, "new"))[2].partition("; ")[2]
    'record_ensemble(EnsembleConfig(networks=9), ["ls"], "new")'
    """
    config = _changed(EnsembleConfig, info.get("config") or {})
    if config is None or "scheme" not in info:
        return None
    settings = ", ".join(f"{name}={_literal(value)}" for name, value in config.items())
    code = (
        "from stability_probe.runs import EnsembleConfig, record_ensemble; "
        f"record_ensemble(EnsembleConfig({settings}), [{_literal(info['scheme'])}], "
        f"{_literal(out)})"
    )
    return shlex.join(["python", "-c", code])


def _literal(value: Any) -> str:
    """As Python has it, with quotes that a shell's need not be mixed with."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _line(command: str, options: Mapping[str, Any], *arguments: str) -> str:
    """A command line; an option that is true is a flag, one that is a list is repeated."""
    words = ["stability-probe", command, *arguments]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                words += [option, one if isinstance(one, str) else json.dumps(one)]
    return shlex.join(words)
