"""Taps: where a tensor of a running module can be seen, and replaced.

A tap names a place in a module's calls, such as "the argument `skip` of `out_blocks.0`", without
holding the module, so it can be compared, printed and stored. `attach` puts a function there.
Hooks are objects, not closures, so that a deep copy of a model copies what they refer to.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.compiled import forget_compiled

TensorFn = Callable[[Tensor], Tensor | None]
"""Called with the tensor at a tap; a tensor that it returns takes the place of the first."""


_HERE = threading.local()
"""`bare` while this thread runs models so; `torch.compile` cannot follow a `ContextVar`."""


@contextmanager
def untapped() -> Iterator[None]:
    """Run models as their own code has them: nothing that is attached to a tap is called."""
    before, _HERE.bare = is_untapped(), True
    try:
        yield
    finally:
        _HERE.bare = before


def is_untapped() -> bool:
    """Whether models run so now."""
    return bool(getattr(_HERE, "bare", False))


class Observer:
    """A function for a tap that looks and changes nothing.

    Unless it was attached as the first, it stays behind what is attached later and may change the
    tensor.
    """

    def __call__(self, tensor: Tensor) -> None:
        """The tensor passes."""
        raise NotImplementedError


@runtime_checkable
class Handle(Protocol):
    """What undoes an attachment."""

    def remove(self) -> None:
        """Undo it."""


@runtime_checkable
class Tap(Protocol):
    """A place where a tensor passes."""

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> Handle:
        """Call `fn` whenever the tensor passes.

        Args:
            model: the module that the tap's paths are relative to.
            fn: what to call; a returned tensor replaces the one that passes.
            first: run before what is attached already instead of after it.

        Returns:
            A handle whose `remove()` undoes it.
        """
        ...


@dataclass(frozen=True)
class OutputTap:
    """The output of a module, or its first tensor.

    Attributes:
        module: dotted path of the module; "" is the model itself.
        call: which of its calls in one pass of the model, from 0; `None` is every one.
    """

    module: str
    call: int | None = None

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> Handle:
        """See `Tap.attach`."""
        module = submodule(model, self.module)
        with ExitStack() as stack:
            counter = count_calls(model, self.module, self.call, stack)
            hook = _OutputHook(fn, counter, last=stays_behind(fn, first))
            stack.callback(module.register_forward_hook(hook, prepend=first).remove)
            _last_ones_last(module._forward_hooks)
            return Attached(stack.pop_all())


@dataclass(frozen=True)
class ArgumentTap:
    """An argument of a module's call, passed by position or by name.

    Attributes:
        module: dotted path of the module.
        argument: the parameter's name in the module's `forward`.
        item: which item, counted from the end (-1 is the last), if the argument is a tuple.
        call: which of the module's calls in one pass of the model; `None` is every one.
    """

    module: str
    argument: str
    item: int | None = None
    call: int | None = None

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> Handle:
        """See `Tap.attach`."""
        module = submodule(model, self.module)
        names = list(inspect.signature(module.forward).parameters)
        if self.argument not in names:
            raise StabilityProbeError(
                f"tap on {self.module!r}: its forward has no parameter {self.argument!r} "
                f"(it has {', '.join(names)}); was the skip found on another model?"
            )
        with ExitStack() as stack:
            hook = _ArgumentHook(fn, self, names.index(self.argument), stays_behind(fn, first))
            handle = module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)
            stack.callback(handle.remove)
            _last_ones_last(module._forward_pre_hooks)
            # A call is counted before the hook asks for its number, even if it is the first.
            hook.counter = count_calls(model, self.module, self.call, stack)
            return Attached(stack.pop_all())


@dataclass(frozen=True)
class SliceTap:
    """A part of a tensor that another tap sees.

    Attributes:
        whole: the tap of the whole tensor.
        dim: the dimension that is cut.
        length: how many entries of it belong to the part.
        start: the first of them.
    """

    whole: Tap
    dim: int
    length: int
    start: int = 0

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> Handle:
        """See `Tap.attach`."""
        return self.whole.attach(model, _SliceHook(fn, self), first=first)

    def cut(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor."""
        return whole.narrow(self.dim, self.start, self.length)

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """A whole tensor with another part."""
        end = self.start + self.length
        before = whole.narrow(self.dim, 0, self.start)
        after = whole.narrow(self.dim, end, whole.shape[self.dim] - end)
        return torch.cat([before, part, after], dim=self.dim)


def stays_behind(fn: TensorFn, first: bool) -> bool:
    """Whether a function has to see what those make of a tensor that are attached later."""
    return isinstance(fn, Observer) and not first


def _last_ones_last(hooks: dict[int, Any]) -> None:
    """Move those hooks to the end that stay behind the others."""
    for number in [number for number, hook in hooks.items() if getattr(hook, "last", False)]:
        hooks[number] = hooks.pop(number)


@dataclass
class _OutputHook:
    fn: TensorFn
    counter: "CallCounter | None"
    last: bool

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if is_untapped() or (self.counter is not None and not self.counter.now):
            return None
        new = self.fn(first_tensor(output))
        return None if new is None else _with_first_tensor(output, new)


