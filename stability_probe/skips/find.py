r"""Finding the long skips of any model, from the data flow of one forward pass.

A merge joins a feature from far back with the main path. With the depth of a node its longest path
from the input, a merge spans the depths from the node where its skip branched off to itself. All
long skips of a network bridge its waist, the depths that the most is bridged over; what bridges it
besides them are ordinary residuals of the middle block.

1. **Candidates**: every merge with two operands that the main input reaches, of fitting shapes,
   with parameters after it; the operand nearer to the input is the skip.
2. **Ordinary merges** repeat along the network: the same line of the same class makes merges that
   lie one after the other. They go, unless they bridge a coarser resolution.
3. **The waist** is where the lengths of the bridging spans add up to the most.
4. **The middle's own**: among the bridging merges, one that lies whole in one module call and that
   no other resembles is a block's residual if it is a sum at one resolution, or short.
5. What is left are the long skips, nested in one another. Features that enter several merges, or
   several features in one merge, are nested dense skips (UNet++), which Eq. 4 has no levels for.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.connection import SkipConnection, SkipWarning
from stability_probe.skips.places import describe
from stability_probe.skips.span import Span
from stability_probe.skips.taps import uncompiled
from stability_probe.skips.trace import Flow, trace

FAR = 0.25
"""A long skip bridges, or lies inside one that bridges, this share of the network's depth."""


def find_skips(model: nn.Module, *args: Any, **kwargs: Any) -> list[SkipConnection]:
    """The long skips of a model, outermost (level 1) first; `[]` when it has none.

    The model runs once, in evaluation mode and without gradients; it is left as it was. What it
    does for the example's shapes is what is seen.

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
    with evaluating(model):
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
    with evaluating(model):
        flow = trace(model, args, kwargs)
    spans = sorted(_candidates(flow), key=lambda s: (s.start, -s.end))
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


def long_skips(flow: Flow, name: str) -> list[Span]:
    """The long skips in a data flow, outermost first.

    Args:
        flow: the data flow of a forward pass.
        name: what to call the model in errors and warnings.

    Raises:
        StabilityProbeError: if the skips are nested dense ones.
    """
    candidates = list(_candidates(flow))
    unusual = _without_ordinary(candidates)
    if not unusual:
        return []
    depth = max(node.depth for node in flow.nodes)
    waist = _waist(unusual, depth)
    bridging = [s for s in unusual if s.start <= waist < s.end]
    found = _without_middle(bridging, depth)
    if not found or max(s.length for s in found) < FAR * depth:
        return []
    found.sort(key=lambda s: (s.start, -s.end))
    rest = [s for s in unusual if s not in bridging]
    if not _in_order(found, rest):
        if _is_dense_block(found):
            return []
        _refuse_dense([*found, *rest], name)
    _warn_if_unsure(found, rest, name)
    return found


def _candidates(flow: Flow) -> Iterator[Span]:
    """Merges of a feature from further back with the main path."""
    parametric_after = _followed_by_parameters(flow)
    for node in flow.nodes:
        if node.merge is None or node.index not in parametric_after:
            continue
        depths = [flow.nodes[at].depth if at >= 0 else -1 for at, _ in node.merge.operands]
        main = depths.index(max(depths))
        reached = [k for k, depth in enumerate(depths) if depth >= 0]
        for k in reached:
            if k != main and (span := _span(flow, node.index, k, main)) is not None:
                yield span


def _span(flow: Flow, merge: int, operand: int, main: int) -> Span | None:
    """The span of one operand, or `None` if it is no skip of the main operand's path."""
    about = flow.nodes[merge].merge
    assert about is not None
    (u, u_shape), (z, z_shape) = about.operands[operand], about.operands[main]
    if not _fits(about.kind, about.dim, u_shape, z_shape):
        return None
    common = flow.carried[u] & flow.ancestors[z]
    if not common:
        return None
    branch = common.bit_length() - 1  # of the common ancestors, the last to run
    own = flow.nodes[u].depth - flow.nodes[branch].depth
    main_path = flow.nodes[z].depth - flow.nodes[branch].depth
    if u != z and not (own < main_path and own <= max(6, main_path / 2)):
        return None  # a branch about as long as the main path is no skip
    return Span(flow, merge, operand, main, branch)


