"""What a probe costs: steps of a probed and a bare twin, interleaved, as paired ratios.

    make bench

Each pair is one optimizer step of each twin, in alternating order, in one process. Pairs are not
filtered, so run it on a quiet machine. The scheduled sensitivity measurements are left out.
"""

import platform
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from stability_probe import StabilityProbe, find_skips
from stability_probe.probes import per_sample_mse
from stability_probe.runs import TrainConfig, build_model
from stability_probe.skips.taps import first_tensor

PAIRS, WARMUP = 120, 10
WORKLOADS = {
    "UNet2DModel, 32×32, batch 8": (
        TrainConfig(model="unet2d", n_skips=6, width=32),
        (8, 1, 32, 32),
    ),
    "U-ViT, 13 blocks, width 128, batch 16": (
        TrainConfig(model="uvit", n_skips=6, width=128),
        (16, 1, 16, 16),
    ),
}


class Twin:
    """A model with its optimizer, taking identical steps."""

    def __init__(self, config: TrainConfig, shape: tuple[int, ...]) -> None:
        self.model = build_model(config, shape[1:])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(shape, generator=generator)
        self.t = torch.randint(1000, shape[:1], generator=generator)
        self.probe: StabilityProbe | None = None

    def step(self) -> float:
        """Seconds that one optimizer step takes."""
        started = time.perf_counter()
        loss = per_sample_mse(first_tensor(self.model(self.x, self.t)), self.x)
        loss.mean().backward()
        self.optimizer.step()
        if self.probe is not None:
            self.probe.step(loss=loss)
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def measure(config: TrainConfig, shape: tuple[int, ...]) -> list[float]:
    """Ratios of a probed step to the bare step beside it."""
    bare, probed = Twin(config, shape), Twin(config, shape)
    skips = find_skips(probed.model, probed.x[:1], probed.t[:1])
    with StabilityProbe(probed.model, skips, sensitivity_every=0) as probed.probe:
        ratios = []
        for pair in range(PAIRS + WARMUP):
            if pair % 2:
                without, with_probe = bare.step(), probed.step()
            else:
                with_probe, without = probed.step(), bare.step()
            if pair >= WARMUP:
                ratios.append(with_probe / without)
    return ratios


def main() -> None:
    """Print the table."""
    table = Table(title=f"probed / bare step, {PAIRS} pairs, {platform.processor() or 'CPU'}")
    for column in ("workload", "least", "median", "largest", "standard error"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name, (config, shape) in WORKLOADS.items():
        ratios = measure(config, shape)
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        numbers = (min(ratios), statistics.median(ratios), max(ratios), error)
        table.add_row(name, *(f"{number:.3f}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
