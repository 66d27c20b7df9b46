"""Feature energies, and the energies of the loss's gradient with respect to features.

Hooks reduce every tensor they see to one number a sample, on its device, and keep nothing else.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.records import Key
from stability_probe.skips import OutputTap, SkipConnection, SliceTap, Tap

Site = tuple[str, int]
"""A quantity of Eq. 4: its name and its level."""

Hook = TypeVar("Hook", bound=Callable[..., Any])


def untraced(hook: Hook) -> Hook:
    """Keep `torch.compile` out of a hook: the model's graph is cut there, and the hook runs."""
    reason = (
        "the hooks of a StabilityProbe keep records, which cannot be traced; compile the model "
        "without fullgraph=True"
    )
    return cast(Hook, torch.compiler.disable(hook, reason=reason))


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
    """‖v_s‖ of every sample, wherever its entries lie in memory: no copy is made."""
    tensor = tensor.detach()
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), dtype=dtype)
    return norm


class FeatureProbe:
    """Watches x_t, u_i, κ_i u_i, z_i, the merged tensors, h_i and the output of a model.

    A pass is watched if the model was called with gradients enabled, and not during a backward
    pass: not in validation, then, nor when gradient checkpointing repeats it. Inside such a pass
    gradients may be disabled, as reentrant checkpointing does; what it repeats is not seen again,
    but for the gradients of what the first time had none.

    Attributes:
        active: whether training passes are looked at.
        seen: whether there has been one.
        norms: ‖·‖ per sample for every pass since `clear`, by site.
        gradients: ‖∂L/∂·‖ per sample likewise, once for every backward pass, with the number of the
            forward pass that it belongs to: backward passes come in another order.
        noise_level: t per sample likewise, where the model's second tensor is one number a sample.
        seconds: time spent in the hooks.
    """

    def __init__(self, skips: Sequence[SkipConnection]) -> None:
        self.skips = skips
        self.active, self.passing, self.seen = False, False, False
        self.seconds = 0.0
        self._signature = inspect.signature(lambda *args, **kwargs: None)
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.norms: dict[Site, list[Tensor]] = {}
        self.gradients: dict[Site, list[tuple[int, Tensor]]] = {}
        self.unhooked: dict[Site, list[int]] = {}
        self.noise_level: list[Tensor] = []

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
        ) -> None:
            # A slice is a new tensor that no gradient flows to: watch the whole and cut that.
            cut = tap if isinstance(tap, SliceTap) else None
            observer = _Observer(self, (site, level), grad, cut)
            whole = cut.whole if cut else tap
            stack.callback(whole.attach(model, observer, first=first).remove)

        for s in self.skips:
            watch(s.skip, "u", s.level, grad=True, first=True)  # before any scaling
            watch(s.skip, "ku", s.level)  # after it
            watch(s.merged, "merged", s.level)
            watch(s.decoded, "h", s.level - 1, grad=True)
        if self.skips:
            watch(self.skips[-1].main, "h", len(self.skips), grad=True)
        watch(OutputTap(""), "output", 0)
        end = model.register_forward_hook(self._on_output, always_call=True)
        stack.callback(end.remove)

    def samples(self, grad_scale: float | Tensor) -> dict[Key, Tensor]:
        """What was seen, and the gains κ_i and cross terms that follow from it, per sample.

        Args:
            grad_scale: what the loss was multiplied by before the backward pass.
        """
        energy = dict(zip(self.norms, _squares(self.norms.values()), strict=True))
        energy |= {("z", i): e for (site, i), e in energy.items() if site == "h" and i > 0}
        found = {Key("energy", site, level, ""): e for (site, level), e in energy.items()}
        whole = [s.level for s in self.skips if _seen_alike(energy, s.level)]
        if whole:
            u, ku, z, merged = ([energy[q, i] for i in whole] for q in ("u", "ku", "z", "merged"))
            gains = torch._foreach_sqrt(torch._foreach_div(ku, u))
            crosses = torch._foreach_sub(torch._foreach_sub(merged, z), ku)
            found |= {Key("kappa", "skip", i, ""): g for i, g in zip(whole, gains, strict=True)}
            found |= {Key("cross", "merge", i, ""): c for i, c in zip(whole, crosses, strict=True)}
        in_order = [
            [part for _, part in sorted(numbered, key=lambda pair: pair[0])]
            for numbered in self.gradients.values()
        ]
        for (site, level), e in zip(self.gradients, _squares(in_order, grad_scale), strict=True):
            found[Key("feature_grad_energy", site, level, "")] = e
        return found

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
        if not self.active:
            return
        started = time.perf_counter()
        in_backward = torch._C._current_graph_task_id() != -1
        self.passing = torch.is_grad_enabled() and not in_backward
        if self.passing:
            self.seen = True
            bound = self._signature.bind(*args, **kwargs)
            given = (*bound.args, *bound.kwargs.values())
            tensors = [v for v in given if isinstance(v, Tensor)]
            x, t = tensors[0], next(iter(tensors[1:]), None)
            self.norms.setdefault(("x", 0), []).append(_norm(x))
            if t is not None and t.numel() in (1, len(x)):
                self.noise_level.append(t.detach().reshape(-1).expand(len(x)).float())
        self.seconds += time.perf_counter() - started

    @untraced
    def _on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active:
            self.passing = False