@dataclass
class _ArgumentHook:
    fn: TensorFn
    tap: ArgumentTap
    position: int
    last: bool
    counter: "CallCounter | None" = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_untapped() or (self.counter is not None and not self.counter.now):
            return None
        name, item = self.tap.argument, self.tap.item
        by_name = name in kwargs
        if not by_name and self.position >= len(args):
            raise StabilityProbeError(
                f"tap on {self.tap.module!r}: its argument {name!r} was not passed in this call"
            )
        value = kwargs[name] if by_name else args[self.position]
        new: Any = self.fn(value if item is None else value[item])
        if new is None:
            return None
        if item is not None:
            place = item % len(value)
            new = type(value)([*value[:place], new, *value[place + 1 :]])
        if by_name:
            return args, {**kwargs, name: new}
        return (*args[: self.position], new, *args[self.position + 1 :]), kwargs


@dataclass
class _SliceHook:
    fn: TensorFn
    tap: SliceTap

    def __call__(self, whole: Tensor) -> Tensor | None:
        part = self.tap.cut(whole)
        new = self.fn(part)
        return None if new is None or new is part else self.tap.put(whole, new)


class CallCounter:
    """Tells the calls of a module within one pass of the model apart.

    A pass may run inside another one, when a hook calls the model: each has its own count.
    """

    def __init__(self, path: str, call: int) -> None:
        self.path, self.call = path, call
        self.counts: list[int] = []  # of the passes that are running, innermost last

    @property
    def now(self) -> bool:
        """Whether the call that runs is the one that is waited for.

        Raises:
            StabilityProbeError: outside a pass of the model, where calls cannot be told apart.
        """
        if not self.counts:
            raise StabilityProbeError(
                f"tap on {self.path!r}: the module is called several times in a pass, and now "
                "outside one (by gradient checkpointing?), so that its calls cannot be told apart"
            )
        return self.counts[-1] == self.call

    def begin(self, model: nn.Module, args: Any) -> None:
        """A pass of the model begins."""
        self.counts.append(-1)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """It has ended, or failed."""
        if self.counts:
            self.counts.pop()

    def advance(self, module: nn.Module, args: Any) -> None:
        """The module is called."""
        if self.counts:
            self.counts[-1] += 1


def count_calls(
    model: nn.Module, path: str, call: int | None, stack: ExitStack
) -> CallCounter | None:
    """Put a counter of a module's calls into a model; `stack` takes it out again.

    Returns:
        The counter, or `None` if every call is meant.
    """
    if call is None:
        return None
    counter = CallCounter(path, call)
    for hook in (
        model.register_forward_pre_hook(counter.begin, prepend=True),
        model.register_forward_hook(counter.end, always_call=True),
        submodule(model, path).register_forward_pre_hook(counter.advance, prepend=True),
    ):
        stack.callback(hook.remove)
    return counter


class Attached:
    """What a tap has put into a model, and how it is undone.

    `torch.compile` does not look for hooks that come or go after it has compiled a module, so what
    is compiled by then is discarded; it is compiled again at the next call. Hooks that come and go
    while models run `eagerly` leave it as it is.
    """

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo
        forget_compiled()

    def remove(self) -> None:
        """Take all hooks out."""
        self._undo.close()
        forget_compiled()


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        StabilityProbeError: if there is none, or it is scripted.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise StabilityProbeError(
            f"tap on {path!r}: {type(model).__name__} has no such module; "
            "was the skip found on another model, or on a wrapped one?"
        ) from error
    if isinstance(module, torch.jit.ScriptModule):
        raise StabilityProbeError(
            f"tap on {path!r}: it is scripted, and takes no hooks; use the module that it was "
            "scripted from"
        )
    return module


def bound_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call in the order of the signature, by position where they can be.

    >>> bound_arguments(nn.Linear(1, 1), (), {"input": 3})
    ((3,), {})
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return bound.args, bound.kwargs


def first_tensor(output: Any) -> Tensor:
    """The output itself, or the first tensor of a tuple, list, dict or dataclass.

    Raises:
        StabilityProbeError: if there is none.
    """
    for tensor in tensors_of(output):
        return tensor
    raise StabilityProbeError(f"no tensor found in an output of type {type(output).__name__}")


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The output itself, or the tensors of a tuple, list, dict or dataclass."""
    items = (output,) if isinstance(output, Tensor) else _items(output)
    return (item for item in items if isinstance(item, Tensor))


def _items(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    if is_dataclass(output):
        return vars(output).values()
    return output if isinstance(output, tuple | list) else ()


def _with_first_tensor(output: Any, new: Tensor) -> Any:
    """A copy of an output in which `new` stands for its first tensor."""
    if isinstance(output, Tensor):
        return new
    old = first_tensor(output)
    if isinstance(output, tuple):
        items = [new if item is old else item for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
    changed = copy.copy(output)
    if is_dataclass(output) and not isinstance(output, Mapping):
        name = next(name for name, item in vars(output).items() if item is old)
        object.__setattr__(changed, name, new)
        return changed
    keys = output.keys() if isinstance(output, Mapping) else range(len(output))
    changed[next(key for key in keys if output[key] is old)] = new
    return changed
