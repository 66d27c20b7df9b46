"""Recording: one recorder, one file a quantity."""

from stability_probe.probes.batch import ProbeBatch, per_sample_mse
from stability_probe.probes.config import ProbeConfig
from stability_probe.probes.counterfactual import counterfactual_energies
from stability_probe.probes.probe import StabilityProbe
from stability_probe.probes.records import COLUMNS, Key
from stability_probe.probes.sensitivity import SensitivityConfig, SensitivityProbe

__all__ = [
    "COLUMNS",
    "Key",
    "ProbeBatch",
    "ProbeConfig",
    "SensitivityConfig",
    "SensitivityProbe",
    "StabilityProbe",
    "counterfactual_energies",
    "per_sample_mse",
]
