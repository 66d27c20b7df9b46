"""What a step can be watched with: the probe, what people write themselves, and other tools.

Each variant attaches itself to a twin for as long as its context lasts, and yields after how many
steps its cost repeats itself. None writes anywhere but into the folder it is given.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.twins import Twin
from stability_probe import Run, StabilityProbe, find_skips

Attach = Callable[[Twin, Path], AbstractContextManager[int]]


@dataclass(frozen=True)
class Variant:
    """A way to watch a step.

    Attributes:
        name: what the table calls it.
        attach: puts it onto a twin.
        needs: the package that it is made of; `None` for none but the own ones.
        share: how many pairs it is measured with, as a share of those of the probe; what costs
            times a step needs few.
        goal: the largest median ratio that is hoped for, where one is.
        apart: whether it changes torch for its whole process, so that it runs in one of its own.
    """

    name: str
    attach: Attach
    needs: str | None = None
    share: float = 0.1
    goal: float | None = None
    apart: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.needs is None or find_spec(self.needs) is not None


@contextmanager
def probed(twin: Twin, folder: Path | None, **settings: Any) -> Iterator[StabilityProbe]:
    """Watch with a `StabilityProbe` that stores into a folder."""
    run = None if folder is None else Run(folder)
    skips = find_skips(twin.model, twin.x[:1], twin.t[:1])
    with StabilityProbe(twin.model, skips, run=run, **settings) as probe:
        twin.observe = lambda loss: probe.step(loss=loss)
        try:
            yield probe
        finally:
            twin.unwatch()


@contextmanager
def every_step(twin: Twin, folder: Path) -> Iterator[int]:
    """The probe, recording every step."""
    with probed(twin, folder, every=1, sensitivity_every=0):
        yield 1


@contextmanager
def default_schedule(twin: Twin, folder: Path) -> Iterator[int]:
    """The probe, recording the steps that it records when nothing is said."""
    with probed(twin, folder, sensitivity_every=0) as probe:
        yield probe.every


@contextmanager
def nothing(twin: Twin, folder: Path) -> Iterator[int]:
    """Watch with nothing: what two plain twins differ by."""
    yield 1


@contextmanager
def item_hooks(twin: Twin, folder: Path) -> Iterator[int]:
    """Forward and full backward hooks on every layer, which take norms off the device at once."""
    norms: dict[str, list[float]] = {}

    def forward(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            norms.setdefault("out", []).append(output.norm().item())

    def backward(module: nn.Module, inputs: object, outputs: tuple[Tensor | None, ...]) -> None:
        if isinstance(outputs[0], Tensor):
            norms.setdefault("grad", []).append(outputs[0].norm().item())

    twin.observe = lambda loss: norms.clear()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # at the first layers
        stack.callback(twin.unwatch)
        for layer in _layers(twin.model):
            stack.callback(layer.register_forward_hook(forward).remove)
            stack.callback(layer.register_full_backward_hook(backward).remove)
        yield 1


@contextmanager
def kept_activations(twin: Twin, folder: Path) -> Iterator[int]:
    """Forward hooks on every layer, which keep a copy of its output until the step ends."""
    kept: list[Tensor] = []

    def forward(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            kept.append(output.detach().clone())

    twin.observe = lambda loss: kept.clear()
    with ExitStack() as stack:
        stack.callback(twin.unwatch)
        for layer in _layers(twin.model):
            stack.callback(layer.register_forward_hook(forward).remove)
        yield 1


@contextmanager
def anomaly_detection(twin: Twin, folder: Path) -> Iterator[int]:
    """`torch.autograd.set_detect_anomaly` during the twin's passes."""
    model = twin.forward

    def forward(x: Tensor, t: Tensor) -> object:
        torch.autograd.set_detect_anomaly(True)
        return model(x, t)

    twin.forward = forward
    twin.observe = lambda loss: torch.autograd.set_detect_anomaly(False)
    try:
        yield 1
    finally:
        torch.autograd.set_detect_anomaly(False)
        twin.unwatch()


@contextmanager
def wandb_watch(twin: Twin, folder: Path) -> Iterator[int]:
    """`wandb.watch(log="all")` with a log every step, offline."""
    import wandb

    folder.mkdir(parents=True)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder))
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(project="benchmark", mode="offline", dir=folder, settings=settings)
    run.watch(twin.model, log="all", log_freq=1)
    twin.observe = lambda loss: run.log({"loss": loss.mean().item()})
    try:
        yield 1
    finally:
        run.unwatch(twin.model)
        run.finish()
        twin.unwatch()


@contextmanager
def tensorboard_histograms(twin: Twin, folder: Path) -> Iterator[int]:
    """A histogram of every parameter and of its gradient every step."""
    from torch.utils.tensorboard import SummaryWriter

    step = 0

    def observe(loss: Tensor) -> None:
        nonlocal step
        step += 1
        writer.add_scalar("loss", loss.mean().item(), step)
        for name, parameter in twin.model.named_parameters():
            writer.add_histogram(name, parameter, step)
            if parameter.grad is not None:
                writer.add_histogram(f"{name}/grad", parameter.grad, step)

    twin.observe = observe
    with SummaryWriter(str(folder)) as writer:
        try:
            yield 1
        finally:
            twin.unwatch()


@contextmanager
def torchlens_record(twin: Twin, folder: Path) -> Iterator[int]:
    """TorchLens's quick recording of the forward pass, every operation's output kept."""
    import torchlens

    kept: list[object] = []

    def forward(x: Tensor, t: Tensor) -> object:
        output, recording = torchlens.record(
            twin.model, [x, t], default_op=True, return_output=True
        )
        kept.append(recording)
        return output

    twin.forward = forward
    twin.observe = lambda loss: kept.clear()
    try:
        yield 1
    finally:
        twin.unwatch()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules that have no modules in them."""
    return [module for module in model.modules() if not any(module.children())]


VARIANTS = (
    Variant("stability_probe, every step", every_step, share=1.0, goal=1.02),
    Variant("stability_probe, default", default_schedule, share=1.0, goal=1.01),
    Variant("nothing (two plain twins)", nothing),
    Variant("hooks with .item()", item_hooks),
    Variant("hooks that keep activations", kept_activations),
    Variant("anomaly detection", anomaly_detection),
    Variant('wandb.watch(log="all"), offline', wandb_watch, needs="wandb"),
    Variant("TensorBoard histograms", tensorboard_histograms, needs="tensorboard"),
    Variant("TorchLens, forward pass", torchlens_record, needs="torchlens", apart=True),
)
"""All of them, the probe's own first."""
