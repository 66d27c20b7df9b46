"""The data flow of one forward pass: which function calls the main input goes through, and where.

`trace` runs a model once and returns a `Flow`: a graph whose nodes are the function calls that the
main input reaches, seen through a `TorchFunctionMode`, in-place ones included. What cannot be seen
into (a scripted module, a custom kernel) becomes one opaque node. Nothing of the pass is kept but
the graph: tensors are followed by weak references.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.flow import Call, Flow, MergeCall
from stability_probe.skips.merges import Merge, as_merge, function_name, running, tensors_in

PRODUCTS = {"mul", "mul_", "multiply", "__mul__", "__imul__", "__rmul__"}
_QUOTIENTS = {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"}
_NEGATIONS = {"neg", "neg_", "negative", "negative_", "__neg__"}
_SAME_VALUES = {
    *("__getitem__", "narrow", "clone", "contiguous", "detach", "to", "float", "type"),
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "chunk", "split"),
}
"""Functions whose results are their input's values, rearranged or cut."""
_DESCRIPTIONS = {
    getattr(Tensor, name) for name in ("shape", "dtype", "device", "_version", "ndim", "is_cuda")
}
_LIKE_FIRST = {"type_as", "expand_as", "view_as", "reshape_as", "to"}
"""Functions that take nothing but type or shape from their later arguments."""

_Given = tuple[Tensor, int | None, int]
"""A tensor that a function takes, its node, and its version before the call."""


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Flow:
    """Run a model once and follow its main input, the first tensor of the arguments.

    Raises:
        StabilityProbeError: if no argument is a floating-point tensor.
    """
    x = next(tensors_in((args, kwargs)), None)
    if x is None:
        raise StabilityProbeError(
            f"find_skips: {type(model).__name__} needs an example input with a tensor in it, "
            "as in find_skips(model, x, t); got none"
        )
    tracer = _Tracer(model)
    with torch.no_grad(), tracer.watching(x):
        model(*args, **kwargs)
    return tracer.flow


