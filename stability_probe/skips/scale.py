"""Putting a scaling scheme into a model, and taking it out again, without touching its source."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.compiled import uncompiled
from stability_probe.skips.connection import SkipConnection, SkipWarning
from stability_probe.skips.operands import OperandTap
from stability_probe.skips.scaling import Scaling
from stability_probe.skips.taps import Tap


class ScaledSkips:
    """A scheme at work in a model: undone by `remove()`, or by leaving a `with` block.

    Attributes:
        scheme: the scheme.
        kappa: κ_1..κ_N if they are constants, else `None`.
    """

    def __init__(self, scheme: Scaling, kappa: list[float] | None, undo: ExitStack) -> None:
        self.scheme, self.kappa, self._undo = scheme, kappa, undo

    def remove(self) -> None:
        """Take the scheme out of the model; a second call does nothing."""
        self._undo.close()

    def __enter__(self) -> "ScaledSkips":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def scale_skips(
    model: nn.Module, skips: Sequence[SkipConnection], scheme: Scaling, *, name: str = "se"
) -> ScaledSkips:
    r"""Multiply exactly the skip operand of every merge by $\kappa_i$: $u_i \mapsto \kappa_i u_i$.

    A scheme with parameters becomes a submodule of the model, so that it trains, moves and saves
    with it; scale before making the optimizer. Removing the scheme removes them.

    A model that `torch.compile` has compiled is compiled again at its next call.

    Args:
        model: the model that `skips` were found on, or what `torch.compile` made of it.
        skips: its long skips.
        scheme: what to scale with.
        name: the submodule's name; `se` is that of ScaleLong's checkpoints.

    Raises:
        StabilityProbeError: if there are no skips, or the model has something called `name`.

    >>> import torch
    >>> from stability_probe import TheoryUNet, Uniform, find_skips
    >>> net, x = TheoryUNet(m=8, n_skips=2), torch.ones(1, 8)
    >>> with scale_skips(net, find_skips(net, x), Uniform(0.0)):
    ...     bare = net(x)
    >>> torch.equal(bare, net(x))
    False
    """
    if not name.isidentifier():
        raise StabilityProbeError(f"scale_skips: name must be an identifier, got {name!r}")
    if not skips:
        raise StabilityProbeError(
            f"scale_skips: {type(model).__name__} has no long skips to scale (N = 0)"
        )
    scheme.prepare(skips)
    model = uncompiled(model)
    boosts = type(scheme).backbone is not Scaling.backbone
    with ExitStack() as stack:
        if any(True for _ in scheme.parameters()):
            if hasattr(model, name):
                raise StabilityProbeError(
                    f"scale_skips: {type(model).__name__} already has {name!r}, where the scheme's "
                    "parameters would go; remove the scaling that is there, or pass another name"
                )
            parameter = next(model.parameters(), None)
            if parameter is not None:
                scheme.to(parameter.device, parameter.dtype)
            model.add_module(name, scheme)
            stack.callback(delattr, model, name)
        for skip in skips:
            handle = skip.skip.attach(model, _Scale(scheme, skip.level))
            stack.callback(handle.remove)
            if boosts:
                handle = skip.main.attach(model, _Boost(scheme, skip.level))
                stack.callback(handle.remove)
        _warn_of_compilation([tap for s in skips for tap in (s.skip, s.main)[: 1 + boosts]])
        return ScaledSkips(scheme, scheme.coefficients(len(skips)), stack.pop_all())


@dataclass
class _Scale:
    scheme: Scaling
    level: int

    def __call__(self, u: Tensor) -> Tensor:
        scaled: Tensor = self.scheme(u, self.level)
        return scaled


@dataclass
class _Boost:
    scheme: Scaling
    level: int

    def __call__(self, z: Tensor) -> Tensor:
        return self.scheme.backbone(z, self.level)


def _warn_of_compilation(taps: Sequence[Tap]) -> None:
    inside = sorted({tap.module for tap in taps if isinstance(tap, OperandTap)})
    if inside:
        names = ", ".join(name or "the whole model" for name in inside)
        warnings.warn(
            f"scale_skips: under torch.compile {names} runs uncompiled, because its merges are "
            "made inside its own forward",
            SkipWarning,
            stacklevel=3,
        )
