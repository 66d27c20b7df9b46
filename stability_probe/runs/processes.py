"""Training in several processes, as `accelerate launch` and `torchrun` start them.

All of them do the same, each on its part of every batch; what is written to disk is written by the
main one. What it finds or fails at there, all of them learn, so that none waits for another that
has stopped.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.ranks import SETTLING

T = TypeVar("T")


def join() -> Accelerator:
    """This process among those that were started together; with them where it is the first call."""
    return Accelerator(cpu=not torch.accelerator.is_available())


def leave() -> None:
    """Part from the other processes, at the end of the program; nothing if there are none."""
    if _together():
        time.sleep(SETTLING)
        distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return not _together() or distributed.get_rank() == 0


def from_main(make: Callable[[], T]) -> T:
    """What a function returns in the main process, in all processes; the others do not call it.

    Raises:
        StabilityProbeError: if the main process raises one, in all processes.
    """
    if not _together():
        return make()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except StabilityProbeError as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    made, problem = outcome
    if problem is not None:
        raise problem
    result: T = made
    return result


def from_all(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if not _together():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
