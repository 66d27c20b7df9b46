"""Probing one network as it is, without training it: a run whose steps are noise levels.

The records are those that a `StabilityProbe` takes at a scheduled step, and the counterfactual
energies; step k belongs to the k-th noise level, which `run.json` lists. So every claim about a
training run can be held against a checkpoint too.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes import (
    Key,
    ProbeBatch,
    SensitivityConfig,
    SensitivityProbe,
    counterfactual_energies,
)
from stability_probe.probes.buffer import RecordBuffer
from stability_probe.probes.certified import certified_constants
from stability_probe.probes.features import FeatureProbe
from stability_probe.probes.summaries import per_sample, summarise
from stability_probe.runs.run import Run
from stability_probe.skips import Scaling, SkipConnection, Unscaled, parameter_blocks, scale_skips
from stability_probe.skips.find import evaluating


@dataclass(frozen=True)
class ProbedPoint:
    """A noise level and the samples to probe at it.

    Attributes:
        noise_level: what the network is given as its time; `None` if it takes none.
        batch: the samples; with a target, gradients are measured too.
    """

    noise_level: float | None
    batch: ProbeBatch


@dataclass(frozen=True)
class ProbingConfig:
    """What is measured at every noise level.

    Attributes:
        sensitivity: how norms are taken; with the paths through every skip.
        seed: of random directions and starting vectors.
    """

    sensitivity: SensitivityConfig = field(default_factory=lambda: SensitivityConfig(paths=True))
    seed: int = 0


def record_checkpoint(
    model: nn.Module,
    skips: Sequence[SkipConnection],
    points: Sequence[ProbedPoint],
    run: Run,
    *,
    scheme: Scaling | None = None,
    info: Mapping[str, Any] | None = None,
    config: ProbingConfig | None = None,
    on_point: Callable[[], None] | None = None,
    on_smaller: Callable[[int], None] | None = None,
) -> Run:
    """Measure a network in evaluation mode at some noise levels, and record it.

    Args:
        model: the network; it is left as it was.
        skips: its long skips, at least one.
        points: noise levels with their samples.
        run: a folder that holds no run yet.
        scheme: a scaling of the skips to measure it under; `None` is the network as it is.
        info: what else `run.json` is to say.
        config: what to measure.
        on_point: called after every noise level.
        on_smaller: called with the number of samples that is tried next when the memory does not
            suffice for more.

    Returns:
        The finished run.

    Raises:
        StabilityProbeError: if there are no skips or points, the folder holds a run, or the memory
            does not suffice.
    """
    if not skips or not points:
        raise StabilityProbeError(
            f"record_checkpoint: needs long skips and noise levels, got {len(skips)} and "
            f"{len(points)}"
        )
    config = config or ProbingConfig()
    scheme = scheme or Unscaled()
    with ExitStack() as stack:
        scaled = stack.enter_context(scale_skips(model, skips, scheme))
        levels = [point.noise_level for point in points]
        run.begin(
            {
                "kind": "checkpoint",
                "seed": config.seed,
                "scheme": scheme.name,
                "kappa": scaled.kappa,
                "unmet": scheme.unmet,
                "skips": [s.as_dict() for s in skips],
                "noise_levels": None if None in levels else levels,
                "device": points[0].batch.x.device.type,
                "dtype": str(points[0].batch.x.dtype).removeprefix("torch."),
                "parameters": sum(p.numel() for p in model.parameters()),
                **(info or {}),
            }
        )
        try:
            samples = len(points[0].batch.x)
            for step, point in enumerate(points, start=1):
                measure = partial(_measured, model, skips, point.batch, config, step)
                may_shrink = step == 1 and not point.batch.whole
                frame, samples = _fitting(measure, samples, on_smaller if may_shrink else None)
                run.append(frame)
                if on_point is not None:
                    on_point()
            run.update({"global_constants": _global_constants(model, skips, points[0].batch)})
        except BaseException as error:
            run.end("failed", f"{type(error).__name__}: {error}", {})
            raise
        run.end("complete", None, {})
    return run


def _global_constants(
    model: nn.Module, skips: Sequence[SkipConnection], batch: ProbeBatch
) -> dict[str, Any]:
    """The blocks' certified global constants, or under `refused` why there are none."""
    try:
        return asdict(certified_constants(model, skips, batch.head(1)))
    except StabilityProbeError as error:
        return {"refused": str(error)}


def _fitting(
    measure: Callable[[int], pd.DataFrame],
    samples: int,
    on_smaller: Callable[[int], None] | None,
) -> tuple[pd.DataFrame, int]:
    """What is measured on as many samples as the memory suffices for, halved until it does.

    Only the first noise level may take fewer samples: all have the same ones.
    """
    while True:
        try:
            return measure(samples), samples
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            if samples == 1 or on_smaller is None:
                raise StabilityProbeError(
                    f"out of memory with {samples} samples at a time; choose a smaller --batch or "
                    "another --device"
                ) from error
        samples //= 2
        on_smaller(samples)


def _measured(
    model: nn.Module,
    skips: Sequence[SkipConnection],
    batch: ProbeBatch,
    config: ProbingConfig,
    step: int,
    samples: int,
) -> pd.DataFrame:
    """All records of one noise level on the leading samples."""
    batch = batch.head(samples)
    buffer = RecordBuffer()
    blocks = parameter_blocks(model, skips, *batch.head(1).args, **batch.head(1).kwargs)
    probe = SensitivityProbe(model, skips, blocks, batch, config.sensitivity, config.seed)
    buffer.add(step, *summarise(_features(model, skips, batch), None, torch.empty(0)))
    buffer.add(step, *per_sample(probe.measure()))
    buffer.add(step, *per_sample(counterfactual_energies(model, skips, batch)))
    return buffer.frame()


def _features(
    model: nn.Module, skips: Sequence[SkipConnection], batch: ProbeBatch
) -> dict[Key, Tensor]:
    """What a feature probe sees of one pass and, with a target, of its backward pass."""
    with ExitStack() as stack, evaluating(model), torch.enable_grad():
        features = FeatureProbe(skips)
        features.attach(model, stack)
        features.active = True
        x = batch.x.detach().requires_grad_()
        inputs = replace(batch, args=(x, *batch.args[1:]))
        if batch.target is None:
            inputs.call(model)
            return features.samples(grad_scale=1.0)
        losses = inputs.losses(model)
        torch.autograd.grad(losses.sum(), x)
        return features.samples(grad_scale=1.0) | {Key("loss", "loss", 0, ""): losses.detach()}
