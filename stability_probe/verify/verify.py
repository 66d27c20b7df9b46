"""`verify`: every claim that the records can speak to, as a list of verdicts."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from stability_probe.runs import Run
from stability_probe.verify.counterfactual import counterfactual_verdict
from stability_probe.verify.evidence import Evidence, gather
from stability_probe.verify.feature_band import feature_band_verdict
from stability_probe.verify.feature_law import feature_law_verdict
from stability_probe.verify.gradients import gradient_bound_verdict, gradient_slope_verdict
from stability_probe.verify.input_energy import input_energy_verdict
from stability_probe.verify.oscillation import oscillation_verdict
from stability_probe.verify.robustness import robustness_verdict
from stability_probe.verify.verdict import Verdict

PER_RUN = (
    feature_band_verdict,
    gradient_slope_verdict,
    gradient_bound_verdict,
    robustness_verdict,
)
"""Claims that one network can be held against, at every measured step or noise level."""


def verify(source: pd.DataFrame | Run | Sequence[Run]) -> list[Verdict]:
    """Hold records against Theorems 3.1, 3.3 and 3.4 and Lemma 3.2 of Huang et al. (2023).

    Args:
        source: a frame of records (`probe.frame()`), a run, or several runs. Claims across runs
            need several; claims about constants need a run, whose `run.json` knows them.

    Returns:
        Verdicts, ordered by theorem.

    Raises:
        StabilityProbeError: if there is nothing to verify, or a frame is not one of records.
    """
    evidence = gather(source)
    ensembles = [run for run in evidence if run.kind == "ensemble"]
    training = [run for run in evidence if run.kind == "training"]
    checkpoints = [run for run in evidence if run.kind == "checkpoint"]
    verdicts = [feature_law_verdict(run) for run in ensembles]
    verdicts += [counterfactual_verdict(run) for run in checkpoints]
    verdicts += [claim(run) for claim in PER_RUN for run in (*training, *checkpoints)]
    if len(training) > 1:
        verdicts.append(oscillation_verdict(training))
    verdicts += [input_energy_verdict(runs) for runs in _by_input(training)]
    failures = {run.name: run.info.get("reason") for run in evidence if run.failed}
    verdicts = [
        replace(v, advice=f"{v.advice}; the run failed: {failures[v.run]}")
        if v.run in failures
        else v
        for v in verdicts
    ]
    return sorted(verdicts, key=lambda v: v.theorem)  # stable: the order within stays


def _by_input(runs: Sequence[Evidence]) -> list[list[Evidence]]:
    """Runs grouped by the data and the noise schedule that they were trained on."""
    groups: dict[str, list[Evidence]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.info.get("input"), sort_keys=True), []).append(run)
    return list(groups.values())
