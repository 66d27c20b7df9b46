"""What a sweep costs beside its runs: to scan a folder of finished ones, and to hand them out.

    python -m benchmarks.sweep [--finished 2000] [--runs 200] [--backends local ray dask]

Times of a busy machine are of little worth; the dispatcher's CPU time is less touched by that.
"""

import argparse
import tempfile
import time
from pathlib import Path

import joblib
import pandas as pd

from stability_probe.probes.records import empty_frame
from stability_probe.regression import run_numbers
from stability_probe.runs import Grid, Run, survey, sweep
from stability_probe.runs.cells import Cell
from stability_probe.runs.workers import Request, hire

TINY = {"model": "theory-unet", "n_skips": 2, "batch_size": 4, "data": "uniform", "steps": 1}
REAL = {"steps": 300, "n_skips": 6}
PROBING = {"sensitivity_every": 100}


def nothing() -> None:
    """A run that takes no time."""


def one_run(folder: Path) -> Path:
    """A run as the demo's are, a U-ViT of 300 steps; its folder."""
    sweep(Grid(REAL, {"seed": [0]}, PROBING), folder, jobs=1, threads=1, measure=run_numbers)
    return folder / "runs" / "seed=0"


def scan(folder: Path, finished: int, numbers: dict[str, float]) -> dict[str, float]:
    """Seconds to look through a folder of finished runs, and to write their table."""
    grid = Grid(TINY, {"seed": list(range(finished))}, PROBING)
    began = time.perf_counter()
    for name, config in grid.cells():
        cell = Cell(folder / "runs" / name, config, grid.record_config())
        Run(cell.folder, config.as_dict()).begin({})
        Run(cell.folder).append(empty_frame())
        cell.end("complete", numbers=numbers)
    made = time.perf_counter()
    frame = survey(grid, folder)
    looked = time.perf_counter()
    frame.to_csv(folder / "results.csv")
    return {
        "making the folders, s": made - began,
        "looking through them, s": looked - made,
        "writing results.csv, s": time.perf_counter() - looked,
        "results.csv, MB": (folder / "results.csv").stat().st_size / 1e6,
        "the table in memory, MB": frame.memory_usage(deep=True).sum() / 1e6,
    }


def hand_out(backend: str, runs: int) -> dict[str, float]:
    """Milliseconds that a run of no work takes, and the dispatcher's own, with two workers."""
    calls = [joblib.delayed(nothing)() for _ in range(runs)]
    with hire(Request(backend, jobs=2), runs) as workers:
        began = time.perf_counter()
        workers.do(calls[:2])
        started, cpu = time.perf_counter(), time.process_time()
        workers.do(calls)
        wall, used = time.perf_counter() - started, time.process_time() - cpu
    return {
        "until the first is done, s": started - began,
        "a run, ms": 1e3 * wall / runs,
        "dispatcher's CPU a run, ms": 1e3 * used / runs,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--backends", nargs="*", default=["local", "ray", "dask"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = one_run(folder / "one")
        files = [file for file in run.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(f"a run of 300 steps: {len(files)} files, {size / 1e3:.0f} kB")
        numbers = run_numbers(Run.open(run))
        for what, value in scan(folder / "many", asked.finished, numbers).items():
            print(f"{asked.finished} finished runs: {what}: {value:.2f}")
    rows = {backend: hand_out(backend, asked.runs) for backend in asked.backends}
    print(pd.DataFrame(rows).T.to_string(float_format="{:.1f}".format))


if __name__ == "__main__":
    main()
