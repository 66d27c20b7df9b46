"""The less used settings of a probe."""

from dataclasses import dataclass, field

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.sensitivity import SensitivityConfig


@dataclass(frozen=True)
class ProbeConfig:
    """The less used settings of a probe.

    Attributes:
        details_every: optimizer steps of which one, the first that is recorded, also records ‖θ‖²
            and the gradients of the loss with respect to features.
        updates: also record ‖Δθ‖/‖θ‖ per block; it costs a copy of the parameters.
        noise_bins: number of noise-level bins of equal width.
        noise_levels: the noise levels run from 0 to this (exclusive).
        flush_every: recorded steps that are kept on the device before they are stored.
        timeout: seconds that a flush waits for the other processes of a distributed training.
        sensitivity: how the scheduled measurements are taken.

    Raises:
        StabilityProbeError: if a number is not positive.
    """

    details_every: int = 10
    updates: bool = False
    noise_bins: int = 4
    noise_levels: float = 1000.0
    flush_every: int = 50
    timeout: float = 300.0
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)

    def __post_init__(self) -> None:
        for name in ("details_every", "noise_bins", "noise_levels", "flush_every", "timeout"):
            if getattr(self, name) <= 0:
                raise StabilityProbeError(
                    f"ProbeConfig: {name} must be positive, got {getattr(self, name)}"
                )
