"""`StabilityProbe`: one recorder for features, gradients and sensitivity."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.features import FeatureProbe
from stability_probe.probes.gradients import ParameterProbe
from stability_probe.probes.records import Key, RecordBuffer, RunFolder, empty_frame
from stability_probe.probes.sensitivity import SensitivityConfig, SensitivityProbe
from stability_probe.probes.summaries import per_sample, summarise
from stability_probe.skips import Block, SkipConnection, parameter_blocks
from stability_probe.skips.taps import bound_arguments


@dataclass(frozen=True)
class ProbeConfig:
    """The less used settings of a probe.

    Attributes:
        updates: also record ‖Δθ‖/‖θ‖ per block; it costs a copy of the parameters.
        noise_bins: number of noise-level bins of equal width.
        noise_levels: the noise levels run from 0 to this (exclusive).
        flush_every: recorded steps that are kept on the device before they are stored.
        sensitivity: how the scheduled measurements are taken.

    Raises:
        StabilityProbeError: if a number is not positive.
    """

    updates: bool = False
    noise_bins: int = 4
    noise_levels: float = 1000.0
    flush_every: int = 50
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)

    def __post_init__(self) -> None:
        for name in ("noise_bins", "noise_levels", "flush_every"):
            if getattr(self, name) <= 0:
                raise StabilityProbeError(
                    f"ProbeConfig: {name} must be positive, got {getattr(self, name)}"
                )


class StabilityProbe:
    """Records what a training run does to features, gradients and sensitivity.

    Used as a context manager around the training loop; `step` is called once an optimizer step,
    before the gradients are zeroed. Training is not changed: with the probe and without it, losses,
    gradients and parameters are the same to the last bit. When the block is left, for whatever
    reason, no hook remains and everything recorded is stored.

    Args:
        model: the network, not wrapped; attach a scaling scheme before the probe.
        skips: its long skips, from `find_skips`.
        every: record each `every`-th optimizer step (the first one always).
        sensitivity_every: take the scheduled measurements at the first step and at each multiple
            of this; 0 never.
        run: a `Run` to store into. Without one, the records stay in memory and grow with the steps.
        batch: what to take the scheduled measurements on; `None` keeps the first eight samples that
            the model is given, which leaves out per-sample gradients (they need a target).
        config: further settings.

    Raises:
        StabilityProbeError: if a setting is out of range or the run folder has records already.

    >>> from stability_probe import TheoryUNet, find_skips
    >>> net, x = TheoryUNet(m=8, n_skips=2), torch.ones(4, 8)
    >>> with StabilityProbe(net, find_skips(net, x), sensitivity_every=0) as probe:
    ...     loss = net(x).square().mean(dim=1)
    ...     loss.mean().backward()
    ...     probe.step(loss=loss)
    >>> frame = probe.frame()
    >>> sorted(frame[frame.metric == "energy"].site.unique())
    ['h', 'ku', 'merged', 'output', 'u', 'x', 'z']
    """

    def __init__(
        self,
        model: nn.Module,
        skips: Sequence[SkipConnection],
        *,
        every: int = 1,
        sensitivity_every: int = 100,
        run: RunFolder | None = None,
        batch: ProbeBatch | None = None,
        config: ProbeConfig | None = None,
    ) -> None:
        if every < 1 or sensitivity_every < 0:
            raise StabilityProbeError(
                f"StabilityProbe: every must be at least 1 and sensitivity_every at least 0, "
                f"got {every} and {sensitivity_every}"
            )
        if [s.level for s in skips] != list(range(1, len(skips) + 1)):
            raise StabilityProbeError(
                f"StabilityProbe: skips must have the levels 1..N in order, "
                f"got {[s.level for s in skips]}; pass all that find_skips returned"
            )
        self.model, self.skips, self.run = model, list(skips), run
        self.every, self.sensitivity_every = every, sensitivity_every
        self.config = config or ProbeConfig()
        self.steps = 0
        self._batch = batch
        self._features = FeatureProbe(self.skips)
        self._blocks: dict[str, Block] | None = None
        self._parameters: ParameterProbe | None = None
        self._buffer = RecordBuffer()
        self._in_memory: list[pd.DataFrame] = []
        self._hooks = ExitStack()
        self._seconds = {"step": 0.0, "flush": 0.0, "sensitivity": 0.0}
        self._started = time.perf_counter()
        self._edges: Tensor | None = None
        self._entered = False
        self._ended: float | None = None

    def __enter__(self) -> "StabilityProbe":
        if self._entered:
            raise StabilityProbeError(
                "StabilityProbe: it is used once; make another for another run"
            )
        self._entered = True
        with ExitStack() as stack:
            handle = self.model.register_forward_pre_hook(self._at_first_input, with_kwargs=True)
            stack.callback(handle.remove)
            self._features.attach(self.model, stack)
            if self.run is not None:
                settings = {"every": self.every, "sensitivity_every": self.sensitivity_every}
                settings |= asdict(self.config)
                skips = [s.as_dict() for s in self.skips]
                self.run.begin({"skips": skips, "probe_settings": settings})
            self._hooks = stack.pop_all()
        self._features.active = self._due(self.steps + 1)
        self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._features.active = False
        self._hooks.close()
        try:
            self.flush()
        except Exception as failure:
            self._end(error or failure)
            if error is None:  # otherwise the first error is the one to show
                raise
        else:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._ended = time.perf_counter()
        if self.run is not None:
            reason = None if error is None else f"{type(error).__name__}: {error}"
            state = "complete" if error is None else "failed"
            self.run.end(state, reason, {"probe": self.cost()})

    def step(
        self,
        *,
        loss: Tensor | float | None = None,
        grad_scale: float = 1.0,
        grads_unscaled: bool = False,
    ) -> None:
        """Record one optimizer step; call it after the backward pass and before `zero_grad`.

        Args:
            loss: the per-sample losses (batch,), or one number; recorded as it is.
            grad_scale: what a `GradScaler` multiplied the loss by: `scaler.get_scale()` before
                `scaler.update()`.
            grads_unscaled: whether the parameters' gradients have been divided by it since, as
                `scaler.unscale_` and `scaler.step` do.
        """
        self.steps += 1
        if self._due(self.steps):
            with self._timed("step"):
                self._record(loss, grad_scale, 1.0 if grads_unscaled else grad_scale)
        self._features.clear()
        if self.sensitivity_every and (self.steps == 1 or self.steps % self.sensitivity_every == 0):
            with self._timed("sensitivity"):
                self._measure()
        if len(self._buffer) >= self.config.flush_every:
            self.flush()
        self._features.active = self._due(self.steps + 1)

    def flush(self) -> None:
        """Store what is still on the device."""
        with self._timed("flush"):
            frame = self._buffer.frame()
            if self.run is None:
                self._in_memory.append(frame)
            elif not frame.empty:
                self.run.append(frame)
            self._buffer.clear()  # now that they are stored

    def frame(self) -> pd.DataFrame:
        """All records so far: a tidy frame of step, metric, site, level, stat, value."""
        self.flush()
        if self.run is not None:
            return self.run.records()
        if not self._in_memory:
            return empty_frame()
        return pd.concat(self._in_memory, ignore_index=True)

    def cost(self) -> dict[str, float]:
        """What the probe itself has cost.

        Returns:
            Seconds in hooks, in `step`, in storing and in the scheduled measurements; seconds in
            all; and `overhead`, the first three over the seconds in which the probe did nothing.
        """
        elapsed = (self._ended or time.perf_counter()) - self._started
        seconds = {"hooks": self._features.seconds, **self._seconds}
        bare = max(elapsed - sum(seconds.values()), 1e-9)
        always_on = sum(seconds.values()) - seconds["sensitivity"]
        named = {f"{name}_s": value for name, value in seconds.items()}
        return {**named, "elapsed_s": elapsed, "overhead": always_on / bare}

    def __deepcopy__(self, memo: dict[int, Any]) -> "StabilityProbe":
        """An inert probe: a copy of a probed model (an average of it, say) is not probed."""
        inert = StabilityProbe(nn.Identity(), [])
        inert._blocks = {}
        return inert

    def _due(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """Run the model without taking its features for those of training."""
        active, self._features.active = self._features.active, False
        try:
            yield
        finally:
            self._features.active = active

    def _at_first_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Learn which parameter is in which block, and keep a batch to probe on."""
        if self._blocks is not None or not torch.is_grad_enabled():
            return
        self._blocks = {}  # the forward pass that finds them comes here too
        try:
            with self._timed("sensitivity"), self._unwatched():
                self._blocks = parameter_blocks(self.model, self.skips, *args, **kwargs)
        except Exception:
            self._blocks = None  # the model refuses this input: learn from the next
            raise
        self._parameters = ParameterProbe(self.model, self._blocks, self.config.updates)
        args, kwargs = bound_arguments(module, args, kwargs)
        if self._batch is None:
            self._batch = ProbeBatch(args, kwargs).head(8)
        device = next(v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        self._batch = self._batch.map(lambda tensor: tensor.to(device))

    def _record(
        self, loss: Tensor | float | None, feature_scale: float, parameter_scale: float
    ) -> None:
        """Reduce what the hooks saw, and the parameters, to the numbers of this step."""
        seen = self._features
        samples = seen.samples(feature_scale)
        if loss is not None:
            device = next((v.device for v in samples.values()), None)
            samples[Key("loss", "loss", 0, "")] = torch.as_tensor(loss, device=device).reshape(-1)
        if samples:
            device = next(iter(samples.values())).device
            t = torch.cat(seen.noise_level) if seen.noise_level else None
            if t is not None and len(t) != len(samples[Key("energy", "x", 0, "")]):
                t = None  # some pass of the step had no noise level
            self._buffer.add(self.steps, *summarise(samples, t, self._bin_edges(device)))
        if self._parameters is not None:
            self._buffer.add(self.steps, *self._parameters.read(parameter_scale))

    def _measure(self) -> None:
        """Take the scheduled measurements on the probe batch."""
        if self._blocks is None or self._batch is None:
            return  # the model has not run yet
        probe = SensitivityProbe(
            self.model, self.skips, self._blocks, self._batch, self.config.sensitivity
        )
        with self._unwatched():
            self._buffer.add(self.steps, *per_sample(probe.measure()))

    def _bin_edges(self, device: torch.device) -> Tensor:
        if self._edges is None:
            bins = self.config.noise_bins
            self._edges = torch.arange(1, bins, device=device) * (self.config.noise_levels / bins)
        return self._edges
