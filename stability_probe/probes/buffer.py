"""Recorded numbers that are still on the device, in rings that are copied off it in blocks."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from stability_probe.probes.records import Layout, Part, as_frame


class _Ring:
    """Room on the device for the numbers of several steps, a row each; used again when copied."""

    def __init__(self, rows: int, like: Tensor) -> None:
        with torch.inference_mode(False):
            self.room = like.new_empty(rows, len(like))
        self.steps: list[int] = []

    def put(self, step: int, values: Tensor) -> None:
        if len(self.steps) == len(self.room):
            with torch.inference_mode(False):
                self.room = torch.cat([self.room, torch.empty_like(self.room)])
        self.room[len(self.steps)].copy_(values)
        self.steps.append(step)

    def copy(self) -> Tensor:
        """What is in it, on its way to the host: on a GPU the copy has only been queued."""
        filled = self.room[: len(self.steps)]
        if not filled.is_cuda:
            return filled.to(torch.float64, copy=True)
        host = torch.empty(filled.shape, dtype=filled.dtype, pin_memory=True)
        return host.copy_(filled, non_blocking=True)


class Outgoing:
    """Numbers on their way off the device."""

    def __init__(self, parts: Sequence[tuple[Layout, list[int], Tensor]], queued: bool) -> None:
        self._parts = list(parts)
        self._event: torch.cuda.Event | None = None
        if queued:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def arrived(self) -> bool:
        """Whether they are there for sure, without waiting."""
        return self._event is None

    def parts(self) -> list[Part]:
        """The numbers, waited for."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return [Part(layout, steps, v.double().numpy()) for layout, steps, v in self._parts]


class RecordBuffer:
    """Recorded numbers that are still on the device, at most a few steps of them.

    Args:
        rows: steps that room is made for; it grows if more come.

    >>> from stability_probe.probes.records import Column, Key
    >>> buffer = RecordBuffer()
    >>> buffer.add(1, Layout([Column(Key("loss", "loss", 0, "mean"))]), torch.tensor([0.5]))
    >>> buffer.frame().values.tolist()
    [[1, 'loss', 'loss', 0, 'mean', 0.5]]
    """

    def __init__(self, rows: int = 64) -> None:
        self._rows = rows
        self._rings: dict[tuple[Layout, torch.dtype, torch.device], _Ring] = {}

    def __len__(self) -> int:
        """How many steps the numbers are of."""
        return len({step for ring in self._rings.values() for step in ring.steps})

    def add(self, step: int, layout: Layout, values: Tensor) -> None:
        """Keep the numbers of one step: a vector, one entry a column."""
        if len(layout) != len(values):
            raise ValueError(f"{len(layout)} columns for {len(values)} values at step {step}")
        kind = layout, values.dtype, values.device
        ring = self._rings.get(kind)
        if ring is None:
            ring = self._rings[kind] = _Ring(self._rows, values)
        ring.put(step, values.detach())

    def take(self) -> Outgoing:
        """Start copying the numbers off the device, and forget them here."""
        self._rings = {kind: ring for kind, ring in self._rings.items() if ring.steps}
        parts = [(kind[0], ring.steps, ring.copy()) for kind, ring in self._rings.items()]
        for ring in self._rings.values():
            ring.steps = []
        return Outgoing(parts, queued=any(device.type == "cuda" for _, _, device in self._rings))

    def frame(self) -> pd.DataFrame:
        """The numbers as a frame of records; they are forgotten here."""
        return as_frame(self.take().parts())
