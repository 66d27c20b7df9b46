"""What to change so that a claim can be decided, in the words of what made the run.

That is `probe` for a checkpoint, `train` where `run.json` has `probing`, and otherwise a
`StabilityProbe` in a loop of one's own.
"""

from stability_probe.verify.evidence import Evidence

MOST = 4096
"""The largest probe batch that is advised."""
BATCH = "StabilityProbe(..., batch=ProbeBatch((x, t), target=noise))"


def nothing_measured(run: Evidence) -> str:
    """Why there is no measurement on a probe batch."""
    settings = run.info.get("probing") or run.info.get("probe_settings") or {}
    if settings.get("sensitivity_every"):
        return "the measurements on a probe batch are scheduled, and none was recorded"
    option = " (train --sensitivity-every)" if "probing" in run.info else ""
    return f"no measurement on a probe batch was scheduled; set sensitivity_every above 0{option}"


def larger_batch(run: Evidence, samples: int | None) -> str:
    """How to have so many samples in the probe batch; `None` is more than can be said."""
    if samples is None or samples > MOST:
        many = "very many" if samples is None else f"about {samples}"
        return f"more samples are no way to tell: {many} would be needed"
    if run.kind == "checkpoint":
        return f"pass --batch {samples} to `probe`"
    if "probing" in run.info:
        return f"pass --probe-samples {samples} to `train`"
    return f"pass {BATCH} with {samples} samples"


def target_missing(run: Evidence, samples: int) -> str:
    """How to have the gradients of every sample measured."""
    if run.kind == "checkpoint":
        return "no target was given; pass --target to `probe`"
    return f"the probe batch has no target; pass {BATCH} with {samples} samples or more"


def input_missing() -> str:
    """How to have a run's `run.json` say what Lemma 3.2 needs to know."""
    moments = "stability_probe.runs.input_moments(images, schedule)"
    return (
        "the records do not say what data and noise schedule they come from; pass a Run whose "
        f'run.json has `input`: StabilityProbe(..., run=Run(folder, about={{"input": {moments}}}))'
    )
