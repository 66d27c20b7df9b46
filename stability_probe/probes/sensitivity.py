r"""Measurements on a fixed batch of inputs, taken at scheduled steps.

* **secants**: ‖UNet(x + δ) − UNet(x)‖/ε_δ, the largest over random directions and the one along
  the worst direction, at several ε_δ;
* **σ_max(J)** of the network's Jacobian, to which secants tend from below as ε_δ → 0;
* **Lipschitz constants at the point**: the Jacobian norms of every block a_i, b_i and the middle,
  from which Theorem 3.4's bound is built (a_1 includes the input layers, b_1 the output layers),
  and of every skip, from the encoder's feature to κ_i u_i: |κ_i| where κ_i is a constant and
  nothing else is done to the feature on its way; and how learned gates change with the input;
* **paths** (if asked for): κ_i‖P_i‖ and ‖P_mid‖, the norms of the paths through each skip and
  through the middle, and their parts in the worst case. Paths around all of them, as that of a
  global residual, are measured with every skip and the middle cut. What still misses from J is
  recorded as well: it is not zero where a skip's gate looks at the decoder, so that two paths
  share a way;
* **per-sample gradients**: ℓ_s and ‖∇_W ℓ_s‖² for Theorem 3.3, with the energies of x_t and h_i.

The model runs in evaluation mode, so that samples do not interact and nothing random is drawn;
its modes, gradients, buffers and the global random state are left as they were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.features import sample_energy
from stability_probe.probes.graph import feature_graph
from stability_probe.probes.jacobians import Jacobians
from stability_probe.probes.records import Key
from stability_probe.probes.sample_gradients import MEMORY, sample_gradients
from stability_probe.skips import Block, SkipConnection
from stability_probe.skips.find import evaluating


@dataclass(frozen=True)
class SensitivityConfig:
    """How the scheduled measurements are taken.

    Attributes:
        epsilons: sizes ε_δ of the perturbations, as fractions of ‖x_t‖.
        directions: random directions for each of them.
        rtol: how closely σ_max(J) is enclosed: its upper bound over its estimate, less 1.
        block_rtol: the same for blocks, skips and paths.
        max_products: most products with a Jacobian and its transpose for one norm.
        memory: bytes that the samples whose gradients are measured at once may take.
        paths: also measure the norms of the paths through every skip, through the middle and around
            them, at N + 2 more norms of the whole network.

    Raises:
        StabilityProbeError: if a number is not positive or there is no ε.
    """

    epsilons: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    directions: int = 4
    rtol: float = 1e-2
    block_rtol: float = 2e-2
    max_products: int = 60
    memory: int = MEMORY
    paths: bool = False

    def __post_init__(self) -> None:
        if not self.epsilons or min(self.epsilons) <= 0:
            raise StabilityProbeError(
                f"SensitivityConfig: epsilons must be positive fractions, got {self.epsilons}"
            )
        for name, least in (("directions", 1), ("max_products", 1), ("memory", 1)):
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
                    sample_gradients(self.model, self.blocks, self.batch, self.config.memory)
                )
        return found

    @torch.no_grad()
    def secants(self, batch: ProbeBatch, generator: torch.Generator) -> dict[Key, Tensor]:
        """The largest and the mean ‖Δoutput‖/ε_δ over random directions, for every ε_δ."""
        x, out = batch.x, batch.call(self.model)
        directions = [
            torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            for _ in range(self.config.directions)
        ]
        found: dict[Key, Tensor] = {}
        for fraction in self.config.epsilons:
            moved = [self._moved(batch, d, fraction) for d in directions]
            ratios = [sample_energy(there - out, len(x)).sqrt() / eps for there, eps in moved]
            site = f"eps={fraction:g}"
            found[Key("secant", site, 0, "")] = torch.stack(ratios).amax(0)
            found[Key("secant_mean", site, 0, "")] = torch.stack(ratios).mean(0)
        return found

    def jacobian_norms(self, batch: ProbeBatch, generator: torch.Generator) -> dict[Key, Tensor]:
        """Norms of Jacobians, and secants along the direction in which σ_max(J) is reached."""
        config = self.config
        norms = Jacobians(
            self.model, self.skips, batch, generator, config.rtol, config.block_rtol,
            config.max_products,
        )  # fmt: skip
        found, worst = norms.measure(paths=config.paths)
        return found | self._secants_along(batch, worst.view_as(batch.x))

    @torch.no_grad()
    def _secants_along(self, batch: ProbeBatch, direction: Tensor) -> dict[Key, Tensor]:
        """‖UNet(x + δ) − UNet(x − δ)‖/2ε_δ along a direction, for every ε_δ.

        Between two points at both sides of x curvature cancels, which along the worst direction
        would exceed σ_max(J) in proportion to ε_δ.
        """
        found: dict[Key, Tensor] = {}
        for fraction in self.config.epsilons:
            ahead, eps = self._moved(batch, direction, fraction)
            behind, _ = self._moved(batch, -direction, fraction)
            change = sample_energy(ahead - behind, len(batch.x)).sqrt()
            found[Key("secant_worst", f"eps={fraction:g}", 0, "")] = change / (2 * eps)
        return found

    def _moved(self, batch: ProbeBatch, d: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        """The output a step along d away, of length ε_δ = fraction · ‖x_t‖, and that length."""
        shape = (-1,) + (1,) * (d.ndim - 1)
        eps = fraction * sample_energy(batch.x).sqrt()
        delta = (d * (eps / sample_energy(d).sqrt()).view(shape)).to(batch.x.dtype)
        return batch.call(self.model, batch.x + delta), eps

    @torch.no_grad()
    def sample_energies(self) -> dict[Key, Tensor]:
        """‖x_t‖², ‖h_i‖² and the gains κ_i of every sample."""
        with feature_graph(self.model, self.skips, self.batch) as nodes:
            energies = {site: sample_energy(v, len(self.batch.x)) for site, v in nodes.items()}
        found = {Key("sample_energy", "x", 0, ""): energies["x", 0]}
        for i in range(len(self.skips) + 1 if self.skips else 0):
            found[Key("sample_energy", "h", i, "")] = energies["h", i]
        for s in self.skips:
            for site in ("ku", "z"):
                found[Key("sample_energy", site, s.level, "")] = energies[site, s.level]
            gain = energies["ku", s.level] / energies["u", s.level]
            found[Key("sample_kappa", "skip", s.level, "")] = gain.sqrt()
        return found
