"""The processes of a distributed training: their numbers become those of all their samples.

Every process records its own samples. At a flush all of them send their numbers to process 0, in
one collective over a process group of the probe's own, and it alone stores: sums are added up (in
float64), least and largest are taken over all, and what has to be the same everywhere, such as
gradients that have been averaged, is checked to be.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.records import Column, Key, Layout, Part

AGREE = 1e-5
"""How far, relatively, numbers may differ that are the same in all processes."""

SETTLING = 0.2
"""Seconds in which the threads of a process group come to rest after a collective."""

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
        sent = _merged([_Block.of(part) for part in parts])
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
        return [block.part() for block in join(received)]

    def close(self) -> None:
        """Give the process group back; who still waits in it learns that this process has left."""
        if self._group is not None and dist.is_initialized():
            # A thread of the group may be about to free the tensor of its last collective, for
            # which it needs Python's lock; who destroys the group holds that and waits for it.
            time.sleep(SETTLING)
            dist.destroy_process_group(self._group)
        self._group = None


class _Block(NamedTuple):
    """Numbers of several steps that say themselves what they are, as they go between processes.

    Attributes:
        columns: of each key, without weights.
        steps: the steps, k of them.
        values: (k, columns).
        weights: (k, columns): what each is divided by at the end, or NaN.
    """

    columns: tuple[Column, ...]
    steps: list[int]
    values: Values
    weights: Values

    @classmethod
    def of(cls, part: Part) -> "_Block":
        """The numbers of a part that are recorded."""
        shown = [i for i, column in enumerate(part.layout.columns) if column.key is not None]
        columns = [part.layout.columns[i] for i in shown]
        places = [column.weight for column in columns]
        weights = np.where(np.array(places) < 0, np.nan, part.values[:, places])
        plain = tuple(column._replace(weight=-1) for column in columns)
        return cls(plain, part.steps, part.values[:, shown], weights)

    def part(self) -> Part:
        """The same as a part of records."""
        n = len(self.columns)
        has_weight = [not np.isnan(self.weights[:, i]).all() for i in range(n)]
        columns = [
            column._replace(weight=n + i if has_weight[i] else -1)
            for i, column in enumerate(self.columns)
        ]
        layout = Layout([*columns, *[Column(None)] * n])
        return Part(layout, self.steps, np.concatenate([self.values, self.weights], axis=1))

    def arranged(self, columns: Sequence[Column]) -> "_Block":
        """The same columns in another order."""
        place = {column.key: i for i, column in enumerate(self.columns)}
        order = [place[column.key] for column in columns]
        return _Block(tuple(columns), self.steps, self.values[:, order], self.weights[:, order])


def _merged(blocks: Sequence[_Block]) -> list[_Block]:
    """Blocks of the same keys put together, in the order of their steps."""
    groups: dict[frozenset[Key | None], list[_Block]] = {}
    for block in blocks:
        groups.setdefault(frozenset(c.key for c in block.columns), []).append(block)
    merged = []
    for first, *more in groups.values():
        same = [first, *(block.arranged(first.columns) for block in more)]
        steps = [step for block in same for step in block.steps]
        order = np.argsort(steps, kind="stable")
        values, weights = (
            np.concatenate([getattr(block, name) for block in same])[order]
            for name in ("values", "weights")
        )
        merged.append(_Block(first.columns, [steps[i] for i in order], values, weights))
    return merged


def join(blocks_of: Sequence[Sequence[_Block]]) -> list[_Block]:
    """The numbers of the union of the processes' samples.

    Args:
        blocks_of: what each process has recorded, merged; numbers that are the same everywhere may
            be in the first alone.

    Raises:
        StabilityProbeError: if the processes have recorded different things.
    """
    others = [
        {frozenset(c.key for c in block.columns): block for block in r} for r in blocks_of[1:]
    ]
    mine = {frozenset(c.key for c in block.columns): block for block in blocks_of[0]}
    for rank, theirs in enumerate(others, start=1):
        needed = {keys for keys, b in mine.items() if any(c.join != "same" for c in b.columns)}
        if (needed | theirs.keys()) - (mine.keys() & theirs.keys()):
            here, there = (set().union(*found) for found in (mine, theirs))
            raise _different(rank, sorted(map(str, here ^ there)))
    found = []
    for keys, block in mine.items():
        blocks = [block]
        for rank, theirs in enumerate(others, start=1):
            if keys in theirs:
                if theirs[keys].steps != block.steps:
                    raise _different(rank, [f"steps {theirs[keys].steps} and not {block.steps}"])
                blocks.append(theirs[keys].arranged(block.columns))
        found.append(_joined(blocks))
    return found


def _joined(blocks: Sequence[_Block]) -> _Block:
    """One block of those of all processes, of the same columns and steps."""
    columns, steps, *_ = blocks[0]
    kind = np.array([column.join for column in columns], dtype=str)
    values = np.stack([block.values for block in blocks])
    weights = np.stack([block.weights for block in blocks])
    same = [i for i, column in enumerate(columns) if column.join == "same"]
    for i in same:
        key = columns[i].key
        close = np.allclose(values[:, :, i], values[:1, :, i], AGREE, 0.0, equal_nan=True)
        if key is not None and not close:
            raise StabilityProbeError(
                f"StabilityProbe: {key.metric} of {key.site} is not the same in all processes; "
                "call step() after the gradients have been averaged over them, as "
                "DistributedDataParallel and fully_shard do outside no_sync()"
            )
    joined, summed = values[0].copy(), weights[0].copy()
    for name, reduce in (("sum", np.sum), ("min", np.min), ("max", np.max)):
        joined[:, kind == name] = reduce(values[:, :, kind == name], axis=0)
    summed[:, kind == "sum"] = weights[:, :, kind == "sum"].sum(axis=0)
    return _Block(columns, steps, joined, summed)


def _different(rank: int, what: Sequence[str]) -> StabilityProbeError:
    return StabilityProbeError(
        f"StabilityProbe: process {rank} and process 0 have not recorded the same ({what[0]}); "
        "every process has to run the same model, all with noise levels or none, and to call "
        "step() equally often with losses of the same kind"
    )


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
