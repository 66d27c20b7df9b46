"""What the probe takes of the memory: the peak within a step, and what is resident after many.

    python -m benchmarks.memory [--steps N]

Live bytes are those of all tensors' storages, from the model's making on, seen by a dispatch mode;
what a kernel takes for itself and gives back is not among them. The peak is the largest over the
steps up to the first flush of the probe, so that what it holds until then is counted.

Resident memory is the process's, sampled while a small network trains and the probe records every
step into a run folder. It is measured first, while nothing large has been freed that it could grow
into.
"""

import argparse
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import OUT, Row, machine, machine_line, shown, verdict, write_csv
from benchmarks.twins import WORKLOADS, Twin, Workload, batch, limit_threads
from benchmarks.variants import VARIANTS, Variant, every_step, kept_activations, nothing, probed
from stability_probe import TheoryUNet

PEAK_GOAL, GROWTH_GOAL = 1.01, 1.01
"""Largest ratio of peaks, and of resident memory at the end to that after the warm-up."""
STEPS, SAMPLE, WARMUP = 10_000, 500, 2_000
UNTIL_FLUSH = 51
MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, and remembers the most.

    Attributes:
        live: bytes now.
        peak: the most since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak(workload: Workload, variant: Variant, steps: int) -> int:
    """The most bytes that live at a time while a watched twin takes steps."""
    counter = LiveBytes()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, counter:
        twin = workload.twin()
        with variant.attach(twin, Path(folder) / "run"):
            twin.step()  # the optimizer's state is made, and the probe learns the blocks
            counter.peak = counter.live
            for _ in range(steps):
                twin.step()
    return counter.peak


def peaks(workload: Workload) -> list[Row]:
    """A row for the bare step, the probe, and hooks that keep activations."""
    watched = {v.attach: v for v in VARIANTS}
    rows: list[Row] = []
    bare = peak(workload, watched[nothing], 2)
    for attach, steps in ((nothing, 2), (every_step, UNTIL_FLUSH), (kept_activations, 2)):
        variant = watched[attach]
        most = bare if attach is nothing else peak(workload, variant, steps)
        goal = PEAK_GOAL if attach is every_step else None
        rows.append(
            {
                "workload": workload.name,
                "variant": "the bare step" if attach is nothing else variant.name,
                "peak_MiB": most / MIB,
                "ratio": most / bare,
                "goal": goal,
                "verdict": verdict(most / bare, goal),
            }
        )
    return rows


def resident(steps: int, sample: int) -> list[tuple[int, float]]:
    """Resident MiB by step, while the probe records every one of them."""
    process, sampled = psutil.Process(), []
    twin = Twin(TheoryUNet(m=16, n_skips=2), *batch((8, 16)))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        settings = {"every": 1, "sensitivity_every": 0}
        with probed(twin, Path(folder) / "run", **settings):
            for step in range(1, steps + 1):
                twin.step()
                if step % sample == 0:
                    sampled.append((step, process.memory_info().rss / MIB))
    return sampled


def growth(sampled: Sequence[tuple[int, float]], warmup: int) -> Row:
    """First and last resident MiB after a warm-up, and the median rise from sample to sample.

    The median leaves out the few jumps with which an allocator takes and returns memory.

    >>> growth([(500, 90.0), (1000, 100.0), (1500, 100.5), (2000, 101.0)], warmup=1000)["rise_KiB"]
    1024.0
    """
    steps, size = np.array([pair for pair in sampled if pair[0] >= warmup]).T
    ratio = float(size[-1] / size[0])
    return {
        "first_step": int(steps[0]),
        "first_MiB": float(size[0]),
        "last_step": int(steps[-1]),
        "last_MiB": float(size[-1]),
        "rise_KiB": float(np.median(np.diff(size) / np.diff(steps))) * 1024 * 1000,
        "ratio": ratio,
        "goal": GROWTH_GOAL,
        "verdict": verdict(ratio, GROWTH_GOAL),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description="Memory of the probe")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the resident memory")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the CSV files")
    chosen = parser.parse_args(arguments)
    limit_threads()
    sample = max(chosen.steps * SAMPLE // STEPS, 1)
    sampled = resident(chosen.steps, sample)
    grown = growth(sampled, chosen.steps * WARMUP // STEPS)
    rows = [row for workload in WORKLOADS for row in peaks(workload)]
    write_csv(chosen.out / "resident.csv", [{"step": s, "resident_MiB": m} for s, m in sampled])
    write_csv(chosen.out / "memory.csv", rows)
    console = Console(width=150)
    digits = {"peak_MiB": 2, "ratio": 4, "first_MiB": 1, "last_MiB": 1, "rise_KiB": 1}
    console.print(shown("peak of live tensor bytes within a step", rows, digits))
    title = "resident memory, every step recorded into a run; median rise in KiB a thousand steps"
    console.print(shown(title, [grown], digits), machine_line(machine()))


if __name__ == "__main__":
    main()
