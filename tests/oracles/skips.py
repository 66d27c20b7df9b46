"""Skips that are described but lie in no network, for schemes that read levels and shapes alone."""

from stability_probe import SkipConnection
from stability_probe.skips import ArgumentTap


def skips_of(*shapes: tuple[int, ...]) -> list[SkipConnection]:
    """Skips of these shapes, level 1 (the outermost) first."""
    tap = ArgumentTap("m", "u")
    return [
        SkipConnection(
            level=level,
            source=f"a{level}",
            sink=f"b{level}",
            merge="concat",
            shape=shape,
            kappa=1.0,
            feature=None,
            skip=tap,
            main=tap,
            merged=tap,
            decoded=tap,
        )
        for level, shape in enumerate(shapes, start=1)
    ]
