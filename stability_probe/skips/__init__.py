"""Long skip connections: what one is, finding them, scaling them, and the blocks between them."""

from stability_probe.skips.blocks import Block, parameter_blocks
from stability_probe.skips.connection import SkipConnection, SkipWarning
from stability_probe.skips.find import choose_skips, find_skips
from stability_probe.skips.freeu import FreeU
from stability_probe.skips.names import SCHEME_NAMES, parse_scaling
from stability_probe.skips.operands import OperandTap
from stability_probe.skips.sc_tuner import SCTuner
from stability_probe.skips.scale import ScaledSkips, scale_skips
from stability_probe.skips.scaling import (
    ConstantScaling,
    FixedScaling,
    InverseSqrt2,
    LearnableScaling,
    Scaling,
    Uniform,
    Unscaled,
)
from stability_probe.skips.taps import ArgumentTap, OutputTap, SliceTap, Tap

__all__ = [
    "SCHEME_NAMES",
    "ArgumentTap",
    "Block",
    "ConstantScaling",
    "FixedScaling",
    "FreeU",
    "InverseSqrt2",
    "LearnableScaling",
    "OperandTap",
    "OutputTap",
    "SCTuner",
    "ScaledSkips",
    "Scaling",
    "SkipConnection",
    "SkipWarning",
    "SliceTap",
    "Tap",
    "Uniform",
    "Unscaled",
    "choose_skips",
    "find_skips",
    "parameter_blocks",
    "parse_scaling",
    "scale_skips",
]
