r"""What `suggesting` keeps below a budget, measured with every skip multiplied by a number m_i."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_probe.errors import StabilityProbeError
from stability_probe.probes import Key, ProbeBatch, SensitivityConfig
from stability_probe.probes.features import sample_energy
from stability_probe.probes.graph import feature_graph
from stability_probe.probes.jacobians import Jacobians
from stability_probe.skips import FixedScaling, SkipConnection, SkipWarning, scale_skips
from stability_probe.skips.find import evaluating


@dataclass(frozen=True)
class Norms:
    """Certified upper bounds of norms at every point, a sample at a noise level.

    Attributes:
        paths: κ_i‖P_i‖, shape (N, points).
        rest: ‖P_mid‖ and what goes around Eq. 4's paths, shape (points,).
        sigma_max: σ_max(J), shape (points,).
        gap: the part of J that no path explains, shape (points,).
    """

    paths: np.ndarray
    rest: np.ndarray
    sigma_max: np.ndarray
    gap: np.ndarray

    @property
    def pathwise(self) -> np.ndarray:
        """Σκ_i‖P_i‖ + ‖P_mid‖ + around, shape (points,)."""
        return np.asarray(self.paths.sum(axis=0) + self.rest)


@dataclass(frozen=True)
class BudgetedNetwork:
    """A network whose skips are multiplied and measured.

    Attributes:
        model: the network, whatever scales its skips attached.
        skips: its long skips.
        points: the samples at every noise level.
        config: how norms are taken.
        seed: of their starting vectors.
        on_measured: called after every measurement.
    """

    model: nn.Module
    skips: Sequence[SkipConnection]
    points: Sequence[ProbeBatch]
    config: SensitivityConfig
    seed: int
    on_measured: Callable[[], None] = lambda: None

    def norms(self, m: np.ndarray) -> Norms:
        """Norms of the network and its paths, on the leading samples of every noise level."""
        found = [self._norms(batch.head(batch.sensitive), m) for batch in self.points]
        self.on_measured()
        paths, rest, sigma, gap = (
            np.concatenate([getattr(n, name) for n in found], axis=-1)
            for name in ("paths", "rest", "sigma_max", "gap")
        )
        if not np.isfinite([*paths, rest, sigma]).all():
            raise StabilityProbeError(
                f"suggest: {type(self.model).__name__} has a Jacobian that is not finite at the "
                "samples; give it others, or --dtype float32"
            )
        return Norms(paths, rest, sigma, gap)

    def energies(self, m: np.ndarray) -> np.ndarray:
        """The mean of ‖h_0‖²/‖x_t‖² at every noise level."""
        found = np.array([self._energy(batch, m) for batch in self.points])
        self.on_measured()
        if not np.isfinite(found).all():
            raise StabilityProbeError(
                f"suggest: {type(self.model).__name__} has features that are not finite at the "
                "samples; give it others, or --dtype float32"
            )
        return found

    def energies_without(self) -> np.ndarray:
        """The same with one skip alone turned off, shape (N, noise levels)."""
        return np.stack([self.energies(1 - row) for row in np.eye(len(self.skips))])

    @contextmanager
    def _scaled(self, m: np.ndarray) -> Iterator[None]:
        """Every skip multiplied; nothing here is compiled, so that no warning of it is due."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SkipWarning)
            scaled = scale_skips(self.model, self.skips, FixedScaling(m.tolist()))
        with scaled:
            yield

    def _norms(self, batch: ProbeBatch, m: np.ndarray) -> Norms:
        generator = torch.Generator().manual_seed(self.seed)
        norms = Jacobians(
            self.model, self.skips, batch, generator, self.config.rtol, self.config.block_rtol,
            self.config.max_products,
        )  # fmt: skip
        with (
            evaluating(self.model),
            sdpa_kernel(SDPBackend.MATH),
            self._scaled(m),
        ):
            found, _ = norms.measure(paths=True, blocks=False)

        def taken(metric: str, site: str, level: int = 0) -> np.ndarray:
            value: Tensor = found[Key(metric, site, level, "")]
            return np.asarray(value.double().cpu().numpy())

        return Norms(
            paths=np.stack([taken("path_upper", "skip", s.level) for s in self.skips]),
            rest=taken("path_upper", "mid") + taken("path_upper", "around"),
            sigma_max=taken("sigma_max_upper", "J"),
            gap=np.nan_to_num(taken("path_gap", "J")),  # NaN where J is 0
        )

    @torch.no_grad()
    def _energy(self, batch: ProbeBatch, m: np.ndarray) -> float:
        with (
            evaluating(self.model),
            self._scaled(m),
            feature_graph(self.model, self.skips, batch) as nodes,
        ):
            n = len(batch.x)
            ratio = sample_energy(nodes["h", 0], n) / sample_energy(nodes["x", 0], n)
        return ratio.double().mean().item()
