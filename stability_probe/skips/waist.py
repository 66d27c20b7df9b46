r"""The long skips among the candidates: those over the waist, less the middle block's own.

1. **Ordinary merges** repeat along the network: the same line of code makes merges that follow one
   another, or reads one feature again and again. They go, unless they bridge a coarser resolution.
   So does what begins between a long skip's ends and ends after it: side outputs that are joined.
2. **The waist** is where the lengths of the bridging spans add up to the most.
3. **The middle's own**: among the bridging merges, one that lies whole in one module call and that
   no other resembles is a block's residual if it is a sum at one resolution, or short; so are
   several branches of one feature that one merge joins.
4. What is left are the long skips, nested in one another. Merges that are not in a row, or several
   features in one merge, are nested dense skips (UNet++), which Eq. 4 has no levels for.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise, permutations
from typing import Any

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.candidates import candidates, unknown_joins
from stability_probe.skips.connection import SkipWarning
from stability_probe.skips.flow import Flow
from stability_probe.skips.span import Span

FAR = 0.25
"""A long skip bridges, or lies inside one that bridges, this share of the network's depth."""


def long_skips(flow: Flow, name: str) -> list[Span]:
    """The long skips in a data flow, outermost first.

    Args:
        flow: the data flow of a forward pass.
        name: what to call the model in errors and warnings.

    Raises:
        StabilityProbeError: if the skips are nested dense ones.
    """
    _warn_of_unknown(flow, name)
    unusual = _without_side_outputs(_without_ordinary(list(candidates(flow))))
    if not unusual:
        return []
    depth = max(node.depth for node in flow.nodes)
    waist = _waist(unusual, depth)
    bridging = [s for s in unusual if s.start <= waist < s.end]
    found = _without_middle(bridging, depth)
    if not found or max(s.length for s in found) < FAR * depth:
        _warn_of_short(unusual, name)
        return []
    found.sort(key=lambda s: (s.start, -s.end))
    rest = [s for s in unusual if s not in bridging]
    if not _in_order(flow, found, rest):
        if _is_dense_block(found):
            return []
        _refuse_dense([*found, *rest], name)
    _warn_if_unsure(found, rest, name)
    return found


def _without_ordinary(spans: Sequence[Span]) -> list[Span]:
    """Leave out merges of code that makes one after the other, or reads one feature many times."""
    made: dict[Any, list[Span]] = defaultdict(list)
    for s in spans:
        made[s.location].append(s)
    repeated = {
        where
        for where, here in made.items()
        if any(_follows(b, a) for a, b in permutations(here, 2))
        or max(Counter(s.branch for s in here).values()) > 2
    }
    return [s for s in spans if s.coarser or s.location not in repeated]


def _follows(b: Span, a: Span) -> bool:
    """Whether a merge comes after another; a sum does so too if it begins and ends later."""
    return b.start >= a.end or (a.kind == "add" and b.start > a.start and b.end > a.end)


def _without_side_outputs(spans: Sequence[Span]) -> list[Span]:
    """Leave out what joins the decoder's own features: it begins inside a long skip, ends after it.

    Such are outputs of all scales that are put together at the end.
    """
    over = [s for s in spans if s.coarser]
    return [
        s for s in spans
        if s.coarser or not any(o.start < s.start < o.end < s.end for o in over)
    ]  # fmt: skip


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
    if not span.in_one_call:
        return False
    if _is_branching(span, others):
        return True
    if any(_alike(span, s) for s in others if s is not span):
        return False
    return (span.kind == "add" and not span.coarser) or span.length < FAR * depth


def _is_branching(span: Span, others: Sequence[Span]) -> bool:
    """Whether the merge joins several branches of one feature, as in Inception."""
    return any((s.merge, s.branch) == (span.merge, span.branch) for s in others if s is not span)


def _alike(a: Span, b: Span) -> bool:
    """Whether two merges are made by the same code, or in the same way in the same call."""
    return a.location == b.location or (a.node.call, a.kind) == (b.node.call, b.kind)


def _in_order(flow: Flow, found: Sequence[Span], rest: Sequence[Span]) -> bool:
    """Whether spans are nested: merges in a row, of one skip each, and features in a row.

    Over a coarser resolution two merges may share a feature; at one resolution that is a dense net.
    """
    branches, merges = {s.branch for s in found}, {s.merge for s in found}
    shared = [s for s in rest if s.coarser and (s.branch in branches or s.merge in merges)]
    nested = all(
        flow.carries(b.branch, a.branch) and flow.carries(a.merge, b.merge)
        for a, b in pairwise(found)
    )
    plain = [s.branch for s in found if not s.coarser]
    return nested and not shared and len(merges) == len(found) and len(set(plain)) == len(plain)


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
    elsewhere = _over_coarser(rest)
    if elsewhere:
        warnings.warn(
            f"{name}: {len(elsewhere)} more merges bridge a coarser resolution elsewhere (networks "
            "in a row?); only the skips over the waist of the whole are reported",
            SkipWarning,
            stacklevel=4,
        )


def _warn_of_short(spans: Sequence[Span], name: str) -> None:
    short = _over_coarser(spans)
    if short:
        warnings.warn(
            f"{name}: {len(short)} merges bridge a coarser resolution, but only a small part of "
            "the network; name them if they are its long skips (choose_skips, or --skips)",
            SkipWarning,
            stacklevel=4,
        )


def _over_coarser(spans: Sequence[Span]) -> list[Span]:
    return [s for s in spans if s.coarser and not _is_branching(s, spans)]


def _warn_of_unknown(flow: Flow, name: str) -> None:
    functions = unknown_joins(flow)
    if functions:
        warnings.warn(
            f"{name}: features are joined over a coarser resolution by "
            f"{', '.join(sorted(functions))}, which is no concatenation and no sum and cannot be "
            "scaled as a skip",
            SkipWarning,
            stacklevel=4,
        )
