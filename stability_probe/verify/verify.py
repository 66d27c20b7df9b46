"""`verify`: every claim that the records can speak to, as a list of verdicts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from stability_probe.errors import StabilityProbeError
from stability_probe.runs import Run
from stability_probe.verify.counterfactual import counterfactual_verdict
from stability_probe.verify.evidence import Evidence, gather
from stability_probe.verify.feature_band import feature_band_verdict
from stability_probe.verify.feature_law import feature_law_verdict
from stability_probe.verify.gradient_law import gradient_law_verdict
from stability_probe.verify.gradients import gradient_bound_verdict, gradient_slope_verdict
from stability_probe.verify.input_energy import input_energy_verdict
from stability_probe.verify.oscillation import oscillation_verdict
from stability_probe.verify.robustness import robustness_verdict
from stability_probe.verify.statistics import ALPHA
from stability_probe.verify.verdict import Verdict

PER_RUN = (feature_band_verdict, gradient_slope_verdict, gradient_bound_verdict)
"""Claims that one network is tested on, at every measured step or noise level."""


def verify(source: pd.DataFrame | Run | Sequence[Run], *, alpha: float = ALPHA) -> list[Verdict]:
    """Hold records against Theorems 3.1, 3.3 and 3.4 and Lemma 3.2 of Huang et al. (2023).

    The probability that any of the claims of one call is VIOLATED while all are true is α at most:
    each claim that the records can be tested on gets an equal share of α (Bonferroni). So the more
    claims, the wider the intervals; `Verdict.confidence` says how wide.

    Args:
        source: a frame of records (`probe.frame()`), a run, or several runs. Claims across runs
            need several; claims about constants need a run, whose `run.json` knows them.
        alpha: α, in (0, 1/2).

    Returns:
        Verdicts, ordered by theorem.

    Raises:
        StabilityProbeError: if there is nothing to verify, a frame is not one of records, or α is
            out of range.
    """
    if not 0 < alpha < 0.5:
        raise StabilityProbeError(
            f"verify: alpha is the rate of false alarms, in (0, 0.5); got {alpha}"
        )
    evidence = gather(source)
    claims = _claims(evidence)
    tested = sum(_decides(claim(alpha=alpha)) for claim in claims)
    verdicts = [claim(alpha=alpha / max(tested, 1)) for claim in claims]
    training, checkpoints = _of(evidence, "training"), _of(evidence, "checkpoint")
    # Theorem 3.4 has to be true at every single point: it is not a matter of samples.
    verdicts += [_literal(robustness_verdict, run) for run in (*training, *checkpoints)]
    failures = {run.name: run.info.get("reason") for run in evidence if run.failed}
    verdicts = [
        replace(v, advice=f"{v.advice}; the run failed: {failures[v.run]}")
        if v.run in failures
        else v
        for v in verdicts
    ]
    return sorted(verdicts, key=lambda v: v.theorem)  # stable: the order within stays


def _claims(evidence: Sequence[Evidence]) -> list[Callable[..., Verdict]]:
    """Every claim that is tested on these records, as a function of α."""
    training, checkpoints = _of(evidence, "training"), _of(evidence, "checkpoint")
    claims = [
        *((feature_law_verdict, run) for run in _of(evidence, "ensemble")),
        *((gradient_law_verdict, run) for run in _of(evidence, "ensemble") if _has_gradients(run)),
        *((counterfactual_verdict, run) for run in checkpoints),
        *((claim, run) for claim in PER_RUN for run in (*training, *checkpoints)),
    ]
    about_one = [partial(_literal, claim, run) for claim, run in claims]
    across = [partial(oscillation_verdict, training)] if len(training) > 1 else []
    return [*about_one, *across, *(partial(input_energy_verdict, r) for r in _by_input(training))]


def _has_gradients(run: Evidence) -> bool:
    return bool(run.samples("sample_grad_energy", "a").size)


def _decides(verdict: Verdict) -> bool:
    """Whether a verdict could have been VIOLATED by chance."""
    return verdict.interval is not None and verdict.status != "ASSUMPTION_UNMET"


def _literal(claim: Callable[..., Verdict], run: Evidence, **settings: float) -> Verdict:
    """The verdict on a run; ASSUMPTION_UNMET, with its numbers, where its scheme has no κ_i."""
    verdict = claim(run, **settings)
    if run.unmet_scheme is None:
        return verdict
    advice = f"{run.unmet_scheme}; {_measured_gains(run)}; {verdict.advice}"
    return replace(verdict, status="ASSUMPTION_UNMET", advice=advice)


def _measured_gains(run: Evidence) -> str:
    """Mean, least and largest ‖scaled u_i‖/‖u_i‖ of every skip, in words."""
    mean, least, largest = (run.series("kappa", "skip", s) for s in ("mean", "min", "max"))
    gains = [f"{mean[i].mean():.3g} ({least[i].min():.3g}..{largest[i].max():.3g})" for i in mean]
    return f"measured gains {', '.join(gains)}" if gains else "no gains were measured"


def _of(evidence: Sequence[Evidence], kind: str) -> list[Evidence]:
    return [run for run in evidence if run.kind == kind]


def _by_input(runs: Sequence[Evidence]) -> list[list[Evidence]]:
    """Runs grouped by the data and the noise schedule that they were trained on."""
    groups: dict[str, list[Evidence]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.info.get("input"), sort_keys=True), []).append(run)
    return list(groups.values())
