r"""Certified Lipschitz constants of the blocks of Eq. 4, where there are any.

The norms of a block's Jacobian, which `sensitivity` measures, hold at a point. Theorem 3.4 asks for
constants that hold for every input. Here they are propagated through one forward pass: every
tensor that depends on a block's input has a constant L with ‖Δtensor‖ ≤ L‖Δinput‖,

| operation | constant of its result |
|---|---|
| linear map, convolution, pooling, reduction | L times its norm (`theory.lipschitz`) |
| function of every entry | L times sup of its derivative, at most 1 for the usual ones |
| sum | sum of all L |
| concatenation | √ΣL² |
| product with a constant c, batch norm by stored statistics | L max\|c\| |
| rearrangement, cut, padding with zeros | L |

Anything else is refused: normalisation by a sample's own statistics, attention and products of
features have no global constant, or none that is of use. What is certified holds for all x_t of
the batch's shape, under the batch's noise levels and conditions, in exact arithmetic.

The pass is watched below autograd, by a `TorchDispatchMode`: compositions, operators and functional
forms all arrive there as few basic operations. What foreign code makes of values that are taken out
of torch (`numpy`, `tolist`) counts as constant.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.certified_rules import (
    RULES,
    VALUELESS,
    Call,
    Constants,
    Known,
    refusal,
    times,
)
from stability_probe.probes.features import Site
from stability_probe.skips import SkipConnection, Tap
from stability_probe.skips.compiled import uncompiled
from stability_probe.skips.find import evaluating
from stability_probe.skips.merges import tensors_in
from stability_probe.skips.taps import TensorFn


@dataclass(frozen=True)
class CertifiedConstants:
    """Global Lipschitz constants of the blocks of Eq. 4.

    Attributes:
        lip_a: Lip(a_1), ..., Lip(a_N); a_1 includes the input layers.
        lip_b: Lip(b_1), ..., Lip(b_N); b_1 includes the output layers.
        l0: L_0 of the middle block f_N.
        kappa: Lipschitz constants of the skips, from the encoder's feature to κ_i u_i: |κ_i| where
            nothing else is done to it.

    Raises:
        StabilityProbeError: if the lists have different lengths.

    Their Theorem 3.4 holds between any two inputs:

    >>> import numpy as np
    >>> from stability_probe.theory import blockwise_bound
    >>> c = CertifiedConstants([2.0, 1.0], [1.0, 1.0], 3.0, [1.0, 0.5])
    >>> float(blockwise_bound(c.kappa, np.array(c.lip_a), np.array(c.lip_b), c.l0))
    9.0
    """

    lip_a: list[float]
    lip_b: list[float]
    l0: float
    kappa: list[float]

    def __post_init__(self) -> None:
        if not len(self.lip_a) == len(self.lip_b) == len(self.kappa):
            raise StabilityProbeError(
                "CertifiedConstants: needs one number a level in lip_a, lip_b and kappa, got "
                f"{len(self.lip_a)}, {len(self.lip_b)} and {len(self.kappa)}"
            )


def certified_constants(
    model: nn.Module, skips: Sequence[SkipConnection], batch: ProbeBatch
) -> CertifiedConstants:
    """Global Lipschitz constants of a network's blocks, proved by one forward pass.

    Args:
        model: the network, in evaluation mode for the pass, whatever scales its skips attached.
        skips: its long skips, at least one.
        batch: an input; its shape, noise levels and conditions are what the constants are for.

    Raises:
        StabilityProbeError: if there is no certificate; the message names the operation, the module
            that it runs in, and the reason.

    >>> from stability_probe import TheoryUNet, find_skips
    >>> net, x = TheoryUNet(m=4, n_skips=1), torch.ones(1, 4)
    >>> found = certified_constants(net, find_skips(net, x), ProbeBatch((x,)))
    >>> a = net.encoder[0]
    >>> norms = [torch.linalg.matrix_norm(w.double(), ord=2).item() for w in a.parameters()]
    >>> math.isclose(found.lip_a[0], math.prod(norms))
    True
    """
    if not skips:
        raise StabilityProbeError(
            f"certified_constants: {type(model).__name__} has no long skips (N = 0), and so no "
            "blocks of Eq. 4"
        )
    model = uncompiled(model)
    n = len(skips)
    feature = {s.level: ("f", s.level) if s.feature else ("x", 0) for s in skips}
    before = [("x", 0), *(feature[i] for i in range(1, n))]
    after = [("output", 0), *(("z", i) for i in range(1, n))]
    ends = _followed(model, skips, batch)
    return CertifiedConstants(
        lip_a=[_constant(ends, feature[i], before[i - 1], f"a_{i}") for i in range(1, n + 1)],
        lip_b=[_constant(ends, after[i - 1], ("merged", i), f"b_{i}") for i in range(1, n + 1)],
        l0=_constant(ends, ("z", n), feature[n], "the middle block"),
        kappa=[_constant(ends, ("ku", i), feature[i], f"skip {i}") for i in range(1, n + 1)],
    )


def _constant(ends: Mapping[Site, Constants], out: Site, into: Site, block: str) -> float:
    """The constant of a block, which has to depend on its input and on nothing else."""
    if out == into:  # an encoder feature that is the network's input
        return 1.0
    found = ends.get(out, {})
    others = ", ".join(f"{name}_{level}" if level else name for name, level in {*found} - {into})
    if others:
        raise StabilityProbeError(
            f"no certified Lipschitz constant: {block} depends on {others} around its own input, "
            "which Eq. 4 has no path for"
        )
    if not math.isfinite(found.get(into, math.nan)):
        raise StabilityProbeError(
            f"no certified Lipschitz constant: the output of {block} could not be followed from "
            "its input, or is not continuous in it"
        )
    return found[into]


@torch.no_grad()
def _followed(
    model: nn.Module, skips: Sequence[SkipConnection], batch: ProbeBatch
) -> dict[Site, Constants]:
    """The constants of the tensors at which the blocks end, each for the sites it depends on."""
    follower = _Follower()
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise StabilityProbeError(
                    f"no certified Lipschitz constant: {path!r} is scripted and cannot be followed"
                )
            enter = module.register_forward_pre_hook(partial(follower.enter, path))
            leave = module.register_forward_hook(follower.leave, always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        for tap, fn in _watched(skips, follower):
            stack.callback(tap.attach(model, fn).remove)
        x = batch.x.detach().clone()
        follower.start(("x", 0), x)
        stack.enter_context(follower)
        follower.end(("output", 0), batch.call(model, x))
    return follower.ends


def _watched(skips: Sequence[SkipConnection], follower: "_Follower") -> list[tuple[Tap, TensorFn]]:
    """Where blocks begin and end; the constants of what begins there are its own."""
    found: list[tuple[Tap, TensorFn]] = []
    for s in skips:
        if s.feature is not None:
            found.append((s.feature, partial(follower.begin, ("f", s.level))))
        found.append((s.skip, partial(follower.end, ("ku", s.level))))
        found.append((s.main, partial(follower.end, ("z", s.level))))
        found.append((s.merged, partial(follower.begin, ("merged", s.level))))
    return found


class _Follower(TorchDispatchMode):
    """Follows constants through the operations of a pass.

    A record of a tensor is out of date when something has been written into its memory since,
    through whichever tensor: all writes are counted, by the memory that they went to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[Site, Constants] = {}
        self._known = WeakTensorKeyDictionary()  # tensor to (Known, writes so far)
        self._written: dict[int, tuple[StorageWeakRef, int]] = {}
        self._open: list[str] = []

    def enter(self, path: str, module: nn.Module, args: Any) -> None:
        """A module is called."""
        self._open.append(path)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """It has returned, or failed."""
        self._open.pop()

    def start(self, site: Site, tensor: Tensor) -> None:
        """Let a tensor be what constants refer to."""
        self._known[tensor] = (Known({site: 1.0}), self._writes(tensor))

    def begin(self, site: Site, tensor: Tensor) -> Tensor:
        """A block ends at a tensor, and others begin."""
        self.end(site, tensor)
        new = tensor.clone()
        self.start(site, new)
        return new

    def end(self, site: Site, tensor: Tensor) -> None:
        """A block ends at a tensor."""
        known = self._find(tensor)
        self.ends[site] = known.constants if known else {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and note the constants of what it makes."""
        named = _by_name(func, args, kwargs or {})
        given = [(t, self._find(t)) for t in tensors_in(named)]
        known = {id(t): found for t, found in given if found is not None}
        written = [named[a.name] for a in func._schema.arguments if _is_written(a)]
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if known and name not in VALUELESS:
            call = Call(name, named, known, result, self._open[-1] if self._open else "")
            if name not in RULES:
                raise refusal(call)
            found = RULES[name](call)
            for tensor in written:
                self._wrote(tensor)
            for tensor in written or tensors_in(result):
                exact = tensor.is_floating_point()
                whole = found if exact else Known(times(found.constants, math.inf))
                self._known[tensor] = (whole, self._writes(tensor))
        return result

    def _find(self, tensor: Tensor) -> Known | None:
        """What is known of a tensor as it is now."""
        found: tuple[Known | None, int] = self._known.get(tensor, (None, 0))
        known, writes = found
        if writes != self._writes(tensor):
            place = self._open[-1] if self._open else ""
            raise StabilityProbeError(
                f"no certified Lipschitz constant: in {place!r} something is written into a part "
                "of a tensor, or into a tensor that shares its memory with another one"
            )
        return known

    def _memory(self, tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _writes(self, tensor: Tensor) -> int:
        """How often something that depends on a site was written into a tensor's memory."""
        reference, writes = self._written.get(self._memory(tensor), (None, 0))
        return writes if reference is not None and not reference.expired() else 0

    def _wrote(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._written[reference.cdata] = (reference, self._writes(tensor) + 1)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by name, defaults included."""
    about = func._schema.arguments
    defaults = {a.name: a.default_value for a in about if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in about), args, strict=False)), **kwargs}
