"""The graph of a forward pass: function calls that the main input reaches, and module calls."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Node:
    """A function call that the main input reaches.

    Attributes:
        index: its number in the order of execution; the main input is 0.
        function: the function's name.
        parents: the nodes whose results it takes.
        carriers: those of them whose content goes on. Of a product's factors, one that is spread
            over the other is a gate on it and not carried, nor is that of two alike which is
            further from the input.
        depth: longest path from the input along carriers.
        call: the module call that it is executed in.
        shape: the (first) result's shape.
        parametric: whether a parameter takes part, or its module has parameters of its own.
        factor: the number that the carrier's values are multiplied by, if that is all it does.
        merge: what it joins, if it is a merge.
    """

    index: int
    function: str
    parents: frozenset[int]
    carriers: frozenset[int]
    depth: int
    call: int
    shape: tuple[int, ...]
    parametric: bool
    factor: float | None = None
    merge: "MergeCall | None" = None


@dataclass(frozen=True)
class MergeCall:
    """What is known of a merge: see `Merge`, and its place among the merges of its module call.

    Attributes:
        kind: `"concat"` or `"add"`.
        operands: node (-1: not reached by the main input) and shape of every operand.
        factors: what the call itself multiplies each of them by.
        dim: the dimension of a concatenation.
        line: the line in the `forward` of the module that makes it, or 0 if it is not known.
        ordinal: how many merges of this kind come before it on the same line of the same call.
        file: the file of that line.
    """

    kind: Literal["concat", "add"]
    operands: tuple[tuple[int, tuple[int, ...]], ...]
    factors: tuple[float | None, ...]
    dim: int
    line: int
    ordinal: int
    file: str


@dataclass
class Call:
    """A call of a module.

    Attributes:
        index: its number; 0 is the model's own.
        path: the module's dotted path.
        type_name: the module's class.
        parent: the call around it.
        number: how many calls of the same module came before it.
        entered: how many nodes there were when it began.
        left: how many when it ended.
        arguments: the node that every argument holds, by name and, in a tuple, by place from its
            end.
        outputs: the nodes of the tensors that it returned; -1 where the input does not reach.
    """

    index: int
    path: str
    type_name: str
    parent: int
    number: int
    entered: int
    left: int = 0
    arguments: dict[tuple[str, int | None], int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Flow:
    """The data flow of a forward pass.

    Attributes:
        nodes: the function calls, in the order of execution.
        calls: the module calls likewise.
        ancestors: for each node a bit set of the nodes that it depends on, itself included.
        carried: the same along carriers alone.
    """

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ancestors: list[int] = field(default_factory=list)
    carried: list[int] = field(default_factory=list)

    def add(self, **about: Any) -> int:
        """Append a node."""
        node = Node(index=len(self.nodes), **about)
        self.nodes.append(node)
        for sets, parents in ((self.ancestors, node.parents), (self.carried, node.carriers)):
            bits = 1 << node.index
            for parent in parents:
                bits |= sets[parent]
            sets.append(bits)
        return node.index

    def depends(self, node: int, on: int) -> bool:
        """Whether a node depends on another, or is it."""
        return bool(self.ancestors[node] >> on & 1)

    def carries(self, node: int, content_of: int) -> bool:
        """Whether a node carries the content of another on, or is it."""
        return bool(self.carried[node] >> content_of & 1)

    def within(self, call: int, outer: int) -> bool:
        """Whether a call is another or inside it."""
        while call > outer:
            call = self.calls[call].parent
        return call == outer
