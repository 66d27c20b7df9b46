"""The processes of a distributed training: their numbers become those of all their samples.

Every process records its own samples. At a flush all of them send their numbers to process 0, in
one collective over a process group of the probe's own, and it alone stores: sums are added up (in
float64), least and largest are taken over all, and what has to be the same everywhere, such as
gradients that have been averaged, is checked to be.
"""

import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.records import Column, Layout, Part

AGREE = 1e-5
"""How far, relatively, numbers may differ that are the same in all processes."""

Values = npt.NDArray[np.float64]


class RecordWarning(UserWarning):
    """Training goes on, but not all of its records are stored; the message says why."""


class Ranks:
    """The processes that train together.

    Args:
        world: how many there are.
        rank: the number of this one.
        group: the process group they talk in.
        timeout: seconds to wait for the others.

    Attributes:
        lost: why the others can no longer be reached, or `None`.
    """

    def __init__(
        self, world: int = 1, rank: int = 0, group: Any = None, timeout: float = 0.0
    ) -> None:
        self.world, self.rank, self.timeout = world, rank, timeout
        self.lost: str | None = None
        self._group = group

    @classmethod
    def meet(cls, timeout: float) -> "Ranks":
        """The processes of torch.distributed, each of which calls this; else this one alone.

        Raises:
            StabilityProbeError: if not all of them have come within the timeout.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        world = dist.get_world_size()
        try:
            # Of our own, so that no collective of the training is waited for or put out of order.
            # It goes with the training's: to destroy one after a collective was seen to hang.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        except RuntimeError as error:
            raise StabilityProbeError(
                f"StabilityProbe: not all {world} processes entered the probe's block within "
                f"{timeout:g} s; enter it in every process ({_line(error)})"
            ) from error
        return cls(world, dist.get_rank(), group, timeout)

    @property
    def first(self) -> bool:
        """Whether this is the process that stores."""
        return self.rank == 0

    def together(self, act: Callable[[], None]) -> None:
        """Let process 0 do something; where it fails, all of them do.

        Raises:
            StabilityProbeError: if it failed.
        """
        outcome: list[str | None] = [None]
        if self.first:
            try:
                act()
            except StabilityProbeError as error:
                if self.world == 1:
                    raise
                outcome = [str(error)]
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise StabilityProbeError(outcome[0])

    def gather(self, parts: Sequence[Part]) -> list[Part]:
        """The numbers of all processes joined, in process 0; nothing in the others.

        Where the others cannot be reached, this warns once, and from then on there is nothing.

        Raises:
            StabilityProbeError: in process 0, if the processes have recorded different things.
        """
        if self.world == 1:
            return list(parts)
        if self.lost is not None:
            return []
        sent = [(part.layout.columns, part.steps, part.values) for part in parts]
        received: list[Any] | None = [None] * self.world if self.first else None
        try:
            dist.gather_object(sent, received, dst=0, group=self._group)
        except (RuntimeError, ValueError) as error:  # ValueError: the training has ended its group
            self.lost = (
                f"the other processes were not heard of within {self.timeout:g} s or are gone "
                f"({_line(error)})"
            )
            if self.first:
                warnings.warn(
                    f"StabilityProbe: {self.lost}; no more records are stored",
                    RecordWarning,
                    stacklevel=2,
                )
            return []
        if received is None:
            return []
        return join([[Part(Layout(columns), *rest) for columns, *rest in r] for r in received])


def join(parts_of: Sequence[Sequence[Part]]) -> list[Part]:
    """The numbers of the union of the processes' samples.

    Args:
        parts_of: what each process has recorded; numbers that are the same everywhere may be in the
            first alone.

    Raises:
        StabilityProbeError: if the processes have recorded different things.

    >>> from stability_probe.probes.records import Key
    >>> columns = [Column(Key("loss", "loss", 0, "min"), "min"), Column(None, "sum")]
    >>> here, there = (Part(Layout(columns), [1], np.array([v])) for v in ([3.0, 8], [2.0, 8]))
    >>> join([[here], [there]])[0].values.tolist()
    [[2.0, 16.0]]
    """
    others = [{part.layout.columns: part for part in parts} for parts in parts_of[1:]]
    for rank, parts in enumerate(others, start=1):
        unknown = parts.keys() - {part.layout.columns for part in parts_of[0]}
        if unknown:
            raise _disagreement(rank, "other quantities")
    found = []
    for part in parts_of[0]:
        columns, steps, values = part.layout.columns, part.steps, [part.values]
        for rank, parts in enumerate(others, start=1):
            other = parts.get(columns)
            if other is None and all(column.join == "same" for column in columns):
                continue
            if other is None or other.steps != steps:
                raise _disagreement(rank, "other quantities" if other is None else "other steps")
            values.append(other.values)
        found.append(Part(part.layout, steps, _joined(columns, np.stack(values))))
    return found


def _joined(columns: Sequence[Column], values: Values) -> Values:
    """One row a step from (processes, steps, columns)."""
    kind = np.array([column.join for column in columns])
    same = values[:, :, kind == "same"]
    close: npt.NDArray[np.bool_] = np.isclose(same, same[:1], AGREE, 0.0, equal_nan=True)
    if not close.all():
        agree = [bool(close[:, :, i].all()) for i in range(close.shape[2])]
        keys = [column.key for column in columns if column.join == "same"]
        key = next(key for key, right in zip(keys, agree, strict=True) if key and not right)
        raise StabilityProbeError(
            f"StabilityProbe: {key.metric} of {key.site} is not the same in all processes; call "
            "step() after the gradients have been averaged over them, as DistributedDataParallel "
            "and fully_shard do outside no_sync()"
        )
    found: Values = values[0].copy()
    for name, reduce in (("sum", np.sum), ("min", np.min), ("max", np.max)):
        found[:, kind == name] = reduce(values[:, :, kind == name], axis=0)
    return found


def _disagreement(rank: int, what: str) -> StabilityProbeError:
    return StabilityProbeError(
        f"StabilityProbe: process {rank} has recorded {what} than process 0; every process has to "
        "run the same model, with noise levels or without, and to call step() equally often"
    )


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
