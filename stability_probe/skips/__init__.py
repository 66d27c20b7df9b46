"""Long skip connections: what one is, finding them, scaling them, and the blocks between them."""

from stability_probe.skips.blocks import Block, parameter_blocks
from stability_probe.skips.connection import SkipConnection
from stability_probe.skips.find import find_skips
from stability_probe.skips.scale import ScaledSkips, scale_skips
from stability_probe.skips.scaling import (
    SCHEME_NAMES,
    ConstantScaling,
    InverseSqrt2,
    LearnableScaling,
    Scaling,
    Uniform,
    Unscaled,
    parse_scaling,
)
from stability_probe.skips.taps import ArgumentTap, OutputTap, SliceTap, Tap

__all__ = [
    "SCHEME_NAMES",
    "ArgumentTap",
    "Block",
    "ConstantScaling",
    "InverseSqrt2",
    "LearnableScaling",
    "OutputTap",
    "ScaledSkips",
    "Scaling",
    "SkipConnection",
    "SliceTap",
    "Tap",
    "Uniform",
    "Unscaled",
    "find_skips",
    "parameter_blocks",
    "parse_scaling",
    "scale_skips",
]
