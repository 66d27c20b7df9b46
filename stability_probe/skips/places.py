"""From a skip in the data flow to a description of it, with taps where its tensors pass.

Taps at module boundaries come first, because they work under `torch.compile`: an argument of the
module that makes the merge, or a slice of the concatenation as the next module's argument. Where
neither is exact (the tensor is used for something else there as well), the tap is at the operand of
the function call itself.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

from stability_probe.skips.connection import SkipConnection
from stability_probe.skips.flow import Call, Flow
from stability_probe.skips.operands import OperandTap
from stability_probe.skips.span import Span
from stability_probe.skips.taps import ArgumentTap, OutputTap, SliceTap, Tap


def describe(flow: Flow, spans: Sequence[Span]) -> list[SkipConnection]:
    """The skips of a data flow, with their taps.

    Args:
        flow: the data flow.
        spans: the skips in it, outermost first.
    """
    places = _Places(flow)
    last_branch = max((s.branch for s in spans), default=0)
    found: list[SkipConnection] = []
    for level, span in enumerate(spans, start=1):
        sink, merged = places.merged(span)
        main = places.operand(span, span.main, merged)
        source = places.source(span)
        decoded = found[-1].main if found else places.decoded(span, last_branch)
        found.append(
            SkipConnection(
                level=level,
                source=source.module if source else "",
                sink=sink,
                merge=span.kind,
                shape=span.operand_shape(span.operand)[1:],
                kappa=places.kappa(span),
                feature=places.feature(span),
                skip=places.operand(span, span.operand, merged),
                main=main,
                merged=merged,
                decoded=decoded,
            )
        )
    return found


class _Places:
    """Where the tensors of a data flow pass."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    @cached_property
    def users(self) -> dict[int, set[int]]:
        """For every node the nodes that take its result."""
        users: dict[int, set[int]] = defaultdict(set)
        for node in self.flow.nodes:
            for parent in node.parents:
                users[parent].add(node.index)
        return users

    @cached_property
    def calls_of(self) -> dict[str, int]:
        """How often every module is called."""
        count: dict[str, int] = defaultdict(int)
        for call in self.flow.calls:
            count[call.path] += 1
        return count

    def number(self, call: Call) -> int | None:
        """Which of its module's calls a call is, if there are several."""
        return call.number if self.calls_of[call.path] > 1 else None

    def source(self, span: Span) -> OutputTap | None:
        """The module that u_i came out of last; `None` if it is the network's input."""
        node = span.branch
        while node > 0:
            if (tap := self._output(node, span)) is not None:
                return tap
            node = max(self.flow.nodes[node].carriers, key=lambda n: self.flow.nodes[n].depth)
        return None

    def feature(self, span: Span) -> Tap | None:
        """The last place that all of u_i passes in the encoder; `None` if it is the input.

        That is the source's output, unless u_i is a sum that no module puts out.
        """
        node = span.branch
        while node > 0:
            if (tap := self._output(node, span)) is not None:
                return tap
            about = self.flow.nodes[node]
            if len(about.parents) > 1:
                return self._at_call(node, None) if about.merge else self.source(span)
            (node,) = about.parents
        return None

    def _output(self, node: int, span: Span) -> OutputTap | None:
        """The outermost module that puts out a node alone, and does so before the merge."""
        for call in self.flow.calls[1:]:
            made = call.entered <= node < call.left  # an identity that runs later did not make it
            if made and call.outputs == [node] and call.left <= span.merge:
                return OutputTap(call.path, self.number(call))
        return None

    def merged(self, span: Span) -> tuple[str, Tap]:
        """The module that reads the merged tensor, and a tap on that tensor."""
        later = [c for c in self.flow.calls if c.entered > span.merge]
        for call in later:
            for (argument, item), node in call.arguments.items():
                if node == span.merge:
                    return call.path, ArgumentTap(call.path, argument, item, self.number(call))
        reader = next((c for c in later if self._reads(c, span.merge)), None)
        maker = self.flow.calls[span.node.call]
        return (reader or maker).path, self._at_call(span.merge, None)

    def operand(self, span: Span, position: int, merged: Tap) -> Tap:
        """A tap that sees, and replaces, one operand of the merge and nothing else."""
        return (
            self._as_argument(span, position)
            or self._as_slice(span, position, merged)
            or self._at_call(span.merge, position)
        )

    def decoded(self, span: Span, last_branch: int) -> Tap:
        """The output of b_1: of the decoder, as far as it is a module of its own."""
        around = [
            call
            for call in self.flow.calls[1:]
            if call.entered > last_branch and self.flow.within(span.node.call, call.index)
        ]
        readers = [c for c in self.flow.calls[1:] if span.merge in c.arguments.values()]
        for call in (*around, *readers):
            results = [node for node in call.outputs[:1] if node >= 0]
            if results and self.flow.depends(results[0], span.merge):
                return OutputTap(call.path, self.number(call))
        return OutputTap("")

    def kappa(self, span: Span) -> float | None:
        """The number that u_i is multiplied by on its way, if nothing else happens to it."""
        assert span.node.merge is not None
        factors = span.node.merge.factors
        kappa, node = factors[span.operand], span.operand_node(span.operand)
        if factors[span.main] != 1 or kappa is None:
            return None
        while node != span.branch:
            about = self.flow.nodes[node]
            if about.factor is None or len(about.carriers) != 1:
                return None
            kappa *= about.factor
            node = next(iter(about.carriers))
        return kappa

    def _reads(self, call: Call, node: int) -> bool:
        return any(self.flow.depends(given, node) for given in call.arguments.values())

    def _as_argument(self, span: Span, position: int) -> ArgumentTap | None:
        call, node = self.flow.calls[span.node.call], span.operand_node(position)
        places = [place for place, given in call.arguments.items() if given == node]
        inside = {
            user
            for user in self.users[node]
            if self.flow.within(self.flow.nodes[user].call, call.index)
        }
        if len(places) != 1 or inside != {span.merge} or node in call.outputs:
            return None
        return ArgumentTap(call.path, *places[0], self.number(call))

    def _as_slice(self, span: Span, position: int, merged: Tap) -> SliceTap | None:
        about = span.node.merge
        if about is None or about.kind != "concat" or not isinstance(merged, ArgumentTap):
            return None
        reader = next(c for c in self.flow.calls if span.merge in c.arguments.values())
        elsewhere = [
            user
            for user in self.users[span.merge]
            if not self.flow.within(self.flow.nodes[user].call, reader.index)
        ]
        if elsewhere or span.merge in self.flow.calls[0].outputs:
            return None
        lengths = [shape[about.dim] for _, shape in about.operands]
        return SliceTap(merged, about.dim, lengths[position], sum(lengths[:position]))

    def _at_call(self, merge: int, operand: int | None) -> OperandTap:
        """A tap at the function call that makes a merge."""
        node = self.flow.nodes[merge]
        call, about = self.flow.calls[node.call], node.merge
        assert about is not None
        return OperandTap(
            call.path, about.kind, about.line, about.ordinal, operand, self.number(call)
        )
