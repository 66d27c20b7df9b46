"""The tap for a merge that no module boundary shows: inside a module's own `forward`.

While that module runs, a `TorchFunctionMode` sees its function calls, and the operands of the merge
that is meant, told by the line of code that makes it, can be looked at and replaced. It works in
any Python code, but not under `torch.compile`: such a module runs uncompiled.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.merges import as_merge, running
from stability_probe.skips.taps import (
    Attached,
    CallCounter,
    Handle,
    TensorFn,
    count_calls,
    is_untapped,
    stays_behind,
    submodule,
)


@dataclass(frozen=True)
class OperandTap:
    """An operand of a merge, or its result.

    Attributes:
        module: dotted path of the module in whose `forward` the merge is made.
        kind: `"concat"` or `"add"`.
        line: the line of code that makes it; 0 if the module's code is not its own.
        ordinal: how many merges of this kind the same line made before it in the same call.
        operand: which operand; `None` is the result.
        call: which of the module's calls in one pass of the model; `None` is every one.
    """

    module: str
    kind: Literal["concat", "add"]
    line: int
    ordinal: int
    operand: int | None
    call: int | None = None

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> Handle:
        """See `Tap.attach`."""
        module = submodule(model, self.module)
        watched = module.__dict__.get("forward")
        if not isinstance(watched, _WatchedForward):
            watched = _WatchedForward(module)
            module.__dict__["forward"] = watched
        with ExitStack() as stack:
            counter = count_calls(model, self.module, self.call, stack)
            site = _Site(self, fn, counter, last=stays_behind(fn, first))
            watched.sites.insert(0 if first else len(watched.sites), site)
            watched.sites.sort(key=lambda site: site.last)
            stack.callback(watched.drop, site)
            return Attached(stack.pop_all())


@dataclass(eq=False)
class _Site:
    """A tap and what it calls."""

    tap: OperandTap
    fn: TensorFn
    counter: CallCounter | None
    last: bool

    @property
    def on(self) -> bool:
        """Whether this call of the module is meant."""
        return not is_untapped() and (self.counter is None or self.counter.now)


class _WatchedForward:
    """Stands for the `forward` of a module, and watches the merges that it makes.

    Attributes:
        module: the module.
        inner: a `forward` that had been put on the instance before, or `None`.
        sites: the taps.
        running: what watches the calls that run now, innermost last: a hook may call the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Callable[..., Any] | None = module.__dict__.get("forward")
        self.sites: list[_Site] = []
        self.running: list[_Watching] = []

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward it stands for: taps look arguments up by name."""
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Callable[..., Any]:
        return self.inner or partial(type(self.module).forward, self.module)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward.

        Raises:
            StabilityProbeError: if a merge that is watched was not made.
        """
        watching = _Watching(self, [site for site in self.sites if site.on])
        self.running.append(watching)
        try:
            with watching:
                output = self._forward(*args, **kwargs)
        finally:
            self.running.pop()
        for site in watching.sites:
            if site not in watching.reached:
                raise StabilityProbeError(
                    f"tap on {site.tap.module!r}: {type(self.module).__name__} took another path "
                    f"than when its skips were found (no {site.tap.kind} at line {site.tap.line})"
                )
        return output

    def drop(self, site: _Site) -> None:
        """Forget a tap, and with the last one give the module its own forward back."""
        self.sites.remove(site)
        if self.sites or self.module.__dict__.get("forward") is not self:
            return
        del self.module.__dict__["forward"]
        if self.inner is not None:
            self.module.__dict__["forward"] = self.inner


class _Watching(TorchFunctionMode):
    """Sees the function calls of one call of a module."""

    def __init__(self, watched: _WatchedForward, sites: list[_Site]) -> None:
        super().__init__()
        self.watched, self.sites = watched, sites
        self.reached: list[_Site] = []
        self._count: dict[tuple[str, int], int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, with the operands that the taps give it."""
        kwargs = kwargs or {}
        merge = as_merge(func, args, kwargs)
        if merge is None or self.watched.running[-1] is not self:
            return func(*args, **kwargs)
        module, line, _ = running(sys._getframe(1))
        if module is not self.watched.module:
            return func(*args, **kwargs)
        key = (merge.kind, line)
        self._count[key] = self._count.get(key, -1) + 1
        place = (*key, self._count[key])
        here = [s for s in self.sites if (s.tap.kind, s.tap.line, s.tap.ordinal) == place]
        self.reached += here
        for site in here:
            if site.tap.operand is not None:
                new = site.fn(merge.operands[site.tap.operand])
                if new is not None:
                    merge = merge.replacing(site.tap.operand, new)
        result = func(*merge.args, **merge.kwargs)
        for site in here:
            if site.tap.operand is None:
                new = site.fn(result)
                result = result if new is None else new
        return result
