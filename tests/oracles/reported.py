"""Runs of every kind, on disk, for a report."""

from pathlib import Path

from stability_probe import Run
from stability_probe.runs import EnsembleConfig, TrainConfig
from tests.oracles.evidence import checkpoint, complete, ensemble, stored, training, with_paths

HOSTILE = "<img src=x onerror=alert(1)>"
"""A name that must stay one."""
SKIPS = [
    {"level": i, "source": f"down.{i}", "sink": f"up.{i}", "merge": "concat", "kappa": 1.0}
    for i in (1, 2, 3)
]


def every_kind(folder: Path) -> list[Run]:
    """Trainings with paths, a checkpoint, random networks, and loops of a user's own."""
    cost = {"hooks_s": 0.25, "step_s": 0.5, "flush_s": 0.125, "sensitivity_s": 2.0,
            "elapsed_s": 50.0, "overhead": 0.0185}  # fmt: skip
    runs = []
    for seed in (0, 1):
        evidence = complete(seed=seed, skips=SKIPS, parameters=12345)
        evidence = with_paths(evidence, paths=(3.0, 1.5, 0.5))
        config = TrainConfig(scheme="cs:0.7", seed=seed, steps=100, n_skips=3).as_dict()
        run = stored(evidence, folder / f"cs-{seed}", config)
        run.update({"probe": cost})
        runs.append(run)
    runs.append(stored(checkpoint(noise_levels=(50.0, 500.0)), folder / "checkpoint"))
    runs.append(stored(ensemble(20), folder / "ensemble", vars(EnsembleConfig(networks=20))))
    runs.append(own_loop(folder / HOSTILE))
    return runs


def own_loop(folder: Path) -> Run:
    """A run of a loop of the user's own, that says whatever it likes, and was killed at once."""
    run = Run(folder, {"note": "</script><script>alert(2)</script>", "deep": {"list": [1, {}]}})
    run.begin({"skips": []})
    run.append(training().frame.iloc[:0])
    return run
