"""Feature energies, and the energies of the loss's gradient with respect to features.

Hooks reduce every tensor they see to one number a sample, on its device, and keep nothing else.
"""

import inspect
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.compiled import Seam, untraced
from stability_probe.probes.quantities import GRADIENT_NORM, NOISE_LEVEL, NORM, quantities
from stability_probe.probes.records import Key
from stability_probe.skips import OutputTap, SkipConnection, SliceTap, Tap
from stability_probe.skips.taps import Observer, tensors_of

Site = tuple[str, int]
"""A quantity of Eq. 4: its name and its level."""

_ACCUMULATED = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""What norms are accumulated in, where it is not the tensor's own type."""
_ALL_BUT_FIRST = [tuple(range(1, ndim)) for ndim in range(6)]
_EARLIER = -1
"""Stands for the number of a pass of an earlier step."""

_OFF: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def unwatched() -> Iterator[None]:
    """Run a model without any probe on it taking that for training."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def is_unwatched() -> bool:
    """Whether no probe is to take what runs now for training."""
    return _OFF.get()


def sample_energy(tensor: Tensor, samples: int | None = None) -> Float[Tensor, " batch"]:
    """‖v_s‖² of every sample s of a batch, accumulated in float32 at least.

    Args:
        tensor: (batch, ...).
        samples: how many samples the first dimension holds, if each takes several entries of it.

    >>> sample_energy(torch.ones(2, 3, 4)).tolist()
    [12.0, 12.0]
    """
    if samples is not None and samples != len(tensor):
        tensor = tensor.reshape(samples, -1)
    return _norm(tensor).square()


def _norm(tensor: Tensor) -> Tensor:
    """‖v_s‖ of every sample, wherever its entries lie in memory: no copy is made.

    Raises:
        StabilityProbeError: if there are no samples.
    """
    tensor = tensor.detach()
    ndim = tensor.ndim
    if ndim < 2:
        if ndim == 0:
            raise StabilityProbeError(
                "StabilityProbe: the model's output, or a feature, is one number and has no "
                "samples; a model that returns a loss too has to return its output before it"
            )
        tensor, ndim = tensor[:, None], 2
    dtype = _ACCUMULATED.get(tensor.dtype)
    dims = _ALL_BUT_FIRST[ndim] if ndim < len(_ALL_BUT_FIRST) else tuple(range(1, ndim))
    if ndim > 2 and not tensor.is_contiguous():
        # Rows with gaps between them, as slices of the last dimension have: reduced all at once
        # they take six times as long as row by row.
        row, *others = sorted(dims, key=tensor.stride)
        if tensor.stride(row) == 1 and tensor.stride(others[0]) > tensor.shape[row]:
            tensor = torch.linalg.vector_norm(tensor, dim=row, keepdim=True, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype)
    return norm


class FeatureProbe:
    """Watches x_t, u_i, κ_i u_i, z_i, the merged tensors, h_i and the output of a model.

    A pass is watched if the model was called with gradients enabled, and not during a backward
    pass: not in validation, then, nor when gradient checkpointing repeats it. Inside such a pass
    gradients may be disabled, as reentrant checkpointing does; what it repeats is not seen again,
    but for the gradients of what the first time had none.

    Attributes:
        active: whether training passes are looked at.
        details: whether gradients with respect to features are, too.
        seen: whether there has been one.
        passes: how many there have been since `clear`.
        norms: ‖·‖ per sample for each of them, by site.
        gradients: ‖∂L/∂·‖ per sample likewise, once for every backward pass, with the number of the
            forward pass that it belongs to: backward passes come in another order.
        unhooked: the numbers of the passes in which a tensor had no gradient when it passed.
        entered: the number of the pass that the backward pass has reached, where that is needed.
        views: tensors that share their memory, until the backward pass, with how often that had
            been written to.
        unfit: why the records of this step would be wrong, if they would.
        noise_level: t per sample, where the model's second tensor is one number a sample.
        seconds: time spent in the hooks.
    """

    def __init__(self, skips: Sequence[SkipConnection]) -> None:
        self.skips = skips
        self.active, self.passing, self.seen = False, False, False
        self.details = True
        self.seconds = 0.0
        self._signature = inspect.signature(lambda *args, **kwargs: None)
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.passes = self._noted = 0
        self._before: dict[Site, int] = {}
        self.norms: dict[Site, list[Tensor]] = {}
        self.gradients: dict[Site, list[tuple[int, Tensor]]] = {}
        self.unhooked: dict[Site, set[int]] = {}
        self.entered: int | None = None
        self.views: list[tuple[Site, Tensor, int]] = []
        self.unfit: str | None = None
        self.noise_level: list[Tensor] = []
        self._unscaled: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, pickled or not, is inactive: a copy of a probed model is not probed."""
        return FeatureProbe, (self.skips,)

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Put the hooks into `model`; closing `stack` removes them."""
        self._signature = inspect.signature(model.forward)
        begin = model.register_forward_pre_hook(self._on_input, with_kwargs=True)
        stack.callback(begin.remove)

        def watch(
            tap: Tap, site: str, level: int, *, grad: bool = False, first: bool = False
        ) -> _Observer:
            # A slice is a new tensor that no gradient flows to: watch the whole and cut that.
            cut = tap if isinstance(tap, SliceTap) else None
            observer = _Observer(self, (site, level), grad, cut)
            whole = cut.whole if cut else tap
            stack.callback(whole.attach(model, observer, first=first).remove)
            return observer

        for s in self.skips:
            u = watch(s.skip, "u", s.level, grad=True, first=True)  # before any scaling
            if u.cut is None:
                u.seam = Seam()
            if u.seam is not None and isinstance(s.feature, OutputTap):
                place = replace(s.feature, call=None)
                stack.callback(place.attach(model, u.seam).remove)
            watch(s.skip, "ku", s.level)  # after it
            watch(s.merged, "merged", s.level)
            watch(s.decoded, "h", s.level - 1, grad=True)
        if self.skips:
            watch(self.skips[-1].main, "h", len(self.skips), grad=True)
        watch(OutputTap(""), "output", 0)
        end = model.register_forward_hook(_End(self), always_call=True)
        stack.callback(end.remove)

    def taken(self) -> dict[Key, Tensor]:
        """What was seen per sample, passes one after the other: norms of features and of gradients.

        Beside them `NOISE_LEVEL`, if every pass had one.

        Raises:
            StabilityProbeError: if it would be wrong.
        """
        self.look_at_views()
        if self.unfit is not None:
            raise StabilityProbeError(f"StabilityProbe.step: {self.unfit}")
        found = {Key(NORM, *site, ""): _in_a_row(parts) for site, parts in self.norms.items()}
        for site, numbered in self.gradients.items():
            in_order = [part for _, part in sorted(numbered, key=lambda pair: pair[0])]
            found[Key(GRADIENT_NORM, *site, "")] = _in_a_row(in_order)
        if self.noise_level and len(self.noise_level) == len(self.norms["x", 0]):
            found[NOISE_LEVEL] = _in_a_row(self.noise_level)
        return found

    def samples(self, grad_scale: float | Tensor) -> dict[Key, Tensor]:
        """The `quantities` of what was seen.

        Args:
            grad_scale: what the loss was multiplied by before the backward pass.

        Raises:
            StabilityProbeError: if it would be wrong.
        """
        return quantities(self.taken(), grad_scale)

    @property
    def idle(self) -> bool:
        """Whether the model was trained before, and not since `clear`."""
        return self.seen and self.passes == 0 and self.unfit is None

    @property
    def watching(self) -> bool:
        """Whether a training pass would be looked at now."""
        return self.active and not is_unwatched()

    def norm_of(self, site: Site, tensor: Tensor, cut: SliceTap | None) -> Tensor:
        """‖·‖ per sample of what passes at a site; of a skip that nothing has scaled it is known.

        torch's version counter says whether anything has.
        """
        name, level = site
        if name == "ku":
            known = self._unscaled.pop(level, None)
            if known is not None:
                u, version, norm = known
                if u() is tensor and tensor._version == version:
                    return norm
        norm = _norm(cut.cut(tensor) if cut else tensor)
        if name == "u" and not tensor.is_inference():
            self._unscaled[level] = weakref.ref(tensor), tensor._version, norm
        return norm

    def look_at_views(self) -> None:
        """See whether what shares its memory has been written to since it passed."""
        for (site, level), view, version in self.views:
            if view._version != version:
                self.unfit = (
                    f"{site}_{level} is a view of another tensor that is written to in place after "
                    "it has passed, so that its gradient cannot be told; change the model's code "
                    "from `h += ...` to `h = h + ...` there"
                )
        self.views = []

    @untraced
    def _on_input(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if getattr(module, "_is_replica", False):
            raise StabilityProbeError(
                f"StabilityProbe: {type(module).__name__} runs as a replica of "
                "torch.nn.DataParallel, whose copies' records would be lost; use "
                "torch.nn.parallel.DistributedDataParallel, one process a device"
            )
        if not self.watching:
            return
        started = time.perf_counter()
        self.passing = torch.is_grad_enabled() and not _in_backward()
        if self.passing:
            self.seen = True
            self._before = {site: len(parts) for site, parts in self.norms.items()}
            self._noted = len(self.noise_level)
            self.passes += 1
            if kwargs:  # in the order of the signature
                bound = self._signature.bind(*args, **kwargs)
                args = (*bound.args, *bound.kwargs.values())
            tensors = [v for v in args if isinstance(v, Tensor)]
            x, t = tensors[0], next(iter(tensors[1:]), None)
            self.norms.setdefault(("x", 0), []).append(_norm(x))
            if t is not None and t.numel() in (1, len(x)):
                t = t.detach().to(x.device, non_blocking=True)
                self.noise_level.append(t.reshape(-1).expand(len(x)))
        self.seconds += time.perf_counter() - started

    def _on_output(self, output: Any) -> None:
        if not self.watching:
            return
        if output is None and self.passing:
            self._forget_pass()
        reached: Callable[[Tensor], None] | None = None
        if self.passing:
            if self.unhooked:
                reached = partial(self._enter, self.unhooked, self.passes - 1)
        elif torch.is_grad_enabled() and _in_backward():
            reached = self._refuse  # a repetition that was seen before gets no gradient
        self.passing = False
        for tensor in tensors_of(output) if reached is not None else ():
            if tensor.requires_grad:
                tensor.register_hook(reached)

    def _forget_pass(self) -> None:
        """Take back what was seen of a pass that has failed, perhaps to be tried again."""
        self.passes -= 1
        self.passing = False
        self.norms = {
            s: parts[: self._before[s]] for s, parts in self.norms.items() if s in self._before
        }
        del self.noise_level[self._noted :]
        for numbers in self.unhooked.values():
            numbers.discard(self.passes)

    def _enter(self, unhooked: dict[Site, set[int]], number: int, gradient: Tensor) -> None:
        """The backward pass has reached a pass, perhaps one of an earlier step."""
        self.entered = number if unhooked is self.unhooked else _EARLIER

    def _refuse(self, gradient: Tensor) -> None:
        """The loss depends on a pass that was made during the backward pass."""
        self.seen = True
        self.unfit = (
            "the whole model is inside gradient checkpointing with use_reentrant=True, so that its "
            "training pass has no gradients; pass use_reentrant=False, or checkpoint its blocks"
        )


class _End:
    """Ends a pass, behind all that look at its output."""

    last = True

    def __init__(self, probe: FeatureProbe) -> None:
        self.probe = probe

    @untraced
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.probe._on_output(output)


class _Observer(Observer):
    """Appends the energy of what passes, and of its gradient when that comes."""

    def __init__(self, probe: FeatureProbe, site: Site, grad: bool, cut: SliceTap | None) -> None:
        self.probe, self.site, self.grad, self.cut = probe, site, grad, cut
        self.seam: Seam | None = None

    @untraced
    def __call__(self, tensor: Tensor) -> None:
        probe = self.probe
        if not probe.watching:
            return
        if not probe.passing:
            self._repeated(tensor)
            return
        started = time.perf_counter()
        if self.grad and probe.details:
            number = probe.passes - 1
            if tensor.requires_grad:
                self._hook(tensor, number)
            else:
                probe.unhooked.setdefault(self.site, set()).add(number)
        probe.norms.setdefault(self.site, []).append(probe.norm_of(self.site, tensor, self.cut))
        probe.seconds += time.perf_counter() - started

    def _repeated(self, tensor: Tensor) -> None:
        """A tensor that passes outside a watched pass: if it is a repetition, watch its gradient.

        What non-reentrant checkpointing repeats inside a repetition has a graph that no gradient
        flows through.
        """
        waiting = self.probe.unhooked.get(self.site)
        if waiting and tensor.requires_grad and _in_backward():
            number = self.probe.entered
            if number is None and self.probe.passes == 1:
                number = 0
            if number in waiting:
                self._hook(tensor, number)

    def _hook(self, tensor: Tensor, number: int) -> None:
        if self.seam is not None and self.seam.hides(tensor):
            return
        tensor.register_hook(partial(self._on_gradient, self.probe.gradients, number))
        if tensor._is_view():
            self.probe.views.append((self.site, tensor.detach(), tensor._version))

    def _on_gradient(
        self, gradients: dict[Site, list[tuple[int, Tensor]]], number: int, gradient: Tensor
    ) -> None:
        started = time.perf_counter()
        if self.probe.views and not self.probe.passing:
            self.probe.look_at_views()
        norm = _norm(self.cut.cut(gradient) if self.cut else gradient)
        gradients.setdefault(self.site, []).append((number, norm))
        self.probe.seconds += time.perf_counter() - started


def _in_backward() -> bool:
    """Whether this thread is in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _in_a_row(parts: Sequence[Tensor]) -> Tensor:
    """The samples of all passes, one pass after the other."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
