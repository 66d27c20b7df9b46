"""A brief training of any network, for a check inside a test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes import ProbeBatch, ProbeConfig, StabilityProbe, per_sample_mse
from stability_probe.probes.sensitivity import SensitivityConfig
from stability_probe.regression.baseline import Baseline
from stability_probe.regression.check import Check, check
from stability_probe.regression.groups import Group, side_by_side
from stability_probe.regression.measures import Measures, measures_of
from stability_probe.regression.reports import markdown
from stability_probe.skips import SkipConnection, find_skips
from stability_probe.skips.taps import first_tensor
from stability_probe.verify import Evidence

NAME = "model_factory"
"""What the only group of such a baseline is called."""


@dataclass(frozen=True)
class BriefTraining:
    """How the network is trained.

    Attributes:
        steps: of AdamW; 0 for one pass without a step.
        loss: of (output, *inputs), a loss a sample; `None` for `reconstruction`.
        learning_rate: of AdamW.
        sensitivity: whether Jacobians are measured after the last step.

    Raises:
        StabilityProbeError: if a number is out of range.
    """

    steps: int = 30
    loss: Callable[..., Tensor] | None = None
    learning_rate: float = 1e-3
    sensitivity: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.learning_rate > 0:
            raise StabilityProbeError(
                "stability_check: train_steps must be at least 0 and learning_rate positive, got "
                f"{self.steps} and {self.learning_rate}"
            )


def reconstruction(output: Tensor, *inputs: Any) -> Tensor:
    """Mean squared difference of the output and the first input, or the output's mean square."""
    x = inputs[0]
    return per_sample_mse(output, x if x.shape == output.shape else torch.zeros_like(output))


def brief_group(
    model_factory: Callable[[], nn.Module],
    inputs: Sequence[Any],
    seeds: Sequence[int],
    training: BriefTraining,
) -> Group:
    """Train a network from every seed, and measure it.

    torch's global generator is left as it was.

    Raises:
        StabilityProbeError: if there are no seeds, or the network has no long skips.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise StabilityProbeError(f"stability_check: needs seeds, each once, got {list(seeds)}")
    found, skips = [], []
    for seed in seeds:
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)
            model = model_factory()
            skips = find_skips(model, *inputs)
            if not skips:
                raise StabilityProbeError(
                    f"stability_check: {type(model).__name__} has no long skips; "
                    "is it the whole network?"
                )
            found.append(_trained(model, skips, inputs, training))
    if len(seeds) > 1 and all(m.tested == found[0].tested for m in found):
        raise StabilityProbeError(
            "stability_check: every seed gave the same numbers; model_factory has to draw its "
            "weights from torch's global generator, which is seeded before each call"
        )
    return Group(
        name=NAME,
        about=_about(skips, inputs, training),
        context={"torch": torch.__version__, "parameters": _count(model)},
        command="pytest --stability-update",
        seeds=[str(seed) for seed in seeds],
        tested=side_by_side(NAME, [m.tested for m in found]),
        hints=side_by_side(NAME, [m.hints for m in found], must=False),
    )


def held_against(file: Path, group: Group, margin: float, update: bool = False) -> Check:
    """The group held against the baseline in a file, or written into it.

    κ and all else that the network's code decides may differ: that is what the check looks for.

    Raises:
        StabilityProbeError: if the baseline cannot be used.
    """
    if update:
        Baseline([group], group.command).write(file)
        return Check([])
    return check([group], Baseline.read(file), margin=margin, source=str(file))


def failure_text(found: Check, file: Path) -> str:
    """What a failed test says."""
    return (
        f"training has become less stable than in {file}\n\n{markdown(found)}\n"
        "If that is meant, write the baseline anew with pytest --stability-update."
    )


def _trained(
    model: nn.Module,
    skips: Sequence[SkipConnection],
    inputs: Sequence[Any],
    training: BriefTraining,
) -> Measures:
    loss_of = training.loss or reconstruction
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate)
    steps = max(training.steps, 1)
    batch = ProbeBatch(tuple(inputs)).head(4)
    with StabilityProbe(
        model,
        skips,
        every=1,
        sensitivity_every=steps if training.sensitivity else 0,
        batch=batch,
        config=ProbeConfig(sensitivity=SensitivityConfig(paths=True)),
    ) as probe:
        for _ in range(steps):
            losses = loss_of(first_tensor(model(*inputs)), *inputs)
            losses.mean().backward()
            probe.step(loss=losses)
            if training.steps:
                optimizer.step()
            optimizer.zero_grad()
    info = {"skips": [s.as_dict() for s in skips]}
    return measures_of(Evidence(NAME, probe.frame(), info))


def _about(
    skips: Sequence[SkipConnection], inputs: Sequence[Any], training: BriefTraining
) -> dict[str, Any]:
    """What has to be the same: how it is trained, and how many skips there are."""
    shapes = [list(v.shape) if isinstance(v, Tensor) else repr(v) for v in inputs]
    return {
        "inputs": shapes,
        "learning_rate": training.learning_rate,
        "n_skips": len(skips),
        "sensitivity": training.sensitivity,
        "train_steps": training.steps,
    }


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
