"""A callback for Lightning's `Trainer`; it needs the extra `lightning`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stability_probe.errors import StabilityProbeError
from stability_probe.probes import ProbeBatch, ProbeConfig, StabilityProbe
from stability_probe.runs import Run, scalars
from stability_probe.skips import SkipConnection, find_skips

try:
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise StabilityProbeError(
        "StabilityCallback needs Lightning, which is not installed; install "
        "stability_probe[lightning]"
    ) from error


class StabilityCallback(Callback):
    """Probes a network while Lightning trains it; training is not changed.

    Records an optimizer step once, whatever `accumulate_grad_batches` is, with the parameters'
    gradients before they are clipped, and under mixed precision without the scale of the loss.
    Hooks are there while the trainer trains, and no longer, whatever ends it. Records go to the
    trainer's loggers as well, when they are stored.

    A checkpoint of the trainer has the probe in it: `fit(ckpt_path=...)` goes on with the run,
    whose records of later steps are dropped. Under `ddp` process 0 stores; name the `model` then,
    as the LightningModule itself is called by the strategy too.

    Args:
        run: a folder for the records, or a `Run`. Without one they stay in memory (`probe.frame`).
        model: the name of the network in the LightningModule, e.g. `unet`; `None` for itself.
        inputs: an example input of the network, from which its long skips are found; the module's
            `example_input_array` if there is none.
        skips: its long skips, where they have been found or chosen already.
        losses: the attribute of the LightningModule in which `training_step` leaves the loss of
            every sample, a tensor (batch,); where there is none, what it returns is recorded.
        every: see `StabilityProbe`.
        sensitivity_every: likewise.
        config: likewise.
        batch: likewise.
        log: whether to tell the trainer's loggers; the names are those of `runs.tracking`, steps
            are optimizer steps, the first of which is 1.

    Attributes:
        probe: the probe, once training has begun.

    Raises:
        StabilityProbeError: when training begins, if the network or its skips are not found, or
            there is more than one optimizer; and where `StabilityProbe` raises it.

    >>> callback = StabilityCallback("runs/cs", model="unet", inputs=(torch.zeros(1, 1, 8, 8), 0))
    >>> callback.probe is None
    True
    """

    def __init__(
        self,
        run: str | Path | Run | None = None,
        *,
        model: str | None = None,
        inputs: Sequence[Any] | None = None,
        skips: Sequence[SkipConnection] | None = None,
        losses: str = "losses",
        batch: ProbeBatch | None = None,
        every: int = 10,
        sensitivity_every: int = 100,
        config: ProbeConfig | None = None,
        log: bool = True,
    ) -> None:
        self.run = Run(run) if isinstance(run, (str, Path)) else run
        self.probe: StabilityProbe | None = None
        self._model, self._inputs, self._skips = model, inputs, skips
        self._losses, self._log = losses, log
        self._options: dict[str, Any] = {
            "every": every,
            "sensitivity_every": sensitivity_every,
            "config": config,
            "batch": batch,
        }
        self._state: Mapping[str, Any] | None = None
        self._seen: list[Tensor] = []
        self._training = False

    @property
    def state_key(self) -> str:
        """What a checkpoint has the probe under; two networks of a module have one each."""
        return self._generate_state_key(model=self._model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the skips, and begin to watch."""
        if len(trainer.optimizers) != 1:
            raise StabilityProbeError(
                f"StabilityCallback: one optimizer is needed, got {len(trainer.optimizers)}; call "
                "StabilityProbe.step in training_step instead"
            )
        network = self._network(trainer, pl_module)
        skips = self._found(network, pl_module) if self._skips is None else self._skips
        self.probe = StabilityProbe(
            network, skips, run=self.run, on_records=self._logging(trainer), **self._options
        )
        if self._state is not None:
            self.probe.load_state_dict(_with_batch(self._state))
            self._state = None
        self.probe.__enter__()
        self._training = True

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the losses of a micro-batch."""
        losses = getattr(pl_module, self._losses, None)
        if not isinstance(losses, Tensor):
            scale = _scale(trainer, pl_module)
            losses = loss * trainer.accumulate_grad_batches / (1 if scale is None else scale)
        self._seen.append(losses.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Record the step: all gradients are there, unscaled and not yet clipped."""
        if self.probe is None:
            return
        losses, self._seen = self._seen, []
        loss = None
        if losses:
            loss = torch.cat(losses) if losses[0].ndim else torch.stack(losses).mean()
        # An optimizer such as fused Adam divides by the scale itself, in its step.
        unscaled = not getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = _scale(trainer, pl_module)
        self.probe.step(loss=loss, grad_scale=scale, grads_unscaled=unscaled)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store what is left, and remove every hook."""
        self._leave(None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same; the run says what has happened."""
        self._leave(exception)

    def state_dict(self) -> dict[str, Any]:
        """What the probe needs to go on; in a distributed training called by all processes."""
        if self.probe is None:
            return dict(self._state or {})
        self.probe.flush()
        state = self.probe.state_dict()
        batch = state.pop("batch")
        if batch is not None and self._options["batch"] is None:
            # As plain values: a checkpoint may be read with weights_only.
            state["batch"] = {"args": batch.args, "kwargs": dict(batch.kwargs)}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when training begins."""
        self._state = state_dict or None

    def _leave(self, error: BaseException | None) -> None:
        if self.probe is not None and self._training:
            self._training = False
            self.probe.__exit__(
                None if error is None else type(error),
                error,
                None if error is None else error.__traceback__,
            )

    def _network(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        if self._model is None:
            if trainer.world_size > 1:
                raise StabilityProbeError(
                    "StabilityCallback: in several processes the strategy calls the LightningModule"
                    " itself, got model=None; name the network in it, such as model='unet'"
                )
            return pl_module
        try:
            return pl_module.get_submodule(self._model)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise StabilityProbeError(
                f"StabilityCallback: no {self._model!r} in {type(pl_module).__name__}, which has "
                f"{names}"
            ) from error

    def _found(self, network: nn.Module, pl_module: LightningModule) -> list[SkipConnection]:
        inputs = pl_module.example_input_array if self._inputs is None else self._inputs
        if inputs is None:
            raise StabilityProbeError(
                "StabilityCallback: an example input is needed to find the long skips, got none; "
                "pass inputs=(x, t), as the network takes them"
            )
        inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
        moved = move_data_to_device(inputs, pl_module.device)
        args, kwargs = ((), moved) if isinstance(moved, Mapping) else (moved, {})
        skips = find_skips(network, *args, **kwargs)
        if not skips:
            raise StabilityProbeError(
                f"StabilityCallback: {type(network).__name__} has no long skips that can be found; "
                "name the network with model=, or choose them with skips=choose_skips(...)"
            )
        return skips

    def _logging(self, trainer: Trainer) -> Callable[[pd.DataFrame], None] | None:
        if not (self._log and trainer.loggers):
            return None

        def log(frame: pd.DataFrame) -> None:
            for step, values in scalars(frame):
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=step)

        return log


def _scale(trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
    """What the GradScaler multiplies the loss by, not waited for; `None` without a GradScaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=pl_module.device))
    return scale


def _with_batch(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "batch": ProbeBatch(**state["batch"])} if "batch" in state else dict(state)
