r"""Noise levels, and clean samples with noise on them.

$x_t = \alpha_t x_0 + \sigma_t\epsilon$ with $\alpha_t^2 + \sigma_t^2 = 1$. Where no data is given,
$x_0$ is standard normal too, and so is x_t at every level: the network then sees noise of the right
energy and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stability_probe.checkpoints.reading import read_json_object, reading
from stability_probe.errors import StabilityProbeError

Target = Literal["epsilon", "sample", "v_prediction"]
"""What the network predicts, as diffusers names it: ε, x_0, or α_t ε − σ_t x_0."""


@dataclass(frozen=True)
class Schedule:
    r"""Noise levels.

    Attributes:
        alphas_cumprod: $\alpha_t^2$ of every level t.
        prediction: what the network predicts, if the checkpoint says.
        note: one sentence on where it is from.
    """

    alphas_cumprod: Tensor
    prediction: str | None
    note: str

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: float | int, unit: bool) -> tuple[float, float]:
        """α_t and σ_t; `unit` levels run from 0 to 1 instead of counting.

        Raises:
            StabilityProbeError: if there is no such level.
        """
        place = round(t * (len(self) - 1)) if unit else int(t)
        if not 0 <= place < len(self) or (unit and not 0 <= t <= 1):
            most = "1" if unit else str(len(self) - 1)
            raise StabilityProbeError(f"noise level {t:g}: must lie in 0..{most}")
        squared = float(self.alphas_cumprod[place])
        return squared**0.5, (1 - squared) ** 0.5


def load_schedule(path: Path) -> Schedule:
    """The noise levels of a diffusers pipeline that a checkpoint lies in, else those of DDPM.

    Raises:
        StabilityProbeError: if the pipeline's scheduler cannot be read.
    """
    from diffusers import DDPMScheduler

    for folder in (path, path.parent):
        file = folder / "scheduler" / "scheduler_config.json"
        if file.is_file():
            config = read_json_object(file)
            with reading(file, "a noise schedule"):
                scheduler: Any = DDPMScheduler.from_config(config)
            kind = config.get("prediction_type", "epsilon")
            return Schedule(scheduler.alphas_cumprod, kind, f"noise schedule of {file}")
    note = "noise schedule of DDPM, linear, 1000 levels (the checkpoint has none)"
    default: Any = DDPMScheduler()
    return Schedule(default.alphas_cumprod, None, note)


def noised(
    x0: Tensor, alpha: float, sigma: float, generator: torch.Generator, target: str | None
) -> tuple[Tensor, Tensor | None]:
    """x_t, and what a network that predicts `target` should make of it.

    >>> x0 = torch.ones(1, 2)
    >>> x, target = noised(x0, 1.0, 0.0, torch.Generator(), "sample")
    >>> x.tolist(), target.tolist()
    ([[1.0, 1.0]], [[1.0, 1.0]])

    Raises:
        StabilityProbeError: if the target is unknown.
    """
    if target is not None and target not in get_args(Target):
        raise StabilityProbeError(
            f"target {target!r}: must be one of {', '.join(get_args(Target))}"
        )
    epsilon = torch.randn(x0.shape, generator=generator, dtype=torch.float32).to(x0)
    x = alpha * x0 + sigma * epsilon
    targets = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}
    return x, targets[target] if target is not None else None


def default_levels(schedule: Schedule, unit: bool) -> Sequence[float]:
    """A low, a middle and a high noise level."""
    shares = (0.05, 0.5, 0.95)
    return shares if unit else [float(int(share * len(schedule))) for share in shares]
