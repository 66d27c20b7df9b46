"""A merge, seen as a bridge over the main path."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from stability_probe.skips.flow import Flow, Node


@dataclass(frozen=True)
class Span:
    """A merge as a bridge over the main path.

    Attributes:
        flow: the data flow.
        merge: the merge's node.
        operand: which of its operands is the skip.
        main: which is the main path.
        branch: the node where the skip left the main path; its result is u_i.
    """

    flow: Flow
    merge: int
    operand: int
    main: int
    branch: int

    @property
    def node(self) -> Node:
        """The merge's node."""
        return self.flow.nodes[self.merge]

    @property
    def kind(self) -> Literal["concat", "add"]:
        """`"concat"` or `"add"`."""
        assert self.node.merge is not None
        return self.node.merge.kind

    @property
    def start(self) -> int:
        """Depth of u_i."""
        return self.flow.nodes[self.branch].depth

    @property
    def end(self) -> int:
        """Depth of the merge."""
        return self.node.depth

    @property
    def length(self) -> int:
        """Depths that are bridged."""
        return self.end - self.start

    @property
    def location(self) -> tuple[str, str, int]:
        """The code that makes the merge: file, kind, line; or, unknown, class and place in it."""
        assert self.node.merge is not None
        call, about = self.flow.calls[self.node.call], self.node.merge
        if about.line:
            return about.file, self.kind, about.line
        return call.type_name, self.kind, -1 - about.ordinal

    def operand_node(self, position: int) -> int:
        """The node of an operand."""
        assert self.node.merge is not None
        return self.node.merge.operands[position][0]

    def operand_shape(self, position: int) -> tuple[int, ...]:
        """The shape of an operand."""
        assert self.node.merge is not None
        return self.node.merge.operands[position][1]

    @cached_property
    def bridged(self) -> list[Node]:
        """The nodes of the main path from the branch (exclusive) to the merge (exclusive)."""
        return bridged(self.flow, self.branch, self.operand_node(self.main))

    @cached_property
    def coarser(self) -> bool:
        """Whether the main path passes a coarser resolution than either end has."""
        ends = [self.operand_shape(self.operand), self.flow.nodes[self.branch].shape]
        return pass_coarser(self.bridged, ends)

    @cached_property
    def in_one_call(self) -> bool:
        """Whether all that is bridged runs in the module call that makes the merge."""
        return all(self.flow.within(node.call, self.node.call) for node in self.bridged)


def bridged(flow: Flow, branch: int, main: int) -> list[Node]:
    """The nodes on the way from a branch (exclusive) to the main operand of a merge."""
    return [
        node
        for node in flow.nodes[branch + 1 : main + 1]
        if flow.carries(main, node.index) and flow.carries(node.index, branch)
    ]


def pass_coarser(nodes: Sequence[Node], ends: Sequence[tuple[int, ...]]) -> bool:
    """Whether some of the nodes have a coarser resolution than all of these shapes."""
    return any(
        all(_coarser(node.shape, end) for end in ends if len(end) == len(node.shape))
        for node in nodes
        if _is_spatial(node) and len(node.shape) == len(ends[0])
    )


def _is_spatial(node: Node) -> bool:
    """Whether a node's result is a feature map (batch, channels, positions...)."""
    name = node.function
    return name.startswith("conv") or "pool" in name or name in ("interpolate", "pixel_unshuffle")


def _coarser(shape: tuple[int, ...], than: tuple[int, ...]) -> bool:
    pairs = list(zip(shape[2:], than[2:], strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
