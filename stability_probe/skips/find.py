"""Finding the long skips of a model.

`find_skips` is the only way in. It knows the structure of three families, each described by one
function below, and runs one forward pass to learn the shapes; a model of another kind is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.models import TheoryUNet, UViT
from stability_probe.skips.connection import SkipConnection
from stability_probe.skips.taps import ArgumentTap, OutputTap, SliceTap


def find_skips(model: nn.Module, *args: Any, **kwargs: Any) -> list[SkipConnection]:
    """The long skips of a model, outermost (level 1) first.

    Args:
        model: a `TheoryUNet`, `UViT` or `diffusers.UNet2DModel`; it is left as it was.
        *args: an example input of the model, as its `forward` takes it.
        **kwargs: further arguments of the example.

    Raises:
        StabilityProbeError: if the model is of another kind.

    >>> skips = find_skips(TheoryUNet(m=8, n_skips=2), torch.zeros(1, 8))
    >>> for s in skips:
    ...     print(s.level, s.source, s.sink, s.merge, s.shape)
    1 encoder.0 decoder.0.block add (8,)
    2 encoder.1 decoder.1.block add (8,)
    """
    for kind, describe in _FAMILIES.items():
        if isinstance(model, kind):
            return _with_shapes(model, describe(model), args, kwargs)
    known = ", ".join(kind.__name__ for kind in _FAMILIES)
    raise StabilityProbeError(
        f"find_skips: cannot tell the long skips of a {type(model).__name__}; it knows {known}. "
        "Describe them yourself as a list of SkipConnection"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, keep the global random state, and restore both."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _theory_unet(model: TheoryUNet) -> list[SkipConnection]:
    return [
        SkipConnection(
            level=i,
            source=f"encoder.{i - 1}",
            sink=f"decoder.{i - 1}.block",
            merge="concat" if model.merge == "concat" else "add",
            shape=(),
            block=f"decoder.{i - 1}",
            skip=ArgumentTap(f"decoder.{i - 1}", "u"),
            main=ArgumentTap(f"decoder.{i - 1}", "z"),
            merged=ArgumentTap(f"decoder.{i - 1}.block", "v"),
        )
        for i in range(1, model.n_skips + 1)
    ]


def _uvit(model: UViT) -> list[SkipConnection]:
    n = len(model.in_blocks)
    return [
        SkipConnection(
            level=i,
            source=f"in_blocks.{i - 1}",
            sink=f"out_blocks.{n - i}.skip_linear",
            merge="concat",
            shape=(),
            block=f"out_blocks.{n - i}",
            skip=ArgumentTap(f"out_blocks.{n - i}", "skip"),
            main=ArgumentTap(f"out_blocks.{n - i}", "x"),
            merged=ArgumentTap(f"out_blocks.{n - i}.skip_linear", "input"),
        )
        for i in range(1, n + 1)
    ]


def _unet2d(model: Any) -> list[SkipConnection]:
    """Down blocks push every resnet's (or attention's) and downsampler's output; up blocks pop."""
    if any(hasattr(block, "skip_conv") for block in (*model.down_blocks, *model.up_blocks)):
        raise StabilityProbeError(
            "find_skips: a UNet2DModel with SkipDownBlock2D or SkipUpBlock2D carries the image "
            "itself along; describe its long skips yourself as a list of SkipConnection"
        )
    sources = ["conv_in"]
    for b, down in enumerate(model.down_blocks):
        layer = "attentions" if hasattr(down, "attentions") else "resnets"
        sources += [f"down_blocks.{b}.{layer}.{j}" for j in range(len(down.resnets))]
        if down.downsamplers is not None:
            sources.append(f"down_blocks.{b}.downsamplers.0")
    sinks = []
    for b, up in enumerate(model.up_blocks):
        layer = "attentions" if hasattr(up, "attentions") else "resnets"
        ends = [f"up_blocks.{b}.{layer}.{j}" for j in range(len(up.resnets))]
        if up.upsamplers is not None:
            ends[-1] = f"up_blocks.{b}.upsamplers.0"
        sinks += [(b, j, end) for j, end in enumerate(ends)]
    return [
        SkipConnection(
            level=i,
            source=source,
            sink=f"up_blocks.{b}.resnets.{j}",
            merge="concat",
            shape=(),
            block=end,
            skip=ArgumentTap(f"up_blocks.{b}", "res_hidden_states_tuple", item=-1 - j),
            main=SliceTap(ArgumentTap(f"up_blocks.{b}.resnets.{j}", "input_tensor"), 1, 0),
            merged=ArgumentTap(f"up_blocks.{b}.resnets.{j}", "input_tensor"),
        )
        for i, (source, (b, j, end)) in enumerate(
            zip(sources, reversed(sinks), strict=True), start=1
        )
    ]


_FAMILIES: dict[type, Callable[[Any], list[SkipConnection]]] = {
    TheoryUNet: _theory_unet,
    UViT: _uvit,
    UNet2DModel: _unet2d,
}


def _with_shapes(
    model: nn.Module, skips: list[SkipConnection], args: Any, kwargs: Any
) -> list[SkipConnection]:
    """Fill in the shapes of u_i, and the width of z_i in a concatenation, from a forward pass."""
    u: dict[int, torch.Size] = {}
    merged: dict[int, torch.Size] = {}
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for s in skips:
            for tap, shapes in ((OutputTap(s.source), u), (s.merged, merged)):
                stack.callback(tap.attach(model, _ShapeHook(shapes, s.level)).remove)
        model(*args, **kwargs)
    return [
        replace(s, shape=tuple(u[s.level][1:]), main=_cut(s, u[s.level], merged[s.level]))
        for s in skips
    ]


def _cut(skip: SkipConnection, u: torch.Size, merged: torch.Size) -> ArgumentTap | SliceTap:
    """The tap of z_i; where it is the leading part of a concatenation, how long that part is."""
    if isinstance(skip.main, ArgumentTap):
        return skip.main
    dim = skip.main.dim
    return replace(skip.main, length=merged[dim] - u[dim])


class _ShapeHook:
    def __init__(self, shapes: dict[int, torch.Size], level: int) -> None:
        self.shapes, self.level = shapes, level

    def __call__(self, tensor: Tensor) -> None:
        self.shapes[self.level] = tensor.shape
