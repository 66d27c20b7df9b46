r"""A small diffusion training loop: variance-preserving noise, ε-prediction, per-sample loss.

$x_t = \alpha_t x_0 + \sigma_t\epsilon$ with $\alpha_t^2 + \sigma_t^2 = 1$; the network predicts
$\epsilon$, and $\ell_s$ is the mean squared error of sample s over its pixels. `train` returns an
iterator over steps, so that whoever records sees each step from outside the loop.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_constant_schedule_with_warmup
from jaxtyping import Float, Int
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError, TrainingDiverged
from stability_probe.models import TheoryUNet, UViT, UViTConfig
from stability_probe.probes import ProbeBatch, per_sample_mse
from stability_probe.runs.batches import Batches
from stability_probe.runs.data import DATASETS
from stability_probe.runs.processes import from_all, join
from stability_probe.skips import parse_scaling
from stability_probe.skips.taps import first_tensor

MODELS = ("uvit", "unet2d", "theory-unet")
"""The networks that `build_model` makes."""
NOISE_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
"""β schedules, as diffusers names them."""
PRECISIONS = ("fp32", "bf16")
"""What the forward pass computes in."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        scheme: scaling of the skips, as `parse_scaling` reads it.
        steps: optimizer steps.
        seed: of the weights, the order of the data, the noise levels and the noise.
        data: name of a data set.
        model: `uvit`, `unet2d` (diffusers' UNet2DModel) or `theory-unet` (Eq. 4).
        n_skips: N, the number of long skips; a UNet2DModel takes 4, 6, 8, ....
        width: token width of the U-ViT, or base channels of the UNet2DModel.
        batch_size: samples a step, over all processes.
        learning_rate: of AdamW, after the warm-up.
        warmup: steps over which the learning rate rises from 0.
        weight_decay: of AdamW.
        noise_schedule: β schedule, as diffusers names it.
        noise_levels: number T of noise levels.
        patch_size: of the U-ViT; `None` for 2 up to 16 pixels a side, and 4 above.
        precision: of the forward pass: `fp32`, or `bf16` under autocast.

    Raises:
        StabilityProbeError: if a value is out of range or a name unknown.
    """

    scheme: str = "unscaled"
    steps: int = 300
    seed: int = 0
    data: str = "digits"
    model: str = "uvit"
    n_skips: int = 6
    width: int = 64
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.01
    noise_schedule: str = "linear"
    noise_levels: int = 1000
    patch_size: int | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        parse_scaling(self.scheme)
        for name in ("steps", "n_skips", "width", "batch_size", "noise_levels", "patch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise StabilityProbeError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise StabilityProbeError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise StabilityProbeError(f"learning_rate must be positive, got {self.learning_rate}")
        names = {
            "model": MODELS, "data": DATASETS, "noise_schedule": NOISE_SCHEDULES,
            "precision": PRECISIONS,
        }  # fmt: skip
        for name, known in names.items():
            if getattr(self, name) not in known:
                raise StabilityProbeError(
                    f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}"
                )
        if self.model == "unet2d" and (self.n_skips < 4 or self.n_skips % 2):
            raise StabilityProbeError(
                f"n_skips of a unet2d must be 4, 6, 8, ... (two resolutions), got {self.n_skips}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step, as it has just happened; the gradients are still there.

    Attributes:
        step: counted from 1.
        loss: ℓ_s of every sample of this process.
        noise_level: t of every sample of this process.
        learning_rate: what the step was taken with.
    """

    step: int
    loss: Float[Tensor, " batch"]
    noise_level: Int[Tensor, " batch"]
    learning_rate: float


def build_model(config: TrainConfig, shape: Sequence[int]) -> nn.Module:
    """A network for images of a shape (channels, height, width), with seeded weights.

    Raises:
        StabilityProbeError: if the network cannot take that shape.
    """
    channels, height, width = shape
    if config.model == "theory-unet":
        generator = torch.Generator().manual_seed(config.seed)
        m = channels * height * width
        return TheoryUNet(m, config.n_skips, unit_gain=True, generator=generator)
    if config.model == "uvit":
        sizes = UViTConfig(
            img_size=height,
            patch_size=config.patch_size or (2 if height <= 16 else 4),
            in_chans=channels,
            embed_dim=config.width,
            depth=2 * config.n_skips + 1,
        )
        return UViT(sizes, torch.Generator().manual_seed(config.seed))
    with torch.random.fork_rng(devices=[]):  # diffusers draws weights from the global generator
        torch.manual_seed(config.seed)
        unet: Any = UNet2DModel(
            sample_size=height,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(config.width, 2 * config.width),
            layers_per_block=config.n_skips // 2 - 1,
            norm_num_groups=math.gcd(config.width, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
        )
        return cast(nn.Module, unet)


def noise_scheduler(config: TrainConfig) -> Any:
    """The schedule of α_t and σ_t."""
    return DDPMScheduler(
        num_train_timesteps=config.noise_levels, beta_schedule=config.noise_schedule
    )


def input_moments(images: Tensor, scheduler: Any) -> dict[str, float | int]:
    """What x_t is made of, as Lemma 3.2 needs to know: the arguments of `theory.input_energy`.

    Args:
        images: the data (n, channels, height, width).
        scheduler: of diffusers; its `alphas_cumprod` are α_t².
    """
    return {
        "m": images[0].numel(),
        "second_moment": images.double().square().mean().item(),
        "mean_alpha_squared": scheduler.alphas_cumprod.mean().item(),
    }


def probe_batch(
    config: TrainConfig,
    images: Tensor,
    size: int,
    sensitive: int,
    noise_level: int | None = None,
) -> ProbeBatch:
    """The `noised_batch` of a run; it depends on the run's noise schedule and not on its seed."""
    return noised_batch(images, noise_scheduler(config), size, sensitive, noise_level)


def noised_batch(
    images: Tensor,
    scheduler: Any,
    size: int = 200,
    sensitive: int = 4,
    noise_level: int | None = None,
) -> ProbeBatch:
    """A batch of noised images to measure on, the same ones every time.

    It is spread over the images and over the noise levels; its target is the noise. Theorems 3.1
    and 3.3 need 100 to 200 samples to be decided. No random number of the training is drawn.

    Args:
        images: the data (n, channels, height, width).
        scheduler: of diffusers; has `add_noise` and `alphas_cumprod`.
        size: number of samples, all images if there are fewer.
        sensitive: how many of them Jacobian norms, which cost more, are taken on.
        noise_level: t of all samples; `None` spreads them. The images and their noise are the same.
    """
    generator = torch.Generator().manual_seed(2023)
    x0 = images[torch.randperm(len(images), generator=generator)[:size]]
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.linspace(0, len(scheduler.alphas_cumprod) - 1, len(x0)).long()
    t = t[torch.randperm(len(t), generator=generator)]
    t = t if noise_level is None else torch.full_like(t, noise_level)
    x = scheduler.add_noise(x0, noise, t)
    return ProbeBatch((x, t), target=noise, sensitive=sensitive)


def train(model: nn.Module, images: Tensor, config: TrainConfig) -> "Training":
    """Train with AdamW after a linear warm-up; what is returned gives one step after another.

    Several processes (`accelerate launch`, `torchrun`) share every batch evenly and take the same
    steps, up to rounding, as one alone.

    Args:
        model: takes (x_t, t) and predicts the noise; it is trained in place.
        images: the data (n, channels, height, width) in [−1, 1].
        config: the run.

    Raises:
        StabilityProbeError: if there are no images, or no equal shares of a batch.
        TrainingDiverged: after a step whose loss is not finite has been given.
    """
    return Training(model, images, config)


class Training(Iterator[TrainStep]):
    """A training under way: an iterator that takes one step each time it is asked for one.

    Until the next one is asked for, the gradients of a step are still there.

    Attributes:
        step: the number of steps that have been taken.
        finite: whether every loss of the last one, in all processes, was finite.
    """

    def __init__(self, model: nn.Module, images: Tensor, config: TrainConfig) -> None:
        if len(images) == 0:
            raise StabilityProbeError("the data set is empty: at least one image is needed, got 0")
        self.config = config
        self.step = 0
        self.finite = True
        self._accelerator = join()
        self._batch_size = min(config.batch_size, len(images))
        self._share = _share(
            self._batch_size, self._accelerator.num_processes, self._accelerator.process_index
        )
        self._images, self._model = images, model
        self._generator = torch.Generator().manual_seed(config.seed)
        self._batches = Batches(len(images), self._batch_size, self._generator)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            foreach=True,  # the same bits as one by one, and sooner, also on a CPU
        )
        self._warmup = get_constant_schedule_with_warmup(optimizer, config.warmup)
        self._wrapped, self._optimizer = self._accelerator.prepare(model, optimizer)
        self._schedule = noise_scheduler(config)
        self._autocast = torch.autocast(
            self._accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        model.train()

    def __next__(self) -> TrainStep:
        self._optimizer.zero_grad()
        if not self.finite:
            raise TrainingDiverged(
                f"the loss was not finite at step {self.step} of {self.config.steps}"
            )
        if self.step >= self.config.steps:
            raise StopIteration
        x0, noise, t = self._draw()
        with self._autocast:
            output = first_tensor(self._wrapped(self._schedule.add_noise(x0, noise, t), t))
        loss = per_sample_mse(output, noise)
        self._accelerator.backward(loss.mean())
        learning_rate = float(self._warmup.get_last_lr()[0])
        self._optimizer.step()
        if not self._accelerator.optimizer_step_was_skipped:
            self._warmup.step()
        self.step += 1
        broken = (~loss.detach().isfinite()).sum()
        self.finite = int(self._accelerator.reduce(broken, "sum")) == 0
        return TrainStep(self.step, loss.detach(), t, learning_rate)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """This process's share of x_0, of the noise and of t: all draw the whole batch alike."""
        chosen = next(self._batches)[self._share]
        shape = (self._batch_size, *self._images.shape[1:])
        noise = torch.randn(shape, generator=self._generator)
        t = torch.randint(self.config.noise_levels, (self._batch_size,), generator=self._generator)
        whole = (self._images[chosen], noise[self._share], t[self._share])
        x0, noise, t = (tensor.to(self._accelerator.device) for tensor in whole)
        return x0, noise, t

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on; call it in all processes.

        The tensors are not copied: they change with the next step.
        """
        scaler = self._accelerator.scaler
        return {
            "step": self.step,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "warmup": self._warmup.state_dict(),
            "scaler": {} if scaler is None else scaler.state_dict(),
            "generator": self._generator.get_state(),
            "batches": self._batches.state_dict(),
            "random": from_all(_random_state(self._accelerator.device)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that another training of the same run has reached.

        The global random state is set to what it was then, as networks may draw from it.
        """
        self.step = int(state["step"])
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._warmup.load_state_dict(state["warmup"])
        if self._accelerator.scaler is not None and state["scaler"]:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._generator.set_state(state["generator"])
        self._batches.load_state_dict(state["batches"])
        if self._accelerator.process_index < len(state["random"]):
            _set_random_state(state["random"][self._accelerator.process_index])


def _share(batch_size: int, processes: int, index: int) -> slice:
    """One process's samples of a batch.

    Raises:
        StabilityProbeError: if they would not all have as many.
    """
    if batch_size % processes:
        raise StabilityProbeError(
            f"batch_size counts the samples of all processes, and must be a multiple of their "
            f"number {processes}, got {batch_size}; change one of the two"
        )
    size = batch_size // processes
    return slice(index * size, (index + 1) * size)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the global generators that a network on a device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for kind, state in states.items():
        if kind != "cpu":
            torch.get_device_module(kind).set_rng_state(state)
