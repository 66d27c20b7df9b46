"""The tensors between the blocks of Eq. 4, from one pass, with the graph that connects them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.features import Site
from stability_probe.skips import SkipConnection


@contextmanager
def feature_graph(
    model: nn.Module, skips: Sequence[SkipConnection], batch: ProbeBatch, *, cut: bool = False
) -> Iterator[dict[Site, Tensor]]:
    """Run a network and give the tensors between its blocks, by their names in Eq. 4.

    No parameter requires a gradient, and x_t does if gradients are on. Every tensor that is given
    lies on the path to the output, also where the network itself has it only as a part of another
    or writes over it later. All this lasts until the block is left: gradient checkpointing repeats
    parts of the pass in a backward pass.

    Args:
        model: the network, in the mode it is to run in.
        skips: its long skips.
        batch: the samples.
        cut: let no gradient through any κ_i u_i, nor through z_N: what then reaches x_t from the
            output goes around the skips and the middle, which nothing in Eq. 4 does.

    Yields:
        x (level 0), the encoder features f_i, u_i (what is made of f_i on its way to the merge)
        before scaling, κ_i u_i after it, z_i, merged_i, h_0 .. h_N and the output (level 0), each
        (batch, ...).
    """
    nodes: dict[Site, Tensor] = {}
    closed = [("ku", s.level) for s in skips] + [("z", len(skips))] if cut else []

    def keep(site: Site) -> Callable[[Tensor], Tensor]:
        def fn(tensor: Tensor) -> Tensor:
            kept = (tensor.detach() if site in closed else tensor).clone()
            nodes.setdefault(site, kept)  # a repeated pass does not count
            return kept.clone()

        return fn

    with ExitStack() as stack:
        for s in skips:
            taps = (
                (s.feature, ("f", s.level)),
                (s.skip, ("u", s.level)),
                (s.skip, ("ku", s.level)),
                (s.main, ("z", s.level)),
                (s.merged, ("merged", s.level)),
                (s.decoded, ("h", s.level - 1)),
            )
            for tap, site in taps:
                if tap is not None:  # u_i is the input
                    first = site[0] == "u"  # before any scaling
                    stack.callback(tap.attach(model, keep(site), first=first).remove)
        x = batch.x.detach().requires_grad_(torch.is_grad_enabled())
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        out = batch.call(model, x)
        nodes |= {("x", 0): x, ("output", 0): out}
        nodes |= {("f", s.level): x for s in skips if s.feature is None}
        if skips:
            nodes["h", len(skips)] = nodes["z", len(skips)]
        yield nodes
