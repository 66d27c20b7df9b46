"""Hooks in models that `torch.compile` compiles."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from stability_probe.skips.taps import Observer

Hook = TypeVar("Hook", bound=Callable[..., Any])


def untraced(hook: Hook) -> Hook:
    """Keep `torch.compile` out of a hook: the model's graph is cut there, and the hook runs."""
    reason = (
        "the hooks of a StabilityProbe keep records, which cannot be traced; compile the model "
        "without fullgraph=True"
    )
    return cast(Hook, torch.compiler.disable(hook, reason=reason))


class Seam(Observer):
    """Lets no graph of `torch.compile` contain both the making of a tensor and uses of it.

    The gradient that flows through those uses would stay inside the graph.
    """

    def __init__(self) -> None:
        self._passed: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Seam, ()

    @untraced
    def __call__(self, tensor: Tensor) -> None:
        """The tensor passes, and a graph ends."""
        self._passed = weakref.ref(tensor)

    def hides(self, tensor: Tensor) -> bool:
        """Whether a graph may contain uses of a tensor, so that its gradient is not all there."""
        compiled = type(tensor.grad_fn).__name__ == "CompiledFunctionBackward"
        return compiled and (self._passed is None or self._passed() is not tensor)
