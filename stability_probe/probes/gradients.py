"""Energies of parameters, of their gradients, and of their updates."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stability_probe.probes.records import Key
from stability_probe.probes.summaries import Numbers
from stability_probe.skips import Block


class ParameterProbe:
    """Reads the parameters of a model once a step, in a few fused operations.

    A parameter without a gradient counts as having gradient 0: the loss does not depend on it.
    Frozen parameters (`requires_grad` is false) are left out.

    Args:
        model: the model.
        blocks: the block of every parameter by name.
        updates: also measure ‖Δθ‖/‖θ‖ per kind of block, at the cost of a copy of the parameters.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Block], updates: bool) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters: list[Tensor] = [p for _, p in named]
        self._blocks = [blocks[name] for name, _ in named]
        sites = [
            (f"{b.kind}/{name}", b.level) for (name, _), b in zip(named, self._blocks, strict=True)
        ]
        self._keys = [
            Key(metric, site, level, "value")
            for metric in ("grad_energy", "param_energy")
            for site, level in sites
        ]
        self._before = [p.detach().clone() for p in self._parameters] if updates else []

    @torch.no_grad()
    def read(self, grad_scale: float) -> Numbers:
        """The energies now.

        Args:
            grad_scale: what the loss was multiplied by before the backward pass.

        Returns:
            Keys, and as many numbers, on the device.
        """
        if not self._parameters:
            return [], torch.empty(0)
        zero = torch.zeros((), device=self._parameters[0].device)
        norms = iter(_norms([p.grad for p in self._parameters if p.grad is not None]))
        grads = [zero if p.grad is None else next(norms) for p in self._parameters]
        params = _norms(self._parameters)
        energies = [torch.stack(grads).square() * grad_scale**-2, torch.stack(params).square()]
        keys, updates = self._read_updates()
        return [*self._keys, *keys], torch.cat([*energies, updates])

    def _read_updates(self) -> Numbers:
        if not self._before:
            return [], torch.empty(0, device=self._parameters[0].device)
        moved = _norms(list(torch._foreach_sub(self._parameters, self._before)))
        sizes = _norms(self._parameters)
        torch._foreach_copy_(self._before, self._parameters)
        keys, values = [], []
        for block in dict.fromkeys(self._blocks):
            mine = [i for i, b in enumerate(self._blocks) if b == block]
            step = torch.stack([moved[i] for i in mine]).square().sum()
            size = torch.stack([sizes[i] for i in mine]).square().sum()
            keys.append(Key("update_ratio", block.kind, block.level, "value"))
            values.append((step / size).sqrt())
        return keys, torch.stack(values)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """‖·‖ of every tensor, in one fused operation, accumulated and returned in float32 at least."""
    if not tensors:
        return []
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))
