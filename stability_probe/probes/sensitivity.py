r"""Measurements on a fixed batch of inputs, taken at scheduled steps.

* **secants**: ‖UNet(x + δ) − UNet(x)‖/ε_δ, the largest over random directions, at several ε_δ;
* **σ_max(J)** of the network's Jacobian, to which secants tend from below as ε_δ → 0;
* **Lipschitz constants at the point**: the Jacobian norms of every block a_i, b_i and the middle,
  from which Theorem 3.4's bound is built (a_1 includes the input layers, b_1 the output layers),
  and of every skip, from the encoder's feature to κ_i u_i: |κ_i| where κ_i is a constant and
  nothing else is done to the feature on its way;
* **paths** (if asked for): κ_i‖P_i‖ and ‖P_mid‖, the norms of the paths through each skip and
  through the middle. κ_i P_i is the product ∂output/∂(κ_i u_i) · ∂(κ_i u_i)/∂x, whose factors leave
  all other paths out by themselves. Paths around all of them, as that of a global residual, are
  measured with every skip and the middle cut. What still misses from J is recorded as well: it is
  not zero where a skip's gate looks at the decoder, so that two paths share a way;
* **per-sample gradients**: ℓ_s and ‖∇_W ℓ_s‖² for Theorem 3.3, with the energies of x_t and h_i.

The model runs in evaluation mode, so that samples do not interact and nothing random is drawn;
its modes, gradients, buffers and the global random state are left as they were.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.features import Site, sample_energy
from stability_probe.probes.graph import feature_graph
from stability_probe.probes.records import Key
from stability_probe.probes.sample_gradients import sample_gradients
from stability_probe.skips import Block, SkipConnection
from stability_probe.skips.find import evaluating
from stability_probe.theory import SpectralNorm, jacobian_norm


@dataclass(frozen=True)
class SensitivityConfig:
    """How the scheduled measurements are taken.

    Attributes:
        epsilons: sizes ε_δ of the perturbations, as fractions of ‖x_t‖.
        directions: random directions for each of them.
        rtol: relative tolerance on the residual of σ_max(J).
        block_rtol: the same for the blocks; their residuals are added, which covers the estimate's
            own error.
        max_products: most products with a Jacobian and its transpose for one norm.
        chunk: samples whose gradients are held at once; 0 takes one sample after the other without
            `torch.vmap`, which not every network can be put through.
        paths: also measure the norms of the paths through every skip, through the middle and around
            them, at N + 2 more norms of the whole network.

    Raises:
        StabilityProbeError: if a number is not positive or there is no ε.
    """

    epsilons: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    directions: int = 4
    rtol: float = 5e-3
    block_rtol: float = 5e-3
    max_products: int = 60
    chunk: int = 32
    paths: bool = False

    def __post_init__(self) -> None:
        if not self.epsilons or min(self.epsilons) <= 0:
            raise StabilityProbeError(
                f"SensitivityConfig: epsilons must be positive fractions, got {self.epsilons}"
            )
        for name, least in (("directions", 1), ("max_products", 1), ("chunk", 0)):
            if getattr(self, name) < least:
                raise StabilityProbeError(
                    f"SensitivityConfig: {name} must be at least {least}, got {getattr(self, name)}"
                )


@dataclass
class SensitivityProbe:
    """Takes the scheduled measurements.

    Attributes:
        model: the model.
        skips: its long skips.
        blocks: the block of every parameter by name.
        batch: the samples.
        config: how to measure.
        generator: source of the random directions; the same ones are used every time.
    """

    model: nn.Module
    skips: Sequence[SkipConnection]
    blocks: Mapping[str, Block]
    batch: ProbeBatch
    config: SensitivityConfig = field(default_factory=SensitivityConfig)
    seed: int = 0

    def measure(self) -> dict[Key, Tensor]:
        """All measurements now: for each key without a sample, a vector over samples."""
        generator = torch.Generator().manual_seed(self.seed)
        few = self.batch.head(self.batch.sensitive)
        with evaluating(self.model), sdpa_kernel(SDPBackend.MATH):
            found = self.secants(few, generator)
            found.update(self.jacobian_norms(few, generator))
            found.update(self.sample_energies())
            if self.batch.target is not None:
                found.update(
                    sample_gradients(self.model, self.blocks, self.batch, self.config.chunk)
                )
        return found

    @torch.no_grad()
    def secants(self, batch: ProbeBatch, generator: torch.Generator) -> dict[Key, Tensor]:
        """The largest and the mean ‖Δoutput‖/ε_δ over random directions, for every ε_δ."""
        x, out = batch.x, batch.call(self.model)
        size = sample_energy(x).sqrt()
        shape = (-1,) + (1,) * (x.ndim - 1)
        directions = [
            torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            for _ in range(self.config.directions)
        ]
        found: dict[Key, Tensor] = {}
        for fraction in self.config.epsilons:
            eps = fraction * size
            ratios = []
            for d in directions:
                delta = (d * (eps / sample_energy(d).sqrt()).view(shape)).to(x.dtype)
                change = batch.call(self.model, x + delta) - out
                ratios.append(sample_energy(change).sqrt() / eps)
            site = f"eps={fraction:g}"
            found[Key("secant", site, 0, "")] = torch.stack(ratios).amax(0)
            found[Key("secant_mean", site, 0, "")] = torch.stack(ratios).mean(0)
        return found

    def jacobian_norms(self, batch: ProbeBatch, generator: torch.Generator) -> dict[Key, Tensor]:
        """σ_max(J), and the norms of every block's and path's Jacobian, from one graph."""
        with torch.enable_grad(), feature_graph(self.model, self.skips, batch) as nodes:

            def norm(out: Site, into: Site, rtol: float, via: Site | None = None) -> SpectralNorm:
                through = nodes[via] if via else None
                return jacobian_norm(
                    nodes[out], nodes[into], via=through, samples=len(batch.x), rtol=rtol,
                    generator=generator, max_products=self.config.max_products,
                )  # fmt: skip

            whole = norm(("output", 0), ("x", 0), self.config.rtol)
            found = {
                Key("sigma_max", "J", 0, ""): whole.value,
                Key("sigma_max_residual", "J", 0, ""): whole.residual,
            }
            for key, out, into, via in self._parts():
                part = norm(out, into, self.config.block_rtol, via)
                found[key] = part.value + part.residual
            if self.config.paths and self.skips:
                found |= self._other_paths(nodes, batch, generator)
        return found

    def _parts(self) -> Iterator[tuple[Key, Site, Site, Site | None]]:
        """The parts of the network that have norms of their own: key, output, input, and via."""
        n = len(self.skips)
        x, out = ("x", 0), ("output", 0)
        if n:
            yield Key("lipschitz", "mid", 0, ""), ("z", n), ("f", n), None
        for i in range(1, n + 1):
            before = x if i == 1 else ("f", i - 1)
            after = out if i == 1 else ("z", i - 1)
            yield Key("lipschitz", "a", i, ""), ("f", i), before, None
            yield Key("lipschitz", "skip", i, ""), ("ku", i), ("f", i), None
            yield Key("lipschitz", "b", i, ""), after, ("merged", i), None
        if self.config.paths:
            for path in self._paths():
                yield path, out, x, _via(path, n)

    def _paths(self) -> list[Key]:
        """The paths of Eq. 4: through every skip, and through the middle."""
        if not self.skips:
            return []
        return [Key("path", "skip", s.level, "") for s in self.skips] + [Key("path", "mid", 0, "")]

    def _other_paths(
        self, nodes: Mapping[Site, Tensor], batch: ProbeBatch, generator: torch.Generator
    ) -> dict[Key, Tensor]:
        """Norm of the paths that Eq. 4 has not, and how far all paths together are from J."""
        x, out = nodes["x", 0], nodes["output", 0]
        n, samples = len(self.skips), len(batch.x)
        w = torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out.device)

        def pull(later: Tensor, earlier: Tensor, w: Tensor) -> Tensor:
            return torch.autograd.grad(later, earlier, w, retain_graph=True)[0]

        total = pull(out, x, w)
        gap = total.clone()
        for path in self._paths():
            via = nodes[_via(path, n)]
            gap -= pull(via, x, pull(out, via, w))
        around = torch.zeros(samples, dtype=out.dtype, device=out.device)
        with feature_graph(self.model, self.skips, batch, cut=True) as cut:
            x, out = cut["x", 0], cut["output", 0]
            rest = pull(out, x, w) if out.requires_grad else torch.zeros_like(x)
            if rest.any():
                gap -= rest
                found = jacobian_norm(
                    out, x, generator=generator, samples=samples, rtol=self.config.block_rtol,
                    max_products=self.config.max_products,
                )  # fmt: skip
                around = found.value + found.residual
        missing = (sample_energy(gap) / sample_energy(total)).sqrt()
        return {Key("path", "around", 0, ""): around, Key("path_gap", "J", 0, ""): missing}

    @torch.no_grad()
    def sample_energies(self) -> dict[Key, Tensor]:
        """‖x_t‖², ‖h_i‖² and the gains κ_i of every sample."""
        with feature_graph(self.model, self.skips, self.batch) as nodes:
            energies = {site: sample_energy(v, len(self.batch.x)) for site, v in nodes.items()}
        found = {Key("sample_energy", "x", 0, ""): energies["x", 0]}
        for i in range(len(self.skips) + 1 if self.skips else 0):
            found[Key("sample_energy", "h", i, "")] = energies["h", i]
        for s in self.skips:
            gain = energies["ku", s.level] / energies["u", s.level]
            found[Key("sample_kappa", "skip", s.level, "")] = gain.sqrt()
        return found


def _via(path: Key, n_skips: int) -> Site:
    """The tensor that everything on a path passes, and nothing else."""
    return ("ku", path.level) if path.site == "skip" else ("z", n_skips)
