r"""Finding the long skips of any model, from the data flow of one forward pass.

A merge joins a feature from far back with the main path. With the depth of a node its longest path
from the input, a merge spans the depths from the node where its skip branched off to itself. All
long skips of a network bridge its waist, the depths that the most is bridged over; what bridges it
besides them are ordinary residuals of the middle block.

`trace` follows the pass; `candidates` are the merges with two operands that the main input reaches,
of fitting shapes, with parameters after them, the operand nearer to the input being the skip;
`waist` says which of them are long skips; `places`, where their tensors pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.candidates import candidates
from stability_probe.skips.compiled import uncompiled
from stability_probe.skips.connection import SkipConnection
from stability_probe.skips.places import describe
from stability_probe.skips.taps import untapped
from stability_probe.skips.trace import trace
from stability_probe.skips.waist import long_skips


def find_skips(model: nn.Module, *args: Any, **kwargs: Any) -> list[SkipConnection]:
    """The long skips of a model, outermost (level 1) first; `[]` when it has none.

    The model runs once, in evaluation mode and without gradients; it is left as it was. What it
    does for the example's shapes is what is seen. What `scale_skips` or a probe has put into it is
    left aside, so that the skips, and their `kappa`, are those of the model's own code.

    Args:
        model: any module.
        *args: an example input of the model, as its `forward` takes it; the first tensor of all
            arguments is the main input, x_t. Other arguments are conditions, and paths from them
            are not skips.
        **kwargs: further arguments of the example.

    Raises:
        StabilityProbeError: if the input cannot be followed through the model, or the skips are
            nested dense ones.

    Warns:
        SkipWarning: if it is not sure.

    >>> from stability_probe.models import TheoryUNet
    >>> skips = find_skips(TheoryUNet(m=8, n_skips=2), torch.zeros(1, 8))
    >>> for s in skips:
    ...     print(s.level, s.source, s.sink, s.merge, s.shape)
    1 encoder.0 decoder.0.block add (8,)
    2 encoder.1 decoder.1.block add (8,)
    >>> find_skips(torch.nn.Linear(8, 8), torch.zeros(1, 8))
    []
    """
    model = uncompiled(model)
    with evaluating(model), untapped():
        flow = trace(model, args, kwargs)
    if not any(node >= 0 for node in flow.calls[0].outputs):
        raise StabilityProbeError(
            f"find_skips: the input could not be followed to the output of {type(model).__name__} "
            "(compiled or scripted code, or no dependence); give it the uncompiled model"
        )
    return describe(flow, long_skips(flow, type(model).__name__))


def choose_skips(
    pairs: Sequence[tuple[str, str]], model: nn.Module, *args: Any, **kwargs: Any
) -> list[SkipConnection]:
    """The merges of a model that a person names as its long skips, outermost first.

    Args:
        pairs: (source, sink) patterns with `*` and `?`, as in `("encoder.*", "decoder.*")`; every
            merge that matches one of them is taken.
        model: any module.
        *args: an example input, as for `find_skips`.
        **kwargs: further arguments of the example.

    Raises:
        StabilityProbeError: if a pair matches no merge.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> choose_skips([("0", "1")], net, torch.zeros(1, 2))
    Traceback (most recent call last):
    ...
    stability_probe.errors.StabilityProbeError: skips: no merge from '0' into '1'; there are none
    """
    model = uncompiled(model)
    with evaluating(model), untapped():
        flow = trace(model, args, kwargs)
    spans = sorted(candidates(flow), key=lambda s: (s.start, -s.end))
    named = [(span, describe(flow, [span])[0]) for span in spans]
    for source, sink in pairs:
        if not any(_matches(skip, source, sink) for _, skip in named):
            known = ", ".join(f"{s.source}={s.sink}" for _, s in named[:8]) or "none"
            raise StabilityProbeError(
                f"skips: no merge from {source!r} into {sink!r}; there are {known}"
            )
    return describe(flow, [span for span, s in named if any(_matches(s, *pair) for pair in pairs)])


def _matches(skip: SkipConnection, source: str, sink: str) -> bool:
    return fnmatchcase(skip.source, source) and fnmatchcase(skip.sink, sink)


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
