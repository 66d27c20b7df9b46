"""Norms of the Jacobians of a network, its blocks and its paths at the samples of a batch.

Each is enclosed: an estimate from below under a metric's own name, and under `..._upper` a bound
that is right but for the probability `theory.spectral.FAILURE`. κ_i P_i is the product
∂output/∂(κ_i u_i) · ∂(κ_i u_i)/∂x, whose factors leave all other paths out by themselves.

With v and w the leading right and left singular vectors of J, so that wᵀJv = σ_max:

* `path_share`: wᵀ(κ_i P_i)v / σ_max, how much of the worst case passes skip i; with the middle
  and what goes around they add up to 1;
* `path_alignment`: ‖κ_i P_i v‖ / ‖κ_i P_i‖, 1 where the network's worst direction is the path's;
* `gate_term`: ‖u_i ∂κ_i/∂x‖, what a learned gate adds to ∂(κ_i u_i)/∂x beside κ_i ∂u_i/∂x, and
  Theorem 3.4 leaves out; `gate_bound`: ‖u_i‖ ‖∂κ_i/∂x‖, which is no smaller.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.features import Site, sample_energy
from stability_probe.probes.graph import feature_graph
from stability_probe.probes.records import Key
from stability_probe.skips import LearnableScaling, SkipConnection
from stability_probe.theory import SpectralNorm, jacobian_norm, jacobian_products

X, OUTPUT = ("x", 0), ("output", 0)


@dataclass
class Jacobians:
    """One pass over a batch, and the norms that are taken of it.

    Attributes:
        model: the network, in the mode it is to run in.
        skips: its long skips.
        batch: the samples.
        generator: source of the starting vectors.
        rtol: how closely σ_max(J) is to be enclosed, relatively.
        part_rtol: the same for blocks and paths.
        max_products: most products with a Jacobian and its transpose for one norm.
    """

    model: nn.Module
    skips: Sequence[SkipConnection]
    batch: ProbeBatch
    generator: torch.Generator
    rtol: float
    part_rtol: float
    max_products: int

    def measure(self, *, paths: bool, blocks: bool = True) -> tuple[dict[Key, Tensor], Tensor]:
        """All norms, and the direction in which σ_max(J) is reached, (samples, n).

        Args:
            paths: measure what passes every skip, the middle, and around them.
            blocks: measure blocks, skips and gates.
        """
        with torch.enable_grad(), feature_graph(self.model, self.skips, self.batch) as nodes:
            whole = self._norm(nodes[OUTPUT], nodes[X], rtol=self.rtol)
            found = _enclosed(Key("sigma_max", "J", 0, ""), whole)
            if blocks:
                for key, out, into in self._blocks():
                    found |= _enclosed(key, self._norm(nodes[out], nodes[into]))
                found |= self._gates(nodes)
            if paths and self.skips:
                found |= self._paths(nodes, whole)
        return found, whole.right

    def _norm(
        self, output: Tensor, input: Tensor, via: Tensor | None = None, rtol: float | None = None
    ) -> SpectralNorm:
        return jacobian_norm(
            output, input, via=via, samples=len(self.batch.x), generator=self.generator,
            rtol=self.part_rtol if rtol is None else rtol, max_products=self.max_products,
        )  # fmt: skip

    def _blocks(self) -> Iterator[tuple[Key, Site, Site]]:
        """Blocks and skips: key, output, input. a_1 has the input layers, b_1 the output layers."""
        n = len(self.skips)
        if n:
            yield Key("lipschitz", "mid", 0, ""), ("z", n), ("f", n)
        for i in range(1, n + 1):
            yield Key("lipschitz", "a", i, ""), ("f", i), X if i == 1 else ("f", i - 1)
            yield Key("lipschitz", "skip", i, ""), ("ku", i), ("f", i)
            yield Key("lipschitz", "b", i, ""), OUTPUT if i == 1 else ("z", i - 1), ("merged", i)

    def _gates(self, nodes: Mapping[Site, Tensor]) -> dict[Key, Tensor]:
        """How the gates of learnable scaling (LS) change with the input."""
        found: dict[Key, Tensor] = {}
        schemes = [m for m in self.model.modules() if isinstance(m, LearnableScaling)]
        if len(schemes) != 1:
            return found
        for s in self.skips:
            u, i = nodes["u", s.level], s.level
            gate = schemes[0].gate(u, i)
            term, slope = self._norm(u.detach() * gate, nodes[X]), self._norm(gate, nodes[X])
            size = sample_energy(u, len(self.batch.x)).sqrt()
            found |= _enclosed(Key("gate_term", "skip", i, ""), term)
            found[Key("gate_bound", "skip", i, "")] = size * slope.upper
        return found

    def _paths(self, nodes: Mapping[Site, Tensor], whole: SpectralNorm) -> dict[Key, Tensor]:
        """Every path of Eq. 4, the paths that it has not, and how far all are from J."""
        n, x, out = len(self.skips), nodes[X], nodes[OUTPUT]
        vias = {Key("path", "skip", s.level, ""): nodes["ku", s.level] for s in self.skips}
        vias[Key("path", "mid", 0, "")] = nodes["z", n]
        w = torch.randn(out.shape, generator=self.generator, dtype=out.dtype).to(out.device)
        total = _pulled(out, x, w)
        gap = total.clone()
        found: dict[Key, Tensor] = {}
        for key, via in vias.items():
            gap -= _pulled(via, x, _pulled(out, via, w))
            found |= self._path(key, out, x, whole, via)
        with feature_graph(self.model, self.skips, self.batch, cut=True) as cut:
            rest = _pulled(cut[OUTPUT], cut[X], w) if cut[OUTPUT].requires_grad else None
            key = Key("path", "around", 0, "")
            if rest is not None and rest.any():
                gap -= rest
                found |= self._path(key, cut[OUTPUT], cut[X], whole)
            else:
                nothing = torch.zeros_like(whole.value)
                found |= dict.fromkeys((key, _upper(key)), nothing)
        missing = sample_energy(gap, len(self.batch.x)) / sample_energy(total, len(self.batch.x))
        found[Key("path_gap", "J", 0, "")] = missing.sqrt()
        return found

    def _path(
        self, key: Key, out: Tensor, x: Tensor, whole: SpectralNorm, via: Tensor | None = None
    ) -> dict[Key, Tensor]:
        """The norm of a path, and its part in the network's worst case."""
        norm = self._norm(out, x, via)
        push, _ = jacobian_products(out, x, via=via, samples=len(self.batch.x))
        pushed = push(whole.right)
        return _enclosed(key, norm) | {
            key._replace(metric="path_share"): (whole.left * pushed).sum(1) / whole.value,
            key._replace(metric="path_alignment"): pushed.norm(dim=1)
            / norm.value.clamp_min(torch.finfo(norm.value.dtype).tiny),
        }


def _pulled(later: Tensor, earlier: Tensor, w: Tensor) -> Tensor:
    """The product of wᵀ and ∂later/∂earlier."""
    return torch.autograd.grad(later, earlier, w, retain_graph=True)[0]


def _upper(key: Key) -> Key:
    return key._replace(metric=f"{key.metric}_upper")


def _enclosed(key: Key, norm: SpectralNorm) -> dict[Key, Tensor]:
    return {key: norm.value, _upper(key): norm.upper}
