"""What type every field of `run.json` has: people edit it, and programs of their own write it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stability_probe.errors import StabilityProbeError

TEXT, NUMBER, INTEGER = "a text", "a number", "an integer"
SEED, DTYPE = "a number or a text", "float32, float64, bfloat16 or float16"

_KINDS: dict[str, Callable[[Any], bool]] = {
    TEXT: lambda v: isinstance(v, str),
    NUMBER: lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    INTEGER: lambda v: isinstance(v, int) and not isinstance(v, bool),
    SEED: lambda v: isinstance(v, int | float | str),
    DTYPE: lambda v: v in ("float32", "float64", "bfloat16", "float16"),
}

FIELDS: dict[str, Any] = {
    "state": TEXT, "reason": (TEXT, None), "resumed": [INTEGER],
    "config": {}, "probing": ({}, None), "probe_settings": ({}, None), "versions": {},
    "kind": TEXT, "scheme": (TEXT, None), "seed": (SEED, None), "parameters": INTEGER,
    "kappa": ([NUMBER], None), "unmet": (TEXT, None), "block_gain": NUMBER, "input": ({}, None),
    "skips": [{"source": TEXT, "sink": TEXT, "merge": TEXT, "kappa": (NUMBER, None)}],
    "noise_levels": ([NUMBER], None), "device": TEXT, "dtype": DTYPE,
    "global_constants": {"refused": TEXT, "lip_a": [NUMBER], "lip_b": [NUMBER], "kappa": [NUMBER],
                         "l0": NUMBER},
    "probe": {"*": NUMBER},
}  # fmt: skip
"""Fields by name. A list is one of such entries, a mapping an object with such fields if it has
them (`*`: all), and a pair with `None` may be null. What is not named here may be anything."""


def refuse_wrong_types(file: Path, info: Mapping[str, Any]) -> None:
    """Check the fields of a `run.json`; none of them has to be there.

    Raises:
        StabilityProbeError: if one is of another type; the message names it.

    >>> refuse_wrong_types(Path("run.json"), {"skips": [{"kappa": 1.0}, {"kappa": "x"}]})
    Traceback (most recent call last):
    ...
    stability_probe.errors.StabilityProbeError: run.json: `skips[1].kappa`: a number is needed, \
got "x"
    """
    problem = _problem("", info, FIELDS)
    if problem:
        raise StabilityProbeError(f"{file}: {problem}")


def _problem(name: str, value: Any, wanted: Any) -> str:
    """What is wrong with a field; empty if nothing is."""
    if isinstance(wanted, tuple):
        return "" if value is None else _problem(name, value, wanted[0])
    if isinstance(wanted, str):
        return "" if _KINDS[wanted](value) else _needed(name, wanted, value)
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return _needed(name, "a list", value)
        inner = [(f"{name}[{i}]", entry, wanted[0]) for i, entry in enumerate(value)]
    else:
        if not isinstance(value, Mapping):
            return _needed(name, "an object", value)
        of_all = dict.fromkeys(value, wanted["*"]) if "*" in wanted else wanted
        inner = [(f"{name}.{key}", value[key], of_all[key]) for key in of_all if key in value]
    return next(filter(None, (_problem(*of_one) for of_one in inner)), "")


def _needed(name: str, what: str, value: Any) -> str:
    got = json.dumps(value, ensure_ascii=False)
    got = got if len(got) <= 40 else f"{got[:40]}..."
    return f"`{name.removeprefix('.')}`: {what} is needed, got {got}"