class _Observer:
    """Appends the energy of what passes, and of its gradient when that comes."""

    def __init__(self, probe: FeatureProbe, site: Site, grad: bool, cut: SliceTap | None) -> None:
        self.probe, self.site, self.grad, self.cut = probe, site, grad, cut

    @untraced
    def __call__(self, tensor: Tensor) -> None:
        probe = self.probe
        if not probe.active:
            return
        if not probe.passing:
            self._repeated(tensor)
            return
        started = time.perf_counter()
        passes = probe.norms.setdefault(self.site, [])
        if self.grad:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._on_gradient, len(passes)))
            else:
                probe.unhooked.setdefault(self.site, []).append(len(passes))
        passes.append(_norm(self._part(tensor)))
        probe.seconds += time.perf_counter() - started

    def _repeated(self, tensor: Tensor) -> None:
        """A tensor that passes outside a watched pass: if it is a repetition, watch its gradient.

        Backward passes go through the forward passes last in, first out.
        """
        waiting = self.probe.unhooked.get(self.site)
        in_backward = torch._C._current_graph_task_id() != -1
        if waiting and in_backward and tensor.requires_grad:
            tensor.register_hook(partial(self._on_gradient, waiting.pop()))

    def _on_gradient(self, forward_pass: int, gradient: Tensor) -> None:
        started = time.perf_counter()
        found = self.probe.gradients.setdefault(self.site, [])
        found.append((forward_pass, _norm(self._part(gradient))))
        self.probe.seconds += time.perf_counter() - started

    def _part(self, tensor: Tensor) -> Tensor:
        return self.cut.cut(tensor) if self.cut else tensor


def _seen_alike(energy: dict[Site, Tensor], level: int) -> bool:
    """Whether all tensors of a merge were seen, and on as many samples as each other."""
    sites = [(site, level) for site in ("u", "ku", "z", "merged")]
    return all(site in energy for site in sites) and len({len(energy[s]) for s in sites}) == 1


def _squares(passes: Iterable[Sequence[Tensor]], scale: float | Tensor = 1.0) -> list[Tensor]:
    """The squares of norms over a scale, passes one after the other."""
    norms = [torch.cat(list(parts)) if len(parts) > 1 else parts[0] for parts in passes]
    if not norms:
        return []
    if isinstance(scale, Tensor) or scale != 1:
        norms = list(torch._foreach_div(norms, scale))
    return list(torch._foreach_mul(norms, norms))
