"""Taps: where a tensor of a running module can be seen, and replaced.

A tap names a place in a module's calls, such as "the argument `skip` of `out_blocks.0`", without
holding the module, so it can be compared, printed and stored. `attach` puts a function there.
Hooks are objects, not closures, so that a deep copy of a model copies what they refer to.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stability_probe.errors import StabilityProbeError

TensorFn = Callable[[Tensor], Tensor | None]
"""Called with the tensor at a tap; a tensor that it returns takes the place of the first."""


@runtime_checkable
class Tap(Protocol):
    """A place where a tensor passes."""

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> RemovableHandle:
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
    """The output of a module.

    Attributes:
        module: dotted path of the module; "" is the model itself.
    """

    module: str

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> RemovableHandle:
        """See `Tap.attach`."""
        module = _submodule(model, self.module)
        return module.register_forward_hook(_OutputHook(fn), prepend=first)


@dataclass(frozen=True)
class ArgumentTap:
    """An argument of a module's call, passed by position or by name.

    Attributes:
        module: dotted path of the module.
        argument: the parameter's name in the module's `forward`.
        item: which item, counted from the end (-1 is the last), if the argument is a tuple.
    """

    module: str
    argument: str
    item: int | None = None

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> RemovableHandle:
        """See `Tap.attach`."""
        module = _submodule(model, self.module)
        names = list(inspect.signature(module.forward).parameters)
        if self.argument not in names:
            raise StabilityProbeError(
                f"tap on {self.module!r}: its forward has no parameter {self.argument!r} "
                f"(it has {', '.join(names)}); was the skip found on another model?"
            )
        hook = _ArgumentHook(fn, self.argument, names.index(self.argument), self.item)
        return module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)


@dataclass(frozen=True)
class SliceTap:
    """A part of a tensor that another tap sees; it can be looked at, not replaced.

    Attributes:
        whole: the tap of the whole tensor.
        dim: the dimension that is cut.
        length: how many leading entries of it belong to the part.
    """

    whole: OutputTap | ArgumentTap
    dim: int
    length: int

    def attach(self, model: nn.Module, fn: TensorFn, *, first: bool = False) -> RemovableHandle:
        """See `Tap.attach`; what `fn` returns is not used."""
        return self.whole.attach(model, _SliceHook(fn, self.dim, self.length), first=first)


@dataclass
class _OutputHook:
    fn: TensorFn

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        new = self.fn(first_tensor(output))
        return None if new is None else _with_first_tensor(output, new)


@dataclass
class _ArgumentHook:
    fn: TensorFn
    name: str
    position: int
    item: int | None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        by_name = self.name in kwargs
        value = kwargs[self.name] if by_name else args[self.position]
        new: Any = self.fn(value if self.item is None else value[self.item])
        if new is None:
            return None
        if self.item is not None:
            place = self.item % len(value)
            new = (*value[:place], new, *value[place + 1 :])
        if by_name:
            return args, {**kwargs, self.name: new}
        return (*args[: self.position], new, *args[self.position + 1 :]), kwargs


@dataclass
class _SliceHook:
    fn: TensorFn
    dim: int
    length: int

    def __call__(self, whole: Tensor) -> None:
        self.fn(whole.narrow(self.dim, 0, self.length))


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise StabilityProbeError(
            f"tap on {path!r}: {type(model).__name__} has no such module; "
            "was the skip found on another model, or on a wrapped one?"
        ) from error


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
    if isinstance(output, Tensor):
        return output
    for item in _items(output):
        if isinstance(item, Tensor):
            return item
    raise StabilityProbeError(f"no tensor found in an output of type {type(output).__name__}")


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