class _Tracer(TorchFunctionMode):
    """Builds a `Flow` from the function calls and module calls of a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.flow = Flow()
        self._node_of = WeakTensorKeyDictionary()  # tensor to (node, version)
        self._written: dict[int, tuple[StorageWeakRef, int]] = {}  # storage to its last writer
        self._open: list[int] = []
        self._calls_of: dict[str, int] = {}
        self._merges: dict[tuple[int, str, int], int] = {}
        self._functions = 0
        self._functions_before: list[int] = []

    @contextmanager
    def watching(self, x: Tensor) -> Iterator[None]:
        """Follow `x` through everything that runs in the block."""
        with ExitStack() as stack:
            modules = dict(self.model.named_modules())
            scripted: dict[nn.Module, str] = {
                m: path for path, m in modules.items() if isinstance(m, torch.jit.ScriptModule)
            }
            self._watch_scripted(scripted, stack)
            for path, module in modules.items():
                if module in scripted:
                    continue
                enter, leave = partial(self._enter, path), self._leave
                hooks = (
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, always_call=True),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
            self._start(x)
            stack.enter_context(self)
            yield

    def _watch_scripted(self, path_of: Mapping[nn.Module, str], stack: ExitStack) -> None:
        """Follow the calls of scripted modules, which take no hooks, by hooks on every module."""

        def enter(module: nn.Module, args: Any) -> None:
            if module in path_of:
                self._enter(path_of[module], module, args, {})

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if module in path_of:
                self._leave(module, args, output)

        if path_of:
            stack.callback(register_module_forward_pre_hook(enter).remove)
            stack.callback(register_module_forward_hook(leave, always_call=True).remove)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and note it if it takes something that the main input reached."""
        kwargs = kwargs or {}
        name = function_name(func)
        if not self._open or (name == "__get__" and func.__self__ in _DESCRIPTIONS):
            return func(*args, **kwargs)
        self._functions += 1
        merge = as_merge(func, args, kwargs)
        place = (
            self._place(merge) if merge else None
        )  # numbered whether the input reaches it or not
        given = [(t, self._find(t), _version(t)) for t in tensors_in((args, kwargs))]
        result = func(*args, **kwargs)
        if name in _LIKE_FIRST:
            given = given[:1]
        if all(node is None for _, node, _ in given) or _takes_no_values(name):
            return result
        written = [t for t, _, version in given if version != _version(t)]
        made = [t for t in tensors_in(result) if not any(t is old for old, _, _ in given)]
        if written or made:
            joined = _describe(merge, given, place) if merge and place else None
            factor = _factor(name, args, kwargs)
            self._note(name, factor, given, (*written, *made), joined)
        return result

    def _start(self, x: Tensor) -> None:
        self.flow.add(
            function="input", parents=frozenset(), carriers=frozenset(), depth=0, call=0,
            shape=tuple(x.shape), parametric=False,
        )  # fmt: skip
        self._node_of[x] = (0, _version(x))

    def _note(
        self,
        name: str,
        factor: float | None,
        given: list[_Given],
        results: tuple[Tensor, ...],
        merge: MergeCall | None,
    ) -> None:
        """Add the node of a function call, and let its results point to it."""
        parents = {node for _, node, _ in given if node is not None}
        own = any(True for _ in self._module(self._open[-1]).parameters(recurse=False))
        parametric = own or any(isinstance(t, nn.Parameter) for t, _, _ in given)
        full = {n for t, n, _ in given if n is not None and t.shape == results[0].shape}
        carriers = self._carriers(parents, full) if name in PRODUCTS else parents
        about = {"parametric": parametric, "factor": factor, "merge": merge}
        index = self._add(name, parents, carriers, results[0], **about)
        for t in results:
            self._point(t, index, written=any(t is old for old, _, _ in given))

    def _carriers(self, parents: set[int], full: set[int]) -> set[int]:
        """Which factors of a product are its content; `full` are those of the product's shape."""
        content = full or parents
        least = min(self.flow.nodes[node].depth for node in content)
        return {node for node in content if self.flow.nodes[node].depth == least}

    def _add(
        self, name: str, parents: set[int], carriers: set[int], result: Tensor, **about: Any
    ) -> int:
        return self.flow.add(
            function=name,
            parents=frozenset(parents),
            carriers=frozenset(carriers),
            depth=1 + max(self.flow.nodes[node].depth for node in carriers),
            call=self._open[-1],
            shape=tuple(result.shape),
            **about,
        )

    def _place(self, merge: Merge) -> tuple[int, int, str]:
        """The line of a merge, its number on that line in this call, and the line's file."""
        _, line, file = running(sys._getframe(2))
        key = (self._open[-1], merge.kind, line)
        self._merges[key] = self._merges.get(key, -1) + 1
        return line, self._merges[key], file

    def _point(self, tensor: Tensor, node: int, *, written: bool) -> None:
        self._node_of[tensor] = (node, _version(tensor))
        if written:
            reference = StorageWeakRef(tensor.untyped_storage())
            self._written[reference.cdata] = (reference, node)

    def _find(self, tensor: Tensor) -> int | None:
        """The node whose result a tensor holds now; it may have been written through another."""
        known: tuple[int | None, int] = self._node_of.get(tensor, (None, 0))
        node, version = known
        if node is not None and version == _version(tensor):
            return node
        try:
            storage = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse tensors have none
            return node
        reference, writer = self._written.get(storage, (None, None))
        alive = reference is not None and not reference.expired()
        found: int | None = writer if alive else node
        return found

    def _module(self, call: int) -> nn.Module:
        return self.model.get_submodule(self.flow.calls[call].path)

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(
            index=len(self.flow.calls),
            path=path,
            type_name=_type_name(module),
            parent=self._open[-1] if self._open else -1,
            number=self._calls_of.get(path, 0),
            entered=len(self.flow.nodes),
        )
        self._calls_of[path] = call.number + 1
        call.arguments = {
            place: node
            for place, value in _arguments(module, args, kwargs)
            if isinstance(value, Tensor) and (node := self._find(value)) is not None
        }
        self.flow.calls.append(call)
        self._open.append(call.index)
        self._functions_before.append(self._functions)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.flow.calls[self._open[-1]]
        saw_nothing = self._functions == self._functions_before.pop()  # what follows is seen too
        results = list(tensors_in(output))
        unseen = [t for t in results if self._find(t) is None and t.is_floating_point()]
        given = (self._find(t) for t in tensors_in(args))
        parents = {*call.arguments.values(), *(node for node in given if node is not None)}
        if parents and unseen and saw_nothing:
            node = self._add("opaque", parents, parents, unseen[0], parametric=True)
            for t in unseen:
                self._point(t, node, written=False)
        nodes = [self._find(t) for t in results]
        call.outputs = [-1 if node is None else node for node in nodes]
        call.left = len(self.flow.nodes)
        self._open.pop()


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, int | None], Any]]:
    """The arguments of a call by name; items of a tuple or list by their place from its end."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return
    kinds = bound.signature.parameters
    for name, value in bound.arguments.items():
        if kinds[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        yield (name, None), value
        if isinstance(value, tuple | list):
            for place, item in enumerate(value):
                yield (name, place - len(value)), item


def _type_name(module: nn.Module) -> str:
    """The class of a module, also of one that comes from an exported graph."""
    original: Callable[[], str] | None = getattr(module, "type_name", None)
    if callable(original):
        return str(original())
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _describe(merge: Merge, given: list[_Given], place: tuple[int, int, str]) -> MergeCall:
    node_of = {id(t): -1 if node is None else node for t, node, _ in given}
    operands = tuple((node_of[id(t)], tuple(t.shape)) for t in merge.operands)
    return MergeCall(merge.kind, operands, merge.factors, merge.dim, *place)


def _factor(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    """What a function multiplies its one carried operand by, if it does nothing else."""
    if name == "pad":
        return 1.0 if _pads_with_zeros(*args, **kwargs) else None
    if name in _SAME_VALUES:
        return 1.0
    if name in _NEGATIONS:
        return -1.0
    if name not in PRODUCTS | _QUOTIENTS or len(args) != 2 or kwargs:
        return None
    numbers = [v for v in args if isinstance(v, int | float) or v.numel() == 1]
    if len(numbers) != 1 or (name in _QUOTIENTS and numbers[0] is not args[1]):
        return None
    number = float(numbers[0])
    if name in PRODUCTS:
        return number
    return 1 / number if number else None


def _pads_with_zeros(
    input: Any, pad: Any, mode: str = "constant", value: float | int | None = None
) -> bool:
    return mode == "constant" and not value


def _takes_no_values(name: str) -> bool:
    """Whether a function takes only shape and type from its tensors."""
    return name.endswith("_like") or name.startswith("new_") or name in ("size", "dim", "numel")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