def _fits(kind: str, dim: int, u: tuple[int, ...], z: tuple[int, ...]) -> bool:
    """Whether two operands are features of one resolution."""
    if kind == "add":
        return u == z and len(u) > 1
    return len(u) == len(z) > 1 and dim > 0


def _followed_by_parameters(flow: Flow) -> set[int]:
    """The nodes whose content goes on to a function with parameters, and to the output."""
    followed = reaching = 0
    for output in flow.calls[0].outputs:
        reaching |= flow.carried[output] if output >= 0 else 0
    for node in flow.nodes:
        if node.parametric:
            followed |= flow.carried[node.index] & ~(1 << node.index)
    return {node.index for node in flow.nodes if (followed & reaching) >> node.index & 1}


def _without_ordinary(spans: Sequence[Span]) -> list[Span]:
    """Leave out merges of code that makes one after the other along the network."""
    last_start: dict[Any, int] = {}
    first_end: dict[Any, int] = {}
    for s in spans:
        last_start[s.location] = max(s.start, last_start.get(s.location, s.start))
        first_end[s.location] = min(s.end, first_end.get(s.location, s.end))
    repeated = {where for where, start in last_start.items() if start >= first_end[where]}
    return [s for s in spans if s.coarser or s.location not in repeated]


def _waist(spans: Sequence[Span], depth: int) -> int:
    """The depth at which the lengths of the bridging spans add up to the most."""
    weight = [0] * (depth + 2)
    for s in spans:
        weight[s.start] += s.length
        weight[s.end] -= s.length
    for i in range(1, len(weight)):
        weight[i] += weight[i - 1]
    return weight.index(max(weight))


def _without_middle(spans: Sequence[Span], depth: int) -> list[Span]:
    """Leave out what belongs to the middle block itself."""
    return [s for s in spans if not _belongs_to_a_block(s, spans, depth)]


def _belongs_to_a_block(span: Span, others: Sequence[Span], depth: int) -> bool:
    """Whether a bridging merge is a block's own residual rather than a long skip."""
    if not span.in_one_call or any(_alike(span, s) for s in others if s is not span):
        return False
    return (span.kind == "add" and not span.coarser) or span.length < FAR * depth


def _alike(a: Span, b: Span) -> bool:
    """Whether two merges are made by the same code, or in the same way in the same call."""
    if a.location == b.location:
        return True
    return (a.node.call, a.kind, a.coarser) == (b.node.call, b.kind, b.coarser)


def _in_order(found: Sequence[Span], rest: Sequence[Span]) -> bool:
    """Whether spans are nested, one feature to one merge."""
    branches, merges = {s.branch for s in found}, {s.merge for s in found}
    shared = [s for s in rest if s.coarser and (s.branch in branches or s.merge in merges)]
    nested = all(a.start <= b.start and b.end <= a.end for a, b in pairwise(found))
    return nested and not shared and len(branches) == len(merges) == len(found)


def _is_dense_block(found: Sequence[Span]) -> bool:
    """Whether spans are the dense connections of one block at one resolution, as in DenseNet."""
    calls = {s.node.call for s in found}
    return len(calls) == 1 and 0 not in calls and not any(s.coarser for s in found)


def _refuse_dense(spans: Sequence[Span], name: str) -> None:
    branches, merges = len({s.branch for s in spans}), len({s.merge for s in spans})
    raise StabilityProbeError(
        f"find_skips: {name} has nested dense skips, as UNet++ has: {len(spans)} paths from "
        f"{branches} features into {merges} merges, which Eq. 4 has no levels for; name the pairs "
        "to treat as its long skips (choose_skips, or --skips)"
    )


def _warn_if_unsure(found: Sequence[Span], rest: Sequence[Span], name: str) -> None:
    innermost = found[-1]
    if innermost.kind == "add" and not innermost.coarser and innermost.in_one_call:
        alike = [s for s in found[:-1] if s.location == innermost.location]
        if not alike:
            warnings.warn(
                f"{name}: level {len(found)} may be a residual of the middle block: it is a sum at "
                "one resolution, written in the same forward as the other skips",
                SkipWarning,
                stacklevel=4,
            )
    elsewhere = [s for s in rest if s.coarser and s.length >= found[-1].length]
    if elsewhere:
        warnings.warn(
            f"{name}: {len(elsewhere)} more merges bridge a coarser resolution elsewhere (networks "
            "in a row?); only the skips over the waist of the whole are reported",
            SkipWarning,
            stacklevel=4,
        )
