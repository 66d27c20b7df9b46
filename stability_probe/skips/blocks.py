"""Which block of Eq. 4 a parameter belongs to: a_i, b_i, the middle, or none of them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

from stability_probe.skips.connection import SkipConnection
from stability_probe.skips.find import evaluating
from stability_probe.skips.scaling import Scaling
from stability_probe.skips.taps import bound_arguments


@dataclass(frozen=True)
class Block:
    """A block of Eq. 4.

    Attributes:
        kind: `"a"`, `"b"`, `"mid"`, or `"other"` (embeddings of time and position, scaling gates).
        level: i of a_i and b_i; 0 for the other two.
    """

    kind: Literal["a", "b", "mid", "other"]
    level: int = 0


OTHER = Block("other")


def parameter_blocks(
    model: nn.Module, skips: Sequence[SkipConnection], *args: Any, **kwargs: Any
) -> dict[str, Block]:
    r"""The block of every parameter of a model, by the order in which modules run.

    A layer that runs between the moments when $u_{i-1}$ and $u_i$ are ready belongs to $a_i$; one
    between $u_N$ and the innermost merge to the middle; one between merges $i$ and $i - 1$ to
    $b_i$. So $a_1$ includes the input layers and $b_1$ the output layers, as in Eq. 4. Layers that
    do not see the input (embeddings of time and labels) belong with the module that holds them if
    that module's other layers all lie in one block, and to none otherwise. The gates of a scaling
    scheme belong to none.

    Args:
        model: the model; left as it was, its random state included.
        skips: its long skips.
        *args: an example input; the first tensor of all arguments is $x_t$.
        **kwargs: further arguments.

    Returns:
        A block for every name in `model.named_parameters()`.
    """
    order = _Order()
    with ExitStack() as stack, evaluating(model), torch.enable_grad():
        # Gradient checkpointing around the model would take what this pass does for training.
        stack.enter_context(saved_tensors_hooks(_itself, _itself))
        stack.enter_context(_disable_current_modes())
        for skip in skips:
            entered = Block("mid") if skip.level == len(skips) else Block("a", skip.level + 1)
            enter_decoder = skip.merged.attach(model, order.entering(Block("b", skip.level)))
            stack.callback(enter_decoder.remove)
            if skip.feature is None:  # u_i is the input: a_i is empty
                order.current = entered
                continue
            leave_encoder = skip.feature.attach(model, order.entering(entered))
            stack.callback(leave_encoder.remove)
        for name, module in model.named_modules():
            if name and any(True for _ in module.parameters(recurse=False)):
                hook = module.register_forward_hook(order.running(name), prepend=True)
                stack.callback(hook.remove)
        parameters = dict(model.named_parameters())
        sharded = any(hasattr(p, "to_local") for p in parameters.values())
        args, kwargs = bound_arguments(model, args, kwargs)
        track = _track_first_tensor(_as_seen if sharded else _as_leaf)
        args, kwargs = tuple(map(track, args)), {name: track(v) for name, v in kwargs.items()}
        if sharded:
            _pass_of_sharded(model, args, kwargs)
        else:
            detached = {name: p.detach() for name, p in parameters.items()}
            functional_call(model, detached, args, kwargs)
    gates = {name for name, module in model.named_modules() if isinstance(module, Scaling)}
    blocks = {}
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        inside_gate = any(f"{module}.".startswith(f"{gate}.") for gate in gates)
        blocks[name] = OTHER if inside_gate else _block_of(module, order.block_of)
    return blocks


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _Seen(Tensor):
    """A tensor that depends on the input: what is made of one is one."""


def _as_seen(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(_Seen)


def _as_leaf(tensor: Tensor) -> Tensor:
    return _as_seen(tensor).requires_grad_()  # some parts of a model may run without gradients


def _pass_of_sharded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pass of a model whose parameters are put together for it, and its parts as before."""
    with torch.no_grad():
        model(*args, **kwargs)
    for module in model.modules():
        reshard = getattr(module, "reshard", None)  # of what `fully_shard` made of a module
        if callable(reshard):
            reshard()


def _track_first_tensor(mark: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """A function that marks the first tensor it is given."""
    found = False

    def track(value: Any) -> Any:
        nonlocal found
        if found or not isinstance(value, Tensor):
            return value
        found = True
        return mark(value)

    return track


class _Order:
    """Follows a forward pass: which block is running, and which layers saw the input in it.

    Parameters are detached and x_t is not, so an output requires a gradient just when it depends
    on the input; where they are sharded, and so cannot be, its type says so.
    """

    def __init__(self) -> None:
        self.current = Block("a", 1)
        self.block_of: dict[str, Block] = {}

    def entering(self, block: Block) -> Callable[[Tensor], None]:
        def fn(tensor: Tensor) -> None:
            self.current = block

        return fn

    def running(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and (output.requires_grad or isinstance(output, _Seen)):
                self.block_of.setdefault(name, self.current)

        return hook


def _block_of(module: str, block_of: dict[str, Block]) -> Block:
    """The block of a module, or of the nearest module around it whose known layers agree."""
    if module in block_of:
        return block_of[module]
    while module:
        module = module.rpartition(".")[0]
        inside = {b for name, b in block_of.items() if name.startswith(f"{module}.")}
        if inside:
            return inside.pop() if len(inside) == 1 and module else OTHER
    return OTHER
