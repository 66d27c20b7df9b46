"""Scaling schemes by the names that the command line has for them."""

from collections.abc import Callable

import torch

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.freeu import FreeU
from stability_probe.skips.sc_tuner import SCTuner
from stability_probe.skips.scaling import (
    ConstantScaling,
    FixedScaling,
    InverseSqrt2,
    LearnableScaling,
    Scaling,
    Uniform,
    Unscaled,
)

Seed = torch.Generator | None

_PLAIN: dict[str, Callable[[Seed], Scaling]] = {
    "unscaled": lambda _: Unscaled(),
    "inverse-sqrt2": lambda _: InverseSqrt2(),
    "ls": lambda generator: LearnableScaling(generator=generator),
    "ls-non-shared": lambda generator: LearnableScaling(shared=False, generator=generator),
    "freeu": lambda _: FreeU(),
    "sc-tuner": lambda generator: SCTuner(generator=generator),
}
_WITH_NUMBER: dict[str, Callable[[float], Scaling]] = {"uniform": Uniform, "cs": ConstantScaling}
SCHEME_NAMES = (
    "unscaled", "inverse-sqrt2", "uniform:C", "cs:KAPPA", "kappa:C,C,C", "ls", "ls-non-shared",
    "freeu", "sc-tuner",
)  # fmt: skip
"""The names that `parse_scaling` takes."""


def parse_scaling(text: str, generator: torch.Generator | None = None) -> Scaling:
    """A scheme from its name on the command line.

    Args:
        text: `unscaled`, `inverse-sqrt2`, `uniform:C`, `cs:KAPPA`, `kappa:C,C,C` (one number a
            skip), `ls`, `ls-non-shared`, `freeu` or `sc-tuner`, the last two with their published
            defaults.
        generator: source of the initial weights, where the scheme has some; `None` is seeded
            with 0.

    Raises:
        StabilityProbeError: if the name is unknown or its number is missing or out of range.

    >>> parse_scaling("cs:0.7").coefficients(2)
    [1.0, 0.7]
    """
    name, colon, argument = text.partition(":")
    if name in _PLAIN and not colon:
        return _PLAIN[name](generator)
    if name in _WITH_NUMBER:
        return _WITH_NUMBER[name](_number(text, argument))
    if name == "kappa":
        return FixedScaling([_number(text, part) for part in argument.split(",")])
    raise StabilityProbeError(f"unknown scheme {text!r}; choose from {', '.join(SCHEME_NAMES)}")


def _number(text: str, argument: str) -> float:
    try:
        return float(argument)
    except ValueError:
        name = text.partition(":")[0]
        needed, example = (
            ("numbers with commas between them", "1,0.8,0.5")
            if name == "kappa"
            else ("a number", "0.7")
        )
        raise StabilityProbeError(
            f"scheme {text!r}: {needed} must follow {name!r}, as in {name}:{example}"
        ) from None
