"""Run folders, the small training loop, and what is recorded from them."""

from stability_probe.runs.data import DATASETS, load_images
from stability_probe.runs.grid import Grid
from stability_probe.runs.probing import ProbedPoint, ProbingConfig, record_checkpoint
from stability_probe.runs.recording import (
    EnsembleConfig,
    RecordConfig,
    record_ensemble,
    record_training,
)
from stability_probe.runs.run import Run, open_runs
from stability_probe.runs.sweep import survey, sweep
from stability_probe.runs.training import (
    MODELS,
    TrainConfig,
    TrainStep,
    build_model,
    train,
)

__all__ = [
    "DATASETS",
    "MODELS",
    "EnsembleConfig",
    "Grid",
    "ProbedPoint",
    "ProbingConfig",
    "RecordConfig",
    "Run",
    "TrainConfig",
    "TrainStep",
    "build_model",
    "load_images",
    "open_runs",
    "record_checkpoint",
    "record_ensemble",
    "record_training",
    "survey",
    "sweep",
    "train",
]
