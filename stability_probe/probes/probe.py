"""`StabilityProbe`: one recorder for features, gradients and sensitivity."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.buffer import Outgoing, RecordBuffer
from stability_probe.probes.compiled import untraced
from stability_probe.probes.config import ProbeConfig
from stability_probe.probes.features import FeatureProbe, is_unwatched, unwatched
from stability_probe.probes.gradients import ParameterProbe
from stability_probe.probes.ranks import Ranks
from stability_probe.probes.records import RunFolder, as_frame
from stability_probe.probes.refusals import measurable, refuse_settings, refuse_unfit
from stability_probe.probes.sensitivity import SensitivityProbe
from stability_probe.probes.store import OnRecords, Store
from stability_probe.probes.summaries import per_sample
from stability_probe.probes.waiting import GRAD_SCALE, LOSS, beside, waiting
from stability_probe.skips import Block, SkipConnection, parameter_blocks
from stability_probe.skips.compiled import eagerly, unwrapped
from stability_probe.skips.taps import bound_arguments


class StabilityProbe:
    """Records what a training run does to features, gradients and sensitivity.

    Used as a context manager around the training loop; `step` is called once an optimizer step,
    before the gradients are zeroed. Training is not changed: with the probe and without it, losses,
    gradients and parameters are the same to the last bit. When the block is left, for whatever
    reason, no hook remains and everything recorded is stored.

    Args:
        model: the network; what DistributedDataParallel or torch.compile made of it will do too.
        skips: its long skips, from `find_skips`.
        every: record each `every`-th optimizer step, and the first one; 1 is for short runs and
            close looks.
        sensitivity_every: take the scheduled measurements at the first step and at each multiple
            of this; 0 never.
        run: a `Run` to store into. Without one, the records stay in memory and grow with the steps.
        on_records: called with every part of the records (a frame, as of `frame`) when it is
            stored: 50 recorded steps at a time, and what is left at the end; in a distributed
            training by process 0. `runs.log_to` makes one for a tracker. If it raises an error,
            there is a warning, and it is not called again.
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
        every: int = 10,
        sensitivity_every: int = 100,
        run: RunFolder | None = None,
        on_records: OnRecords | None = None,
        batch: ProbeBatch | None = None,
        config: ProbeConfig | None = None,
    ) -> None:
        refuse_settings(every, sensitivity_every, [s.level for s in skips])
        self.model, self.skips, self.run = unwrapped(model), list(skips), run
        self.every, self.sensitivity_every = every, sensitivity_every
        self.config = config or ProbeConfig()
        self.steps = 0
        self._batch = batch
        self._features = FeatureProbe(self.skips)
        self._blocks: dict[str, Block] | None = None
        self._parameters: ParameterProbe | None = None
        self._moved_from: list[Tensor] = []
        self._details_turn = -1
        self._buffer = RecordBuffer(min(self.config.flush_every, 64))
        self._owed = False
        self._dropped: str | None = None
        self._outgoing: Outgoing | None = None
        self._store = Store(run, on_records)
        self._ranks = Ranks()
        self._hooks = ExitStack()
        self._seconds = {"step": 0.0, "flush": 0.0, "sensitivity": 0.0}
        self._started = time.perf_counter()
        self._entered = False
        self._ended: float | None = None

    def __enter__(self) -> "StabilityProbe":
        if self._entered:
            raise StabilityProbeError(
                "StabilityProbe: it is used once; make another for another run"
            )
        self._entered = True
        refuse_unfit(self.model, self.sensitivity_every)
        with ExitStack() as stack:
            self._ranks = stack.enter_context(closing(Ranks.meet(self.config.timeout)))
            # Before the hooks of what shards a model, so that blocks are found outside its pass.
            handle = self.model.register_forward_pre_hook(
                self._at_first_input, with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
            self._features.attach(self.model, stack)
            if self.run is not None:
                self._ranks.together(self._begin)
            self._hooks = stack.pop_all()
        self._expect(self.steps + 1)
        self._started = time.perf_counter() - self._seconds.pop("earlier", 0.0)
        return self

    def _begin(self) -> None:
        """Open the run folder."""
        assert self.run is not None
        if self.steps > 0:
            self.run.resume(self.steps)
            return
        settings = {"every": self.every, "sensitivity_every": self.sensitivity_every}
        first = next(self.model.parameters(), torch.empty(0))
        self.run.begin(
            {
                "skips": [s.as_dict() for s in self.skips],
                "probe_settings": settings | asdict(self.config),
                "device": first.device.type,
            }
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._features.active = False
        try:
            if error is None or self._ranks.world == 1:
                self.flush()
            elif len(self._buffer):
                first, last = self._buffer.steps[0], self._buffer.steps[-1]
                steps = f"records of steps {first}–{last} were not stored"
                self._dropped = f"{steps}, as other processes may be gone"
        except Exception as failure:
            self._end(error or failure)
            if error is None:  # otherwise the first error is the one to show
                raise
        else:
            self._end(error)
        finally:
            self._hooks.close()

    def _end(self, error: BaseException | None) -> None:
        self._ended = time.perf_counter()
        if self._ranks.first:
            reason = None if error is None else f"{type(error).__name__}: {error}"
            reasons = [text for text in (reason, self.missing) if text]
            self._store.end("; ".join(reasons) or None, {"probe": self.cost()})

    def step(
        self,
        *,
        loss: Tensor | float | None = None,
        grad_scale: float | Tensor | None = None,
        grads_unscaled: bool = False,
    ) -> None:
        """Record one optimizer step; call it after the backward pass and before `zero_grad`.

        Gradients are recorded as they are then: clipping before it shows in those of parameters and
        not in those of features, and some optimizers write into them. In a distributed training
        every process calls it, and the loss is taken to be the mean of theirs. A feature that two
        backward passes go through, `torch.autograd.grad` among them, has a gradient of each.

        Args:
            loss: the per-sample losses (batch,), or one number; recorded as it is.
            grad_scale: what a `GradScaler` multiplied the loss by: `scaler.get_scale()` before
                `scaler.update()`. Steps whose gradients are not finite, which the scaler skips, are
                then marked.
            grads_unscaled: whether the parameters' gradients have been divided by it since, as
                `scaler.unscale_` and `scaler.step` do.

        Raises:
            StabilityProbeError: if the model has made no training pass yet that the probe has seen,
                if the gradients are gone already, or if what was seen cannot be recorded rightly.
        """
        if self._outgoing is not None:  # what the last flush has queued has arrived by now
            self._keep(self._outgoing)
        self.steps += 1
        if self._due(self.steps):
            # A model that was not trained in this step is recorded in the next in which it is.
            self._owed = self._features.idle
            if not self._owed:
                with self._timed("step"):
                    self._record(loss, grad_scale, grads_unscaled)
                if self._features.details:
                    self._details_turn = self._turn(self.steps)
        self._features.clear()
        if self.sensitivity_every and (self.steps == 1 or self.steps % self.sensitivity_every == 0):
            with self._timed("sensitivity"):
                self._measure()
        if len(self._buffer) >= self.config.flush_every:
            with self._timed("flush"):
                self._outgoing = self._buffer.take()
            if self._outgoing.arrived:
                self._keep(self._outgoing)
        self._expect(self.steps + 1)

    def flush(self) -> None:
        """Store what is still on the device; in a distributed training, called by all processes."""
        if self._outgoing is not None:
            self._keep(self._outgoing)
        if self._ended is None:
            self._outgoing = self._buffer.take()
            self._keep(self._outgoing)

    def frame(self) -> pd.DataFrame:
        """All records so far: a tidy frame of step, metric, site, level, stat, value.

        In a distributed training it is called by all processes, as `flush` is, and process 0 has
        the records; the others have none unless they can read the run folder.
        """
        self.flush()
        return self._store.frame()

    @property
    def missing(self) -> str | None:
        """Which records should be stored and are not, and why; `None` if there are none."""
        reasons = (self._ranks.lost, self._dropped, self._store.missing)
        return "; ".join(reason for reason in reasons if reason) or None

    def cost(self) -> dict[str, float]:
        """What the probe itself has cost.

        Returns:
            Seconds in hooks, in `step`, in storing, `on_records` included, and in the scheduled
            measurements; seconds in all; and `overhead`, the first three over the seconds in which
            the probe did nothing.
        """
        elapsed = (self._ended or time.perf_counter()) - self._started
        seconds = {"hooks": self._features.seconds, **self._seconds}
        bare = max(elapsed - sum(seconds.values()), 1e-9)
        always_on = sum(seconds.values()) - seconds["sensitivity"]
        named = {f"{name}_s": value for name, value in seconds.items()}
        return {**named, "elapsed_s": elapsed, "overhead": always_on / bare}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, pickled or not, is inert: a copy of a probed model is not probed."""
        return _inert, ()

    def state_dict(self) -> dict[str, Any]:
        """What a probe of the same run needs to go on from here in another process.

        Take it right after `flush`, beside the state of the model and of the optimizer.
        """
        seconds = {"hooks": self._features.seconds, **self._seconds}
        seconds["earlier"] = time.perf_counter() - self._started
        return {
            "steps": self.steps,
            "seconds": seconds,
            "seen": self._features.seen,
            "owed": self._owed,
            "details_turn": self._details_turn,
            "moved_from": self._parameters.state_dict() if self._parameters else self._moved_from,
            "batch": None if self._batch is None else self._batch.map(lambda v: v.cpu()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a step that another process has reached; call it before the block is entered.

        Args:
            state: from `state_dict`; a batch in it is used if the probe was not given one.

        Raises:
            StabilityProbeError: if the block has been entered.
        """
        if self._entered:
            raise StabilityProbeError(
                "StabilityProbe: load_state_dict comes before the `with` block is entered"
            )
        self.steps = int(state["steps"])
        self._seconds = dict(state["seconds"])
        self._features.seconds = self._seconds.pop("hooks")
        self._features.seen, self._owed = state["seen"], state["owed"]
        self._details_turn = int(state["details_turn"])
        self._moved_from = list(state["moved_from"])
        if self._batch is None:
            self._batch = state.get("batch")

    def _expect(self, step: int) -> None:
        """Look at what the next step will be recorded of."""
        self._features.active = self._due(step)
        self._features.details = self._turn(step) != self._details_turn

    def _turn(self, step: int) -> int:
        return step // self.config.details_every

    def _due(self, step: int) -> bool:
        return self._owed or step == 1 or step % self.every == 0

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    @untraced
    def _at_first_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Learn which parameter is in which block, and keep a batch to probe on."""
        if self._blocks is not None or is_unwatched() or not torch.is_grad_enabled():
            return
        with self._timed("sensitivity"), unwatched(), eagerly():
            self._blocks = parameter_blocks(self.model, self.skips, *args, **kwargs)
        self._parameters = ParameterProbe(self.model, self._blocks, self.config.updates)
        if self._moved_from:
            self._parameters.load_state_dict(self._moved_from)
            self._moved_from = []
        args, kwargs = bound_arguments(module, args, kwargs)
        if self._batch is None:
            self._batch = ProbeBatch(args, kwargs).head(8)
        device = next(v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        self._batch = self._batch.map(lambda tensor: tensor.to(device))

    def _keep(self, outgoing: Outgoing) -> None:
        """Store numbers that have been copied off the device, those of all processes together."""
        with self._timed("flush"):
            frame = as_frame(self._ranks.gather(outgoing.parts()))
            self._outgoing = None  # an interrupt before would leave it to the last flush
            if self._ranks.first:
                self._store.put(frame)

    def _record(
        self, loss: Tensor | float | None, grad_scale: float | Tensor | None, unscaled: bool
    ) -> None:
        """Reduce what the hooks saw, and the parameters, to the numbers of this step."""
        seen = self._features
        if not seen.seen:
            raise StabilityProbeError(
                "StabilityProbe.step: no training pass has been seen; call the probed model itself "
                "(not its forward, nor a copy of it) with gradients enabled, inside the block"
            )
        taken = seen.taken()
        like = next(iter(taken.values()), torch.empty(0))
        if loss is not None:
            taken[LOSS] = beside(like, loss)
        if taken:
            # The loss of a distributed training is the mean over the processes' losses.
            loss_scale = (1.0 if grad_scale is None else grad_scale) * self._ranks.world
            taken[GRAD_SCALE] = beside(like, loss_scale)
            bins = self.config.noise_bins, self.config.noise_levels
            self._buffer.add(self.steps, *waiting(taken, *bins))
        if self._parameters is not None:
            if seen.gradients and not self._parameters.have_gradients:
                raise StabilityProbeError(
                    "StabilityProbe.step: no parameter has a gradient, though there was a backward "
                    "pass; call step() before the gradients are zeroed"
                )
            scale = 1.0 if unscaled and grad_scale is not None else grad_scale
            self._buffer.add(self.steps, *self._parameters.read(scale, seen.details))

    def _measure(self) -> None:
        """Take the scheduled measurements on the probe batch."""
        if self._blocks is None or self._batch is None or not self._ranks.first:
            return  # the model has not run yet, or process 0 measures for all
        probe = SensitivityProbe(
            self.model, self.skips, self._blocks, self._batch, self.config.sensitivity
        )
        with (
            unwatched(),
            eagerly(),
            torch.inference_mode(False),
            torch.autocast(self._batch.x.device.type, enabled=False),
            measurable(),
        ):
            self._buffer.add(self.steps, *per_sample(probe.measure()))


def _inert() -> StabilityProbe:
    probe = StabilityProbe(nn.Identity(), [])
    probe._blocks = {}
    return probe
