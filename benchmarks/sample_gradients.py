"""Per-sample gradient energies of 32 samples: layers' identities and vmap against a loop.

    OMP_NUM_THREADS=1 python benchmarks/sample_gradients.py

Each round takes all three once, in rotating order, in one process; ratios are of times within a
round. Rounds are not filtered, so run it on a quiet machine. The single-sample check that comes
with the identities is part of their time. `forward + backward` is one pass of the whole batch
without any gradient of a weight: what identities cannot go below by much.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from stability_probe import find_skips
from stability_probe.probes import ProbeBatch
from stability_probe.probes.outer_products import layer_calls
from stability_probe.probes.sample_gradients import _by_vmap, _in_turn, weight_energies
from stability_probe.runs import TrainConfig, build_model
from stability_probe.skips import parameter_blocks

ROUNDS, WARMUP, SAMPLES, MEMORY, VMAP_CHUNK = 12, 2, 32, 2**27, 8
WORKLOADS = {
    "U-ViT, 13 blocks, width 128, 16×16": (TrainConfig(model="uvit", n_skips=6, width=128), 16),
    "U-ViT, 13 blocks, width 64, 8×8": (TrainConfig(model="uvit", n_skips=6, width=64), 8),
    "UNet2DModel, 6 skips, width 32, 32×32": (
        TrainConfig(model="unet2d", n_skips=6, width=32),
        32,
    ),
    "TheoryUNet, N = 5, m = 256": (TrainConfig(model="theory-unet", n_skips=5), 16),
}


def subject(
    config: TrainConfig, size: int
) -> tuple[nn.Module, dict[str, torch.Tensor], ProbeBatch]:
    """A network, the weight matrices of its blocks a_i and b_i, and samples."""
    model = build_model(config, (1, size, size)).eval()
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, SAMPLES, 1, size, size, generator=generator)
    t = torch.randint(1000, (SAMPLES,), generator=generator)
    blocks = parameter_blocks(model, find_skips(model, x[:1], t[:1]), x[:1], t[:1])
    weights = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim > 1 and blocks[name].kind in ("a", "b")
    }
    return model, weights, ProbeBatch((x, t), target=target)


def passes_only(model: nn.Module, weights: dict[str, torch.Tensor], batch: ProbeBatch) -> None:
    """Forward, and backward to the outputs of the layers."""
    with layer_calls(model, weights) as calls:
        losses = batch.losses(model)
    torch.autograd.grad(losses.sum(), [call.edge for call in calls])


def seconds(method: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    method()
    return time.perf_counter() - started


def measure(config: TrainConfig, size: int) -> dict[str, list[float]]:
    """Seconds of every method in every round."""
    given = subject(config, size)
    methods = {
        "loop": lambda: _in_turn(*given),
        "vmap": lambda: _by_vmap(*given, VMAP_CHUNK),
        "identities": lambda: weight_energies(*given, MEMORY),
        "forward + backward": lambda: passes_only(*given),
    }
    names = list(methods)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS + WARMUP):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = seconds(methods[name])
            if turn >= WARMUP:
                times[name].append(taken)
    return times


def main() -> None:
    """Print the table."""
    table = Table(title=f"seconds of a loop over {SAMPLES} samples / seconds, {ROUNDS} rounds")
    for column in ("workload", "method", "seconds", "least", "median", "largest"):
        table.add_column(column, justify="left" if column in ("workload", "method") else "right")
    for workload, (config, size) in WORKLOADS.items():
        times = measure(config, size)
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(times["loop"], taken, strict=True)]
            numbers = (min(ratios), statistics.median(ratios), max(ratios))
            cells = (f"{statistics.median(taken):.3f}", *(f"{number:.2f}" for number in numbers))
            table.add_row(workload, name, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
