"""Recorded numbers that are still on the device, in rings that are copied off it in blocks."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from stability_probe.probes.records import Numbered, Part, as_frame


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

    def copy(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """What is in it, on the host; on a GPU the copy is queued, and the event comes after it."""
        filled = self.room[: len(self.steps)]
        if not filled.is_cuda:
            return filled.to("cpu", copy=True), None
        with torch.cuda.device(filled.device):
            host = torch.empty(filled.shape, dtype=filled.dtype, pin_memory=True)
            host.copy_(filled, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return host, event


class Outgoing:
    """Numbers on their way off the device."""

    def __init__(self, rings: Sequence[tuple[Numbered, _Ring]]) -> None:
        self._parts = [(layout, ring.steps, *ring.copy()) for layout, ring in rings]

    @property
    def arrived(self) -> bool:
        """Whether they are there for sure, without waiting."""
        return all(event is None for *_, event in self._parts)

    def parts(self) -> list[Part]:
        """The numbers, waited for."""
        for *_, event in self._parts:
            if event is not None:
                event.synchronize()
        return [layout.part(steps, v.double().numpy()) for layout, steps, v, _ in self._parts]


class RecordBuffer:
    """Recorded numbers that are still on the device, at most a few steps of them.

    Args:
        rows: steps that room is made for; it grows if more come.

    >>> from stability_probe.probes.records import Column, Key, Layout
    >>> buffer = RecordBuffer()
    >>> buffer.add(1, Layout([Column(Key("loss", "loss", 0, "mean"))]), torch.tensor([0.5]))
    >>> buffer.frame().values.tolist()
    [[1, 'loss', 'loss', 0, 'mean', 0.5]]
    """

    def __init__(self, rows: int = 64) -> None:
        self._rows = rows
        self._rings: dict[tuple[Numbered, torch.dtype, torch.device], _Ring] = {}

    def __len__(self) -> int:
        """How many steps the numbers are of."""
        return len(self.steps)

    @property
    def steps(self) -> list[int]:
        """The steps that the numbers are of."""
        return sorted({step for ring in self._rings.values() for step in ring.steps})

    def add(self, step: int, layout: Numbered, values: Tensor) -> None:
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
        rings = [(kind[0], ring) for kind, ring in self._rings.items()]
        outgoing = Outgoing(sorted(rings, key=lambda pair: pair[0].order))
        for ring in self._rings.values():
            ring.steps = []
        return outgoing

    def frame(self) -> pd.DataFrame:
        """The numbers as a frame of records; they are forgotten here."""
        return as_frame(self.take().parts())
