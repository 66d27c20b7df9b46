"""Which merges could be long skips: those of a feature from further back with the main path."""

from collections.abc import Iterator

from stability_probe.skips.flow import Flow, Node
from stability_probe.skips.span import Span, bridged, pass_coarser
from stability_probe.skips.trace import PRODUCTS


def candidates(flow: Flow) -> Iterator[Span]:
    """Merges of a feature from further back with the main path, whose result matters."""
    lasting = _followed_by_parameters(flow)
    for node in flow.nodes:
        if node.merge is None or node.index not in lasting:
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
    branch = _branch(flow, u, z)
    if branch is None:
        return None
    own = flow.nodes[u].depth - flow.nodes[branch].depth
    main_path = flow.nodes[z].depth - flow.nodes[branch].depth
    if u != z and not (own < main_path and own <= max(6, main_path / 2)):
        return None  # a branch about as long as the main path is no skip
    return Span(flow, merge, operand, main, branch)


def _branch(flow: Flow, u: int, z: int) -> int | None:
    """Of the nodes that u carries on and z comes from, the last to run."""
    common = flow.carried[u] & flow.ancestors[z]
    return common.bit_length() - 1 if common else None


def _fits(kind: str, dim: int, u: tuple[int, ...], z: tuple[int, ...]) -> bool:
    """Whether two operands are features of one resolution."""
    if kind == "add":
        return u == z and len(u) > 1
    return len(u) == len(z) > 1 and dim > 0


def _followed_by_parameters(flow: Flow) -> set[int]:
    """The nodes whose content goes on to a function with parameters, and to the output."""
    followed = 0
    for node in flow.nodes:
        if node.parametric:
            followed |= flow.carried[node.index] & ~(1 << node.index)
    lasting = followed & _reaching_output(flow)
    return {node.index for node in flow.nodes if lasting >> node.index & 1}


def _reaching_output(flow: Flow) -> int:
    """The nodes whose content goes on to the output, as a bit set.

    A gate's does not. But where half of the network or more makes a factor that nothing else
    carries on, as in x · mask(x), that factor is what the network is about.
    """
    reaching = 0
    for output in flow.calls[0].outputs:
        reaching |= flow.carried[output] if output >= 0 else 0
    depth = max(node.depth for node in flow.nodes)
    for node in reversed(flow.nodes):
        if not reaching >> node.index & 1:
            continue
        for factor in node.parents - node.carriers:
            known = flow.ancestors[factor] & reaching
            start = max(
                (n.depth for n in flow.nodes[: factor + 1] if known >> n.index & 1), default=0
            )
            if flow.nodes[factor].depth - start >= depth / 2:
                reaching |= flow.carried[factor]
    return reaching


def unknown_joins(flow: Flow) -> set[str]:
    """Functions that join a feature with the main path over a coarser resolution, but are no merge.

    `torch.maximum`, `torch.where`, a sum of a stack, filling an empty tensor: what they join may
    be a long skip, and cannot be scaled as one.
    """
    lasting = _followed_by_parameters(flow)
    return {
        node.function
        for node in flow.nodes
        if node.index in lasting and _joins_unlike_a_merge(node) and _joins_over_coarser(flow, node)
    }


def _joins_unlike_a_merge(node: Node) -> bool:
    known = node.function in PRODUCTS or (
        node.merge is not None and (node.merge.kind == "add" or node.merge.dim > 0)
    )
    return len(node.carriers) > 1 and not known


def _joins_over_coarser(flow: Flow, node: Node) -> bool:
    *others, main = sorted(node.carriers, key=lambda at: flow.nodes[at].depth)
    for u in others:
        shape, branch = flow.nodes[u].shape, _branch(flow, u, main)
        if branch is None or shape[2:] != flow.nodes[main].shape[2:]:
            continue
        ends = [shape, flow.nodes[branch].shape]
        if len(shape) > 2 and pass_coarser(bridged(flow, branch, main), ends):
            return True
    return False
