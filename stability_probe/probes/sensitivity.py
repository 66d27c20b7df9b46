r"""Measurements on a fixed batch of inputs, taken at scheduled steps.

* **secants**: ‖UNet(x + δ) − UNet(x)‖/ε_δ, the largest over random directions, at several ε_δ;
* **σ_max(J)** of the network's Jacobian, to which secants tend from below as ε_δ → 0;
* **Lipschitz constants at the point**: the Jacobian norms of every block a_i, b_i and the middle,
  from which Theorem 3.4's bound is built (a_1 includes the input layers, b_1 the output layers);
* **per-sample gradients**: ℓ_s and ‖∇_W ℓ_s‖² for Theorem 3.3, with the energies of x_t and h_i.

The model runs in evaluation mode, so that samples do not interact and nothing random is drawn;
its modes, gradients, buffers and the global random state are left as they were.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.features import Site, sample_energy
from stability_probe.probes.records import Key
from stability_probe.skips import Block, OutputTap, SkipConnection
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
        chunk: samples whose gradients are held at once.

    Raises:
        StabilityProbeError: if a number is not positive or there is no ε.
    """

    epsilons: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    directions: int = 4
    rtol: float = 5e-3
    block_rtol: float = 5e-3
    max_products: int = 60
    chunk: int = 32

    def __post_init__(self) -> None:
        if not self.epsilons or min(self.epsilons) <= 0:
            raise StabilityProbeError(
                f"SensitivityConfig: epsilons must be positive fractions, got {self.epsilons}"
            )
        for name in ("directions", "max_products", "chunk"):
            if getattr(self, name) < 1:
                raise StabilityProbeError(
                    f"SensitivityConfig: {name} must be at least 1, got {getattr(self, name)}"
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
                found.update(self.sample_gradients())
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
        """σ_max(J), and the norm of every block's own Jacobian, from one graph."""
        with torch.enable_grad():
            nodes = self._graph(batch)
            n = len(self.skips)

            def norm(out: Site, into: Site, rtol: float) -> SpectralNorm:
                return jacobian_norm(
                    nodes[out], nodes[into], generator=generator, rtol=rtol,
                    max_products=self.config.max_products,
                )  # fmt: skip

            whole = norm(("output", 0), ("x", 0), self.config.rtol)
            found = {
                Key("sigma_max", "J", 0, ""): whole.value,
                Key("sigma_max_residual", "J", 0, ""): whole.residual,
            }
            edges = [(Key("lipschitz", "mid", 0, ""), ("z", n), ("u", n))] if n else []
            for i in range(1, n + 1):
                before = ("x", 0) if i == 1 else ("u", i - 1)
                after = ("output", 0) if i == 1 else ("z", i - 1)
                edges.append((Key("lipschitz", "a", i, ""), ("u", i), before))
                edges.append((Key("lipschitz", "b", i, ""), after, ("merged", i)))
            for key, out, into in edges:
                block = norm(out, into, self.config.block_rtol)
                found[key] = block.value + block.residual
        return found

    @torch.no_grad()
    def sample_energies(self) -> dict[Key, Tensor]:
        """‖x_t‖², ‖h_i‖² and the gains κ_i of every sample."""
        nodes = self._graph(self.batch)
        found = {Key("sample_energy", "x", 0, ""): sample_energy(self.batch.x)}
        for (site, level), tensor in nodes.items():
            if site == "h":
                found[Key("sample_energy", "h", level, "")] = sample_energy(tensor)
        for s in self.skips:
            gain = sample_energy(nodes["ku", s.level]) / sample_energy(nodes["u", s.level])
            found[Key("sample_kappa", "skip", s.level, "")] = gain.sqrt()
        return found

    def sample_gradients(self) -> dict[Key, Tensor]:
        """ℓ_s, and for every block a_i, b_i the largest ‖∇_W ℓ_s‖² over its weight matrices W."""
        frozen = {name: p.detach() for name, p in self.model.named_parameters()}
        weights = {
            name: frozen[name]
            for name, p in self.model.named_parameters()
            if p.requires_grad and p.ndim > 1 and self.blocks[name].kind in ("a", "b")
        }
        if not weights:
            return {}

        def loss(weights: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
            one = self.batch.with_tensors([tensor[None] for tensor in sample])
            all_of_them = {**frozen, **weights}
            return one.losses(lambda *a, **kw: functional_call(self.model, all_of_them, a, kw))[0]

        def energies(sample: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            grads, value = grad_and_value(loss)(weights, sample)
            return {name: g.square().sum() for name, g in grads.items()}, value

        per_weight, losses = vmap(energies, chunk_size=self.config.chunk)(self.batch.tensors())
        found = {Key("sample_loss", "loss", 0, ""): losses}
        for name, energy in per_weight.items():
            block = self.blocks[name]
            key = Key("sample_grad_energy", block.kind, block.level, "")
            found[key] = torch.maximum(found[key], energy) if key in found else energy
        return found

    def _graph(self, batch: ProbeBatch) -> dict[Site, Tensor]:
        """Run the network and keep the tensors between its blocks, by their names in Eq. 4."""
        nodes: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[[Tensor], None]:
            def fn(tensor: Tensor) -> None:
                nodes[site] = tensor

            return fn

        with ExitStack() as stack:
            for s in self.skips:
                taps = (
                    (s.skip, ("u", s.level)),
                    (s.skip, ("ku", s.level)),
                    (s.main, ("z", s.level)),
                    (s.merged, ("merged", s.level)),
                    (OutputTap(s.block), ("h", s.level - 1)),
                )
                for tap, site in taps:
                    first = site[0] == "u"  # before any scaling
                    stack.callback(tap.attach(self.model, keep(site), first=first).remove)
            x = batch.x.detach().requires_grad_(torch.is_grad_enabled())
            frozen = {name: p.detach() for name, p in self.model.named_parameters()}
            out = batch.call(lambda *args, **kw: functional_call(self.model, frozen, args, kw), x)
        n = len(self.skips)
        if n:
            nodes["h", n] = nodes["z", n]
        return {**nodes, ("x", 0): x, ("output", 0): out}
