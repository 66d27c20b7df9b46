"""What the samples of a step have given, as it waits on the device for the flush.

A training step does nothing that can be done later for many steps at once: norms, losses and noise
levels wait as they are, and energies, gains and their summaries are made of them when they have
left the device.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stability_probe.probes.quantities import NOISE_LEVEL, quantities
from stability_probe.probes.records import Key, Part
from stability_probe.probes.summaries import summarise

LOSS, GRAD_SCALE = Key("loss", "loss", 0, ""), Key("grad_scale", "loss", 0, "")
"""Losses, of one sample or of all, and what they were multiplied by before the backward pass."""


class Waiting:
    """What the numbers of a step's samples are.

    Args:
        shapes: of every quantity; (samples,), or () for a single number.
        bins: number of noise-level bins of equal width.
        noise_levels: the noise levels run from 0 to this (exclusive).
    """

    order = 0

    def __init__(
        self, shapes: Sequence[tuple[Key, tuple[int, ...]]], bins: int, noise_levels: float
    ) -> None:
        self._keys = [key for key, _ in shapes]
        self._sizes = [shape[0] if shape else 1 for _, shape in shapes]
        self._single = {key for key, shape in shapes if not shape}
        self._edges = torch.arange(1, bins, dtype=torch.float64) * (noise_levels / bins)

    def __len__(self) -> int:
        return sum(self._sizes)

    def part(self, steps: list[int], values: npt.NDArray[np.float64]) -> Part:
        """The numbers that are recorded of steps.

        Args:
            steps: the steps, k of them.
            values: (k, columns).
        """
        columns = torch.from_numpy(values).split(self._sizes, dim=1)
        taken = dict(zip(self._keys, columns, strict=True))
        t, scale = taken.pop(NOISE_LEVEL, None), taken.pop(GRAD_SCALE)
        found = quantities(taken, scale)
        if LOSS in taken:
            found[LOSS] = taken[LOSS]
        layout, numbers = summarise(found, t, self._edges, self._single)
        return Part(layout, steps, numbers.numpy())


def beside(other: Tensor, numbers: Tensor | float) -> Tensor:
    """Numbers on the device of others, without waiting for it; a single one has no dimension."""
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().to(other.device, non_blocking=True)
        return numbers.reshape(-1) if numbers.ndim else numbers
    return other.new_full((), numbers)


def waiting(taken: Mapping[Key, Tensor], bins: int, noise_levels: float) -> tuple[Waiting, Tensor]:
    """What the samples of a step have given, and what that is.

    Args:
        taken: from `FeatureProbe.taken`, with `GRAD_SCALE` and perhaps `LOSS`.
        bins: see `Waiting`.
        noise_levels: see `Waiting`.
    """
    shapes = tuple((key, v.shape) for key, v in taken.items())
    return _waiting(shapes, bins, noise_levels), torch.cat(
        [v if v.ndim else v[None] for v in taken.values()]
    )


_waiting = lru_cache(Waiting)
