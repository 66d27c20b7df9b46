"""How often a check fails without a reason, and how often it fails with one.

    python -m benchmarks.regression_rates [--pairs N] [--powers N] [--out FOLDER]

Small U-ViTs on digits are trained and recorded over many seeds, as a baseline and as the state to
be checked. For false alarms both are the same configuration with other seeds, no seed in two pairs.
For the power the second has a fault:

    kappa       CS(0.7) became 1
    rate        the learning rate is three times what it was
    norm        the normalisation before the last layer is gone
    doubled     one skip is added twice

Rates come with Clopper-Pearson intervals, for 5, 2 and 1 seeds of the state that is checked. Runs
are kept in a file as they come, so that a benchmark that was stopped goes on.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.report import OUT
from stability_probe.probes import ProbeBatch, StabilityProbe
from stability_probe.probes.buffer import RecordBuffer
from stability_probe.probes.features import unwatched
from stability_probe.probes.sensitivity import SensitivityConfig, SensitivityProbe
from stability_probe.probes.summaries import per_sample
from stability_probe.regression import Measures, measures_of
from stability_probe.regression.compare import compare
from stability_probe.runs import TrainConfig, build_model, load_images
from stability_probe.runs.recording import seeded_scaling
from stability_probe.runs.training import probe_batch, train
from stability_probe.skips import find_skips, parameter_blocks, scale_skips
from stability_probe.verify import Evidence
from stability_probe.verify.statistics import share_interval

CONFIG = TrainConfig(scheme="cs:0.7", steps=24, n_skips=3, width=16, batch_size=16, warmup=5)
SENSITIVITY = SensitivityConfig(epsilons=(0.01,), directions=1, max_products=6)
JOBS = -1
"""Processes; one a core."""
SEEDS = (5, 2, 1)
"""Seeds of the state that is checked; the baseline has five."""


@dataclass(frozen=True)
class State:
    """A state of the code under test."""

    name: str
    config: TrainConfig = CONFIG

    def build(self, seed: int, shape: Sequence[int]) -> nn.Module:
        """The network, with its fault."""
        model = build_model(replace(self.config, seed=seed), shape)
        if self.name == "norm":
            model.norm = nn.Identity()  #
        if self.name == "doubled":
            model.out_blocks[1].register_forward_pre_hook(_double_skip, with_kwargs=True)  #
        return model


STATES = (
    State("as it was"),
    State("kappa", replace(CONFIG, scheme="unscaled")),
    State("rate", replace(CONFIG, learning_rate=3 * CONFIG.learning_rate)),
    State("norm"),
    State("doubled"),
)


def _double_skip(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Pass twice the skip."""
    if "skip" in kwargs:
        return args, {**kwargs, "skip": 2 * kwargs["skip"]}
    return (args[0], 2 * args[1], *args[2:]), kwargs


def measured(state: State, seed: int, images: Tensor) -> Measures:
    """The numbers of one run."""
    config = replace(state.config, seed=seed)
    model = state.build(seed, images.shape[1:])
    batch: ProbeBatch = probe_batch(config, images, 4, 1)
    skips = find_skips(model, *batch.head(1).args)
    with (
        scale_skips(model, skips, seeded_scaling(config.scheme, seed)),
        StabilityProbe(model, skips, every=1, sensitivity_every=0, batch=batch) as probe,
    ):
        for step in train(model, images, config):
            probe.step(loss=step.loss)
        blocks = parameter_blocks(model, skips, *batch.head(1).args)
        last = RecordBuffer()
        with unwatched():
            measure = SensitivityProbe(model, skips, blocks, batch, SENSITIVITY).measure()
        last.add(config.steps, *per_sample(measure))
    frame = pd.concat([probe.frame(), last.frame()], ignore_index=True)
    return measures_of(Evidence(state.name, frame))


class Runs:
    """Numbers of runs by state and seed, kept in a file of a line a run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._images = load_images(CONFIG.data)
        lines = file.read_text().splitlines() if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        rows = [row for row in rows if row["of"] == repr((CONFIG, SENSITIVITY))]
        self._known = {(row["state"], row["seed"]): row["tested"] for row in rows}

    def make(self, state: State, seeds: Iterable[int]) -> None:
        """Measure the runs that are not known yet, a process a core."""
        missing = [seed for seed in seeds if (state.name, seed) not in self._known]
        work = (delayed(measured)(state, seed, self._images) for seed in missing)
        found = Parallel(n_jobs=JOBS, return_as="generator")(work)
        with self._file.open("a") as file:
            for seed, measures in zip(missing, found, strict=True):
                self._known[state.name, seed] = measures.tested
                of = repr((CONFIG, SENSITIVITY))
                row = {"of": of, "state": state.name, "seed": seed, "tested": measures.tested}
                print(json.dumps(row), file=file, flush=True)

    def take(self, state: State, seeds: Iterable[int]) -> dict[str, list[float]]:
        """The numbers that all of some known runs have."""
        found = [self._known[state.name, seed] for seed in seeds]
        common = [name for name in found[0] if all(name in run for run in found)]
        return {name: [run[name] for run in found] for name in common}


def failed(baseline: dict[str, list[float]], now: dict[str, list[float]], seeds: int) -> bool:
    """Whether a check of so many of the runs fails."""
    some = {name: values[:seeds] for name, values in now.items()}
    return any(c.change == "worse" for c in compare(baseline, some))


def rates(runs: Runs, state: State, pairs: int) -> dict[int, int]:
    """How many of so many checks fail, by number of seeds; no seed is in two pairs."""
    count = dict.fromkeys(SEEDS, 0)
    starts = range(0, 10 * pairs, 10)
    runs.make(STATES[0], [start + i for start in starts for i in range(5)])
    runs.make(state, [start + i for start in starts for i in range(5, 10)])
    for start in starts:
        baseline = runs.take(STATES[0], range(start, start + 5))
        now = runs.take(state, range(start + 5, start + 10))
        for n in SEEDS:
            count[n] += failed(baseline, now, n)
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.regression_rates")
    parser.add_argument("--pairs", type=int, default=300, help="of the same configuration")
    parser.add_argument("--powers", type=int, default=60, help="pairs for each fault")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs' numbers")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of every process
    chosen.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(chosen.out / "regression-runs.jsonl")
    table = Table(title="share of checks that fail, with 95 % intervals")
    for name in ("state", "pairs", *(f"{n} seed{'s' * (n > 1)}" for n in SEEDS)):
        table.add_column(name)
    for state in STATES:
        pairs = chosen.pairs if state is STATES[0] else chosen.powers
        count = rates(runs, state, pairs)
        cells = []
        for n in SEEDS:
            low, high = share_interval(count[n] / pairs, pairs)
            cells.append(f"{count[n] / pairs:.1%} [{low:.1%}, {high:.1%}]")
        table.add_row(state.name, str(pairs), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
