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
from stability_probe.runs.suggesting import Budget, Suggestion, suggest_kappa
from stability_probe.runs.sweep import survey, sweep
from stability_probe.runs.tracking import Trackers, log_to, scalars
from stability_probe.runs.training import (
    MODELS,
    TrainConfig,
    TrainStep,
    build_model,
    input_moments,
    noised_batch,
    probe_batch,
    train,
)

__all__ = [
    "DATASETS",
    "MODELS",
    "Budget",
    "EnsembleConfig",
    "Grid",
    "ProbedPoint",
    "ProbingConfig",
    "RecordConfig",
    "Run",
    "Suggestion",
    "Trackers",
    "TrainConfig",
    "TrainStep",
    "build_model",
    "input_moments",
    "load_images",
    "log_to",
    "noised_batch",
    "open_runs",
    "probe_batch",
    "record_checkpoint",
    "record_ensemble",
    "record_training",
    "scalars",
    "suggest_kappa",
    "survey",
    "sweep",
    "train",
]
