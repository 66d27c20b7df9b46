"""Function calls that join tensors: concatenation and addition."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

_CONCAT = {"cat", "concat", "concatenate", "hstack"}
_ADD = {
    *("add", "add_", "__add__", "__iadd__", "__radd__"),
    *("sub", "sub_", "subtract", "__sub__", "__isub__", "__rsub__", "rsub"),
    *("lerp", "lerp_", "addcmul", "addcmul_"),
}

_MODULE_FILE = nn.modules.module.__file__
_INTERPRETERS = tuple(str(Path(torch.__file__).parent / name) for name in ("fx", "export"))
_WATCHED = str(Path(__file__).with_name("operands.py"))


@dataclass(frozen=True)
class Merge:
    """A call that joins tensors.

    Attributes:
        kind: `"concat"`, or `"add"` for sums, differences and weighted sums.
        operands: the tensors, in the order in which the call names them.
        factors: what the call itself multiplies each of them by: -1 or `alpha` in sums; `None` if
            that is a tensor.
        dim: the dimension of a concatenation, from 0; 0 for a sum.
        args: the call's positional arguments.
        kwargs: its arguments by name.
    """

    kind: Literal["concat", "add"]
    operands: tuple[Tensor, ...]
    factors: tuple[float | None, ...]
    dim: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def replacing(self, position: int, new: Tensor) -> "Merge":
        """The merge with `new` as one of the operands."""
        count = -1

        def swap(value: Any) -> Any:
            nonlocal count
            if isinstance(value, Tensor):
                count += 1
                return new if count == position else value
            return [swap(item) for item in value] if isinstance(value, tuple | list) else value

        args = tuple(map(swap, self.args))
        kwargs = {name: v if name == "out" else swap(v) for name, v in self.kwargs.items()}
        operands = (*self.operands[:position], new, *self.operands[position + 1 :])
        return replace(self, operands=operands, args=args, kwargs=kwargs)


def function_name(func: Any) -> str:
    """What a function is called, without the overload that the dispatcher's functions carry.

    >>> import torch
    >>> function_name(torch.ops.aten.add.Tensor), function_name(torch.cat)
    ('add', 'cat')
    """
    return str(getattr(func, "__name__", func)).partition(".")[0]


def as_merge(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Merge | None:
    """The merge that a function call is, or `None` if it joins fewer than two tensors."""
    name = function_name(func)
    if name not in _CONCAT and name not in _ADD:
        return None
    joined = {key: value for key, value in kwargs.items() if key != "out"}
    operands = tuple(tensors_in((args, joined)))
    if len(operands) < 2:
        return None
    if name in _ADD:  # a third tensor is a weight
        return Merge("add", operands[:2], _factors(name, args, kwargs), 0, args, kwargs)
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    dim = int(dim if name != "hstack" else 1) % max(1, operands[0].ndim)
    return Merge("concat", operands, (1.0,) * len(operands), dim, args, kwargs)


def _factors(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float | None, float | None]:
    """What a sum multiplies its first two operands by."""
    if name.startswith("lerp"):  # (1 - w) first + w second
        weight = kwargs.get("weight", args[-1])
        return (None, None) if isinstance(weight, Tensor) else (1.0 - weight, float(weight))
    if name.startswith("addcmul"):
        return 1.0, None
    alpha = float(kwargs.get("alpha", 1))
    if name in ("rsub", "__rsub__"):
        return -alpha, 1.0
    return 1.0, -alpha if "sub" in name else alpha


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def running(frame: FrameType | None) -> tuple[nn.Module | None, int, str]:
    """The module whose `forward` led to a frame, the innermost one, and the line it has reached.

    The file of that line comes third. The line is 0 where a module's code is not its own (a graph
    that is interpreted).
    """
    below = frame
    while frame is not None and below is not None:
        code = frame.f_code
        called = code.co_filename == _MODULE_FILE and code.co_name in ("_call_impl", "inner")
        watched = code.co_filename == _WATCHED and code.co_name == "__call__"
        if called or watched:
            own_code = not below.f_code.co_filename.startswith(_INTERPRETERS)
            owner = frame.f_locals["self"]
            line = below.f_lineno if own_code else 0
            return owner.module if watched else owner, line, below.f_code.co_filename
        below, frame = frame, frame.f_back
    return None, 0, ""
