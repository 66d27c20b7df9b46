"""Feature energies, and the energies of the loss's gradient with respect to features.

Hooks reduce every tensor they see to one number a sample, on its device, and keep nothing else.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stability_probe.probes.records import Key
from stability_probe.skips import OutputTap, SkipConnection, SliceTap, Tap
from stability_probe.skips.taps import bound_arguments

Site = tuple[str, int]
"""A quantity of Eq. 4: its name and its level."""


def sample_energy(tensor: Tensor, samples: int | None = None) -> Float[Tensor, " batch"]:
    """‖v_s‖² of every sample s of a batch, accumulated in float32 at least.

    Args:
        tensor: (batch, ...).
        samples: how many samples the first dimension holds, if each takes several entries of it.

    >>> sample_energy(torch.ones(2, 3, 4)).tolist()
    [12.0, 12.0]
    """
    flat = tensor.detach().reshape(len(tensor) if samples is None else samples, -1)
    dtype = torch.promote_types(flat.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return norm.square()


class FeatureProbe:
    """Watches x_t, u_i, κ_i u_i, z_i, the merged tensors, h_i and the output of a model.

    Attributes:
        active: whether passing tensors of training passes are looked at.
        energy: ‖·‖² per sample for every pass since `clear`, by site.
        gradient: ‖∂L/∂·‖² per sample likewise, once for every backward pass, with the number of the
            forward pass that it belongs to: backward passes come in another order.
        noise_level: t per sample likewise, where the model's second tensor is one number a sample.
        seconds: time spent in the hooks.
    """

    def __init__(self, skips: Sequence[SkipConnection]) -> None:
        self.skips = skips
        self.active = False
        self.seconds = 0.0
        self.clear()

    @property
    def watching(self) -> bool:
        """Whether a tensor that passes now belongs to a training pass.

        Not in a pass without gradients, such as validation; nor in one that gradient checkpointing
        repeats during the backward pass.
        """
        in_backward: bool = torch._C._current_graph_task_id() != -1
        return self.active and torch.is_grad_enabled() and not in_backward

    def clear(self) -> None:
        """Forget what was seen."""
        self.energy: dict[Site, list[Tensor]] = {}
        self.gradient: dict[Site, list[tuple[int, Tensor]]] = {}
        self.noise_level: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureProbe":
        """An inactive probe: a copy of a probed model is not probed."""
        return FeatureProbe(self.skips)

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Put the hooks into `model`; closing `stack` removes them."""
        input_hook = model.register_forward_pre_hook(self._on_input, with_kwargs=True)
        stack.callback(input_hook.remove)

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

    def samples(self, grad_scale: float) -> dict[Key, Tensor]:
        """What was seen, and the gains κ_i and cross terms that follow from it, per sample.

        Args:
            grad_scale: what the loss was multiplied by before the backward pass.
        """
        energy = {site: torch.cat(parts) for site, parts in self.energy.items()}
        energy |= {("z", i): e for (site, i), e in energy.items() if site == "h" and i > 0}
        found = {Key("energy", site, level, ""): e for (site, level), e in energy.items()}
        for s in self.skips:
            i = s.level
            if all((site, i) in energy for site in ("u", "ku", "z", "merged")):
                gain = (energy["ku", i] / energy["u", i]).sqrt()
                found[Key("kappa", "skip", i, "")] = gain
                cross = energy["merged", i] - energy["z", i] - energy["ku", i]
                found[Key("cross", "merge", i, "")] = cross
        for (site, level), numbered in self.gradient.items():
            parts = [part for _, part in sorted(numbered, key=lambda pair: pair[0])]
            unscaled = torch.cat(parts) * grad_scale**-2
            found[Key("feature_grad_energy", site, level, "")] = unscaled
        return found

    def _on_input(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if not self.watching:
            return
        started = time.perf_counter()
        args, kwargs = bound_arguments(module, args, kwargs)
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        x, t = tensors[0], next(iter(tensors[1:]), None)
        self.energy.setdefault(("x", 0), []).append(sample_energy(x))
        if t is not None and t.numel() in (1, len(x)):
            self.noise_level.append(t.detach().reshape(-1).expand(len(x)).float())
        self.seconds += time.perf_counter() - started


class _Observer:
    """Appends the energy of what passes, and of its gradient when that comes."""

    def __init__(self, probe: FeatureProbe, site: Site, grad: bool, cut: SliceTap | None) -> None:
        self.probe, self.site, self.grad, self.cut = probe, site, grad, cut

    def __call__(self, tensor: Tensor) -> None:
        if not self.probe.watching:
            return
        started = time.perf_counter()
        passes = self.probe.energy.setdefault(self.site, [])
        if self.grad and tensor.requires_grad:
            tensor.register_hook(partial(self._on_gradient, len(passes)))
        passes.append(sample_energy(self._part(tensor)))
        self.probe.seconds += time.perf_counter() - started

    def _on_gradient(self, forward_pass: int, gradient: Tensor) -> None:
        started = time.perf_counter()
        energies = self.probe.gradient.setdefault(self.site, [])
        energies.append((forward_pass, sample_energy(self._part(gradient))))
        self.probe.seconds += time.perf_counter() - started

    def _part(self, tensor: Tensor) -> Tensor:
        return self.cut.cut(tensor) if self.cut else tensor
