"""What cannot be probed as it is: it is refused with what to do instead."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from stability_probe.errors import StabilityProbeError

_WRAPPERS = {
    "DataParallel": "its copies' records would be lost; use "
    "torch.nn.parallel.DistributedDataParallel, one process a device",
    "FullyShardedDataParallel": "it has no parameters of their own left to read; use "
    "torch.distributed.fsdp.fully_shard",
}


def refuse_settings(every: int, sensitivity_every: int, levels: Sequence[int]) -> None:
    """Check how a probe is to record.

    Args:
        every: steps between two that are recorded.
        sensitivity_every: steps between scheduled measurements; 0 for none.
        levels: of the skips.

    Raises:
        StabilityProbeError: if it cannot.
    """
    if every < 1 or sensitivity_every < 0:
        raise StabilityProbeError(
            f"StabilityProbe: every must be at least 1 and sensitivity_every at least 0, "
            f"got {every} and {sensitivity_every}"
        )
    if list(levels) != list(range(1, len(levels) + 1)):
        raise StabilityProbeError(
            f"StabilityProbe: skips must have the levels 1..N in order, "
            f"got {list(levels)}; pass all that find_skips returned"
        )


def refuse_unfit(model: nn.Module, sensitivity_every: int) -> None:
    """Check that records of a model would be right.

    Args:
        model: the network.
        sensitivity_every: steps between scheduled measurements; 0 for none.

    Raises:
        StabilityProbeError: if they would not.
    """
    for module in model.modules():
        why = _WRAPPERS.get(type(module).__name__)
        if why is not None:
            raise StabilityProbeError(
                f"StabilityProbe: the model is in {type(module).__name__}: {why}"
            )
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "to_local")]
    if sharded and sensitivity_every:
        raise StabilityProbeError(
            f"StabilityProbe: {sharded[0]} is sharded over the processes, and the scheduled "
            f"measurements need it whole, got sensitivity_every={sensitivity_every}; pass 0, and "
            "measure a checkpoint with `stability-probe probe`"
        )


@contextmanager
def measurable() -> Iterator[None]:
    """Say what to do where reentrant gradient checkpointing does not let a model be measured."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise StabilityProbeError(
            "StabilityProbe: gradient checkpointing with use_reentrant=True does not give the "
            "derivatives that the scheduled measurements take; pass use_reentrant=False, or leave "
            "them away with sensitivity_every=0"
        ) from error
