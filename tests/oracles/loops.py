"""Training loops with a probe and without one, as short as they get."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stability_probe import SkipConnection, StabilityProbe
from stability_probe.probes import per_sample_mse
from tests.oracles.recording import Batch, output_of

Order = Literal["each", "sum", "first", "last"]
"""When the backward passes come: each after its forward pass, one for all, or one each after all
forward passes, beginning with the first or with the last."""

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""What runs a model on x_t and t."""


def backward(losses: Sequence[Tensor], order: Order) -> None:
    """The backward passes after all forward passes."""
    if order == "sum":
        torch.stack([loss.mean() for loss in losses]).sum().backward()
        return
    for loss in losses if order == "first" else reversed(losses):
        loss.mean().backward()


def recorded(
    model: nn.Module,
    skips: Sequence[SkipConnection],
    batches: Sequence[Batch],
    *,
    order: Order = "each",
    forward: Forward = output_of,
    steps: int = 1,
    **options: Any,
) -> pd.DataFrame:
    """What a probe records of steps that each accumulate gradients over all batches."""
    options = {"every": 1, "sensitivity_every": 0} | options
    with StabilityProbe(model, skips, **options) as probe:
        for _ in range(steps):
            model.zero_grad()
            losses = []
            for x, t, target in batches:
                losses.append(per_sample_mse(forward(model, x, t), target))
                if order == "each":
                    (losses[-1].mean() / len(batches)).backward()
            if order != "each":
                backward([loss / len(batches) for loss in losses], order)
            probe.step(loss=torch.cat(losses))
    return probe.frame()


def trained(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    forward: Forward = output_of,
    probe: StabilityProbe | None = None,
) -> list[Tensor]:
    """Losses, gradients and parameters of a training of a step a batch, for comparison bit by bit.

    The probe, if there is one, has been entered.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trace: list[Tensor] = []
    for x, t, target in batches:
        optimizer.zero_grad()
        loss = per_sample_mse(forward(model, x, t), target)
        loss.mean().backward()
        if probe is not None:
            probe.step(loss=loss)
        trace += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        trace += [p.detach().clone() for p in model.parameters()]
    return trace


def same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether tensors are the same to the last bit."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def checkpointing(module: nn.Module, reentrant: bool) -> None:
    """Let every training call of a module, its hooks included, be checkpointed."""
    plain = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(plain.__call__, self, **kwargs)
        if torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=reentrant)
        return run(*args)

    module.__class__ = type(plain.__name__, (plain,), {"__call__": call})


def step_that_goes_back_further(
    net: nn.Module, probe: StabilityProbe, early: Batch, late: Batch
) -> None:
    """Two steps; between the passes of the second a graph that the first has kept is used again."""
    kept = per_sample_mse(net(*early[:2]), early[2]).mean()
    kept.backward(retain_graph=True)
    probe.step()
    loss = per_sample_mse(net(*late[:2]), late[2])
    kept.backward()
    net.zero_grad()
    loss.mean().backward()
    probe.step(loss=loss)
