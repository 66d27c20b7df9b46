"""Runs over seeds, on disk, that differ by chance and, if asked, by a known factor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stability_probe.runs import Run
from stability_probe.verify import Evidence
from tests.oracles.evidence import complete, stored

NORMS = ("sigma_max", "secant", "lipschitz", "path")
SPREAD = 0.04
"""Deviation over seeds of the logarithm of every quantity."""


def spread_over(
    evidence: Evidence, seed: int, factors: Mapping[tuple, float] | None = None
) -> Evidence:
    """The evidence as another seed might have it.

    All of a quantity at a level goes up or down together, by chance, and where `factors` has
    (metric, site, level) by that factor too. Norms of Jacobians keep their proportions.
    """
    rng, frame = np.random.default_rng(seed), evidence.frame.copy()
    keys = list(zip(frame.metric, frame.site, frame.level, strict=True))
    norms = np.exp(SPREAD * rng.normal())
    by_chance = {
        key: norms if key[0].startswith(NORMS) else np.exp(SPREAD * rng.normal())
        for key in dict.fromkeys(keys)
    }
    known = factors or {}
    frame["value"] *= [by_chance[key] * known.get(key, 1.0) for key in keys]
    return Evidence(evidence.name, frame, {**evidence.info, "seed": seed})


def seeded(
    folder: Path,
    seeds: Sequence[int] = range(5),
    factors: Mapping[tuple, float] | None = None,
    config: dict[str, Any] | None = None,
    **info: Any,
) -> list[Run]:
    """Complete runs of one configuration over seeds."""
    return [
        stored(
            spread_over(complete(**info), seed, factors),
            folder / str(seed),
            {"width": 8, "seed": seed, **(config or {})},
        )
        for seed in seeds
    ]
