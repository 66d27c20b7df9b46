"""The package without the run-time type checks that the tests put around its functions.

`torch.compile` would trace the checks too, which is slow and not what a user's model is.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch


@contextmanager
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin and end with nothing compiled, and without what `torch.compile` cannot trace."""
    torch.compiler.reset()
    without_type_checks(monkeypatch)
    yield
    torch.compiler.reset()


def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the plain functions of models, skips and probes back, in classes and modules."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(
            tuple(f"stability_probe.{p}" for p in ("models", "skips", "probes"))
        ):
            continue
        owners = [v for v in vars(module).values() if getattr(v, "__module__", "") == name]
        for owner in (module, *(v for v in owners if isinstance(v, type))):
            for attribute, value in list(vars(owner).items()):
                plain = _plain(value)
                if plain is not value:
                    monkeypatch.setattr(owner, attribute, plain)


def _plain(value: Any) -> Any:
    if isinstance(value, property) and value.fget is not None:
        plain = _plain(value.fget)
        return value if plain is value.fget else property(plain)
    return inspect.unwrap(value, stop=_is_own) if isinstance(value, FunctionType) else value


def _is_own(function: Any) -> bool:
    """Whether a function is no layer that the checks have added (other decorators stay)."""
    file = function.__code__.co_filename
    return "jaxtyping" not in file and "beartype" not in file
