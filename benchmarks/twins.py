"""Networks that take identical steps, so that two of them can be timed against each other."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stability_probe.probes import per_sample_mse
from stability_probe.runs import TrainConfig, build_model
from stability_probe.skips.taps import first_tensor


class Twin:
    """A model with its optimizer, taking one step after the other on one batch.

    Args:
        model: the network.
        x: a batch of inputs, and the target.
        t: the noise level of every sample.
        wrapped: what is called in the place of the model, such as its `DistributedDataParallel`.

    Attributes:
        forward: what the step calls with x and t.
        observe: called with the per-sample losses after the optimizer's step, while the gradients
            are there.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, t: Tensor, wrapped: nn.Module | None = None
    ) -> None:
        self.model, self.x, self.t = model, x, t
        self._called = wrapped or model
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        self.unwatch()

    def unwatch(self) -> None:
        """Take the plain step again."""
        self.forward: Callable[[Tensor, Tensor], object] = self._called
        self.observe: Callable[[Tensor], object] = _nothing

    def step(self) -> float:
        """Seconds that one optimizer step takes."""
        started = time.perf_counter()
        loss = per_sample_mse(first_tensor(self.forward(self.x, self.t)), self.x)
        loss.mean().backward()
        self.optimizer.step()
        self.observe(loss)
        self.optimizer.zero_grad()
        return time.perf_counter() - started


@dataclass(frozen=True)
class Workload:
    """A network and the shape of its batches."""

    name: str
    config: TrainConfig
    shape: tuple[int, ...]

    def twin(self) -> Twin:
        """One more of the same network, with the same batch."""
        return Twin(build_model(self.config, self.shape[1:]), *batch(self.shape))


WORKLOADS = (
    Workload(
        "UNet2DModel, 32×32, batch 8",
        TrainConfig(model="unet2d", n_skips=6, width=32),
        (8, 1, 32, 32),
    ),
    Workload(
        "U-ViT, 13 blocks, width 128, batch 16",
        TrainConfig(model="uvit", n_skips=6, width=128),
        (16, 1, 16, 16),
    ),
)
"""The small networks that costs are measured on."""


def batch(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random inputs and noise levels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x, torch.randint(1000, shape[:1], generator=generator)


def limit_threads() -> None:
    """One thread, unless `OMP_NUM_THREADS` says otherwise: these networks are small."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _nothing(loss: Tensor) -> None:
    """Observe nothing."""
