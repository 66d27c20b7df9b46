"""Energies of parameters, of their gradients, and of their updates."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.records import Column, Key, Layout
from stability_probe.probes.summaries import Numbers
from stability_probe.skips import Block

SKIPPED = Key("skipped", "optimizer", 0, "value")
SIZES_EVERY = 10
"""Steps in which ‖θ‖² is read once: it moves slowly, and reading it costs as much as ‖∇‖²."""
_NOTHING = Layout([])


class ParameterProbe:
    """Reads the parameters of a model once a step, in a few fused operations.

    A parameter without a gradient counts as having gradient 0: the loss does not depend on it.
    Frozen parameters (`requires_grad` is false) are left out. Of a parameter that is sharded over
    processes each reads its own part, and the energies add up.

    Args:
        model: the model.
        blocks: the block of every parameter by name.
        updates: also measure ‖Δθ‖/‖θ‖ per kind of block, at the cost of a copy of the parameters.

    Raises:
        StabilityProbeError: if a parameter is spread over processes in another way.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Block], updates: bool) -> None:
        self._blocks, self._updates = blocks, updates
        self._parameters: list[Tensor] = []
        self._before: list[Tensor] = []
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in blocks}
        self._places = [(m._parameters, n.rpartition(".")[2]) for n, m in modules.items()]
        self._list()

    def _list(self) -> None:
        """Look which parameters there are, and which of them train."""
        self._there = [parameters.get(name) for parameters, name in self._places]
        self._trained = [p is not None and p.requires_grad for p in self._there]
        blocks, updates = self._blocks, self._updates
        pairs = zip(blocks, self._there, self._trained, strict=True)
        named = {name: p for name, p, trained in pairs if p is not None and trained}
        known = {id(p): v for p, v in zip(self._parameters, self._before, strict=updates)}
        self._parameters = list(named.values())
        local = [_local(p).detach() for p in self._parameters]
        self._zero = torch.zeros(()) if not local else local[0].new_zeros((), dtype=_widest(local))
        self._shares = self._zero.new_tensor([_share(name, p) for name, p in named.items()])
        self._kinds = list(dict.fromkeys(blocks[name] for name in named))
        kinds = [self._kinds.index(blocks[name]) for name in named]
        self._kind_of = torch.tensor(kinds, device=self._zero.device)
        pairs_now = zip(self._parameters, local, strict=True)
        self._before = [known.get(id(p), v.clone()) for p, v in pairs_now] if updates else []
        joins: list[Literal["sum", "same"]]
        joins = ["sum" if _is_sharded(p) else "same" for p in self._parameters]
        slopes, sizes = (
            [
                Column(Key(metric, f"{blocks[n].kind}/{n}", blocks[n].level, "value"), join)
                for n, join in zip(named, joins, strict=True)
            ]
            for metric in ("grad_energy", "param_energy")
        )
        first = len(slopes) + len(sizes) + 1
        moves = self._update_columns(first, "sum" if "sum" in joins else "same") if updates else []
        self._layouts = {
            (scaled, sized): Layout(
                [*slopes, *(sizes if sized else []), Column(SKIPPED if scaled else None, "max")]
                + (moves if sized else [])
            )
            for scaled in (True, False)
            for sized in (True, False)
        }

    @property
    def have_gradients(self) -> bool:
        """Whether any parameter has one, or none trains."""
        return not self._parameters or any(p.grad is not None for p in self._parameters)

    @torch.no_grad()
    def read(self, grad_scale: float | Tensor | None, sizes: bool = True) -> Numbers:
        """The energies now.

        Args:
            grad_scale: what a GradScaler has multiplied the gradients by, as they are now: 1 if
                they have been unscaled since. `None` if there is no GradScaler.
            sizes: read the energies of the parameters too; where updates are measured they are
                read in any case.

        Returns:
            What the numbers are, and the numbers, on the device.
        """
        for (parameters, name), p, trained in zip(
            self._places, self._there, self._trained, strict=True
        ):
            now = parameters.get(name)
            if now is not p or (p is not None and p.requires_grad is not trained):
                self._list()  # one was put in the place of another, frozen or unfrozen
                break
        if not self._parameters:
            return _NOTHING, torch.empty(0)
        sizes = sizes or self._updates
        params = [_local(p).detach() for p in self._parameters] if sizes else []
        grads = [None if p.grad is None else _dense(_local(p.grad)) for p in self._parameters]
        found = iter(self._norms([*(g for g in grads if g is not None), *params]))
        slopes = [self._zero if g is None else next(found) for g in grads]
        table = torch.stack([*slopes, *found]).view(-1, len(slopes))
        skipped = (~table[0].isfinite()).any().to(table.dtype)
        if grad_scale is not None:
            table[0] /= grad_scale
        energies = table.square() * self._shares
        numbers = [energies.view(-1), skipped.view(1)]
        if self._before:
            moves = torch.stack(self._norms(list(torch._foreach_sub(params, self._before))))
            torch._foreach_copy_(self._before, params)
            numbers += [self._by_kind(moves.square() * self._shares), self._by_kind(energies[1])]
        return self._layouts[grad_scale is not None, sizes], torch.cat(numbers)

    def state_dict(self) -> list[Tensor]:
        """The parameters as they were at the last reading, where updates are measured."""
        return [p.cpu() for p in self._before]

    def load_state_dict(self, state: Sequence[Tensor]) -> None:
        """Measure the next updates from there."""
        for p, value in zip(self._before, state, strict=True):
            p.copy_(value)

    def _norms(self, tensors: list[Tensor]) -> list[Tensor]:
        """‖·‖ of every tensor, in one fused operation, in float32 at least."""
        if not tensors:
            return []
        return list(torch._foreach_norm(tensors, 2, dtype=self._zero.dtype))

    def _by_kind(self, energies: Tensor) -> Tensor:
        """Sums over the parameters of each kind of block."""
        return energies.new_zeros(len(self._kinds)).index_add_(0, self._kind_of, energies)

    def _update_columns(self, first: int, join: Literal["sum", "same"]) -> list[Column]:
        """Squared moves of each kind of block, then the squared sizes that they are relative to."""
        n = len(self._kinds)
        moves = [
            Column(Key("update_ratio", b.kind, b.level, "value"), join, first + n + i, "root")
            for i, b in enumerate(self._kinds)
        ]
        return [*moves, *[Column(None, join)] * n]


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The type that norms of these tensors are taken in."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _dense(gradient: Tensor) -> Tensor:
    """The entries of a gradient; a sparse one (of an embedding) has zeros elsewhere."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it (a DTensor, as `fully_shard` makes them)."""
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    """This process's part of a tensor."""
    local: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor
    return local


def _share(name: str, parameter: Any) -> float:
    """What this process's part counts where those of all are added up: less if others hold it too.

    Raises:
        StabilityProbeError: if the parts do not add up.
    """
    share = 1.0
    if _is_sharded(parameter):
        for dim, placement in enumerate(parameter.placements):
            if placement.is_replicate():
                share /= parameter.device_mesh.size(dim)
            elif not placement.is_shard():
                raise StabilityProbeError(
                    f"StabilityProbe: parameter {name} is placed as {placement} over the "
                    "processes; parameters that are sharded or replicated can be recorded"
                )
    return share
