"""Models that `torch.compile` or other wrappers have in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_EAGER: ContextVar[bool] = ContextVar("eager", default=False)


def forget_compiled() -> None:
    """Have everything compiled again at its next call, unless models run `eagerly`."""
    if not _EAGER.get():
        torch.compiler.reset()


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled modules as they were written, and keep what is compiled for afterwards.

    Taps that are attached inside have to be removed inside.
    """
    token = _EAGER.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _EAGER.reset(token)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` returned; any other module itself."""
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and DistributedDataParallel, in any order."""
    while True:
        inside = uncompiled(model)
        if isinstance(inside, nn.parallel.DistributedDataParallel):
            inside = inside.module
        if inside is model:
            return model
        model = inside
