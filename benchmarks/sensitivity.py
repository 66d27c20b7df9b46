"""What one scheduled sensitivity measurement takes.

    python -m benchmarks.sensitivity [--repeats N]

They come on top of what `benchmarks.overhead` measures: once at the first step and once every
`sensitivity_every` steps. The probe's step that takes one is timed, and a bare step beside it.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor

from benchmarks.report import OUT, Row, machine, machine_line, shown, write_csv
from benchmarks.twins import WORKLOADS, Workload, limit_threads
from benchmarks.variants import probed
from stability_probe.runs import TrainConfig

DEMO = Workload("U-ViT of the demo, batch 64", TrainConfig(), (64, 1, 8, 8))
DIGITS = {"least_s": 2, "median_s": 2, "largest_s": 2, "bare_step_s": 3, "bare_steps": 0}


def measure(workload: Workload, repeats: int) -> Row:
    """Seconds of some measurements in a row."""
    twin = workload.twin()
    bare = statistics.median(twin.step() for _ in range(5))
    seconds = []
    with probed(twin, None, sensitivity_every=1):
        observe = twin.observe

        def timed(loss: Tensor) -> None:
            started = time.perf_counter()
            observe(loss)
            seconds.append(time.perf_counter() - started)

        twin.observe = timed
        for _ in range(repeats):
            twin.step()
    median = statistics.median(seconds)
    return {
        "workload": workload.name,
        "least_s": min(seconds),
        "median_s": median,
        "largest_s": max(seconds),
        "bare_step_s": bare,
        "bare_steps": median / bare,
        "repeats": repeats,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.sensitivity", description="Seconds of one")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the CSV file")
    chosen = parser.parse_args(arguments)
    limit_threads()
    rows = [measure(workload, chosen.repeats) for workload in (*WORKLOADS, DEMO)]
    write_csv(chosen.out / "sensitivity.csv", rows)
    title = "one scheduled sensitivity measurement, in seconds and in bare steps"
    console = Console(width=150)
    console.print(shown(title, rows, DIGITS), machine_line(machine()))


if __name__ == "__main__":
    main()
