"""See, prove, fix and guard the training stability of networks with long skip connections."""

from stability_probe.errors import StabilityProbeError
from stability_probe.models import TheoryUNet, UViT, UViTConfig
from stability_probe.probes import StabilityProbe
from stability_probe.runs import Run
from stability_probe.skips import (
    ConstantScaling,
    InverseSqrt2,
    LearnableScaling,
    SkipConnection,
    Uniform,
    Unscaled,
    find_skips,
    scale_skips,
)

__all__ = [
    "ConstantScaling",
    "InverseSqrt2",
    "LearnableScaling",
    "Run",
    "SkipConnection",
    "StabilityProbe",
    "StabilityProbeError",
    "TheoryUNet",
    "UViT",
    "UViTConfig",
    "Uniform",
    "Unscaled",
    "find_skips",
    "scale_skips",
]
