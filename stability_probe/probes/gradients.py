"""Energies of parameters, of their gradients, and of their updates."""

from collections.abc import Mapping, Sequence
from operator import is_not
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.records import Column, Join, Key, Layout, Numbered, Part
from stability_probe.skips import Block

SKIPPED = Key("skipped", "optimizer", 0, "value")
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
        blocks, updates = self._blocks, self._updates
        there = {n: p for n, p in zip(blocks, self._there, strict=True) if p is not None}
        named = {name: p for name, p in there.items() if p.requires_grad}
        self._frozen = [p for p in there.values() if not p.requires_grad]
        known = {id(p): v for p, v in zip(self._parameters, self._before, strict=updates)}
        self._parameters = list(named.values())
        local = [_local(p).detach() for p in self._parameters]
        self._zero = torch.zeros(()) if not local else local[0].new_zeros((), dtype=_widest(local))
        pairs_now = zip(self._parameters, local, strict=True)
        self._before = [known.get(id(p), v.clone()) for p, v in pairs_now] if updates else []
        joins: list[Join] = ["sum" if _is_sharded(p) else "same" for p in self._parameters]
        self._sharded = "sum" in joins
        self._kept = {
            (scaled, sized): _Norms(
                list(named),
                [blocks[name] for name in named],
                joins,
                [_share(name, p) for name, p in named.items()],
                scaled=scaled,
                sized=sized,
                moved=sized and updates,
            )
            for scaled in (True, False)
            for sized in (True, False)
        }

    @property
    def have_gradients(self) -> bool:
        """Whether any parameter has one, or none trains."""
        return not self._parameters or any(p.grad is not None for p in self._parameters)

    @torch.no_grad()
    def read(
        self, grad_scale: float | Tensor | None, sizes: bool = True
    ) -> tuple[Numbered, Tensor]:
        """The norms now; energies are made of them when they have left the device.

        Args:
            grad_scale: what a GradScaler has multiplied the gradients by, as they are now: 1 if
                they have been unscaled since. `None` if there is no GradScaler.
            sizes: read the parameters too; where updates are measured they are read in any case.

        Returns:
            What the numbers are, and the numbers, on the device.
        """
        now = [parameters.get(name) for parameters, name in self._places]
        if (
            any(map(is_not, now, self._there))
            or not all(p.requires_grad for p in self._parameters)
            or any(p.requires_grad for p in self._frozen)
        ):
            self._list()  # one was put in the place of another, frozen or unfrozen
        if not self._parameters:
            return _NOTHING, torch.empty(0)
        sizes = sizes or self._updates
        params = [_local(p).detach() for p in self._parameters] if sizes else []
        grads = [p.grad for p in self._parameters]
        there = [g for g in grads if g is not None]
        if self._sharded or any(g.is_sparse for g in there):
            there = [_dense(_local(g)) for g in there]
        moves = torch._foreach_sub(params, self._before) if self._updates else ()
        norms = self._norms([*there, *params, *moves])
        if self._updates:
            torch._foreach_copy_(self._before, params)
        if len(there) < len(grads):
            found = iter(norms)
            norms = [*(self._zero if g is None else next(found) for g in grads), *found]
        if grad_scale is not None:
            scale = torch.as_tensor(grad_scale, dtype=self._zero.dtype)
            norms.append(scale.reshape(()).to(self._zero.device, non_blocking=True))
        return self._kept[grad_scale is not None, sizes], torch.stack(norms)

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


class _Norms:
    """What the norms of one reading are, and the energies that are recorded of them.

    They are of the gradients and, if `sized`, of the parameters, if `moved` of their moves; at the
    end, if `scaled`, comes what the gradients were multiplied by.
    """

    order = 1

    def __init__(
        self,
        names: Sequence[str],
        blocks: Sequence[Block],
        joins: Sequence[Join],
        shares: Sequence[float],
        *,
        scaled: bool,
        sized: bool,
        moved: bool,
    ) -> None:
        self._scaled, self._sized, self._moved = scaled, sized, moved
        self._shares = np.asarray(shares)
        kinds = list(dict.fromkeys(blocks)) if moved else []
        self._of_kind = [[i for i, b in enumerate(blocks) if b == kind] for kind in kinds]
        metrics = ("grad_energy", "param_energy")[: 1 + sized]
        columns = [
            Column(Key(metric, f"{block.kind}/{name}", block.level, "value"), join)
            for metric in metrics
            for name, block, join in zip(names, blocks, joins, strict=True)
        ]
        columns.append(Column(SKIPPED if scaled else None, "max"))
        first = len(columns) + len(kinds)
        join: Join = "sum" if "sum" in joins else "same"
        columns += [
            Column(Key("update_ratio", b.kind, b.level, "value"), join, first + i, "root")
            for i, b in enumerate(kinds)
        ]
        columns += [Column(None, join)] * len(kinds)
        self._layout = Layout(columns)

    def __len__(self) -> int:
        return len(self._shares) * (1 + self._sized + self._moved) + self._scaled

    def part(self, steps: list[int], values: npt.NDArray[np.float64]) -> Part:
        """The numbers that are recorded of steps.

        Args:
            steps: the steps, k of them.
            values: norms (k, columns).
        """
        scale = values[:, -1:] if self._scaled else 1.0
        end = -1 if self._scaled else None
        tables = np.split(values[:, :end], 1 + self._sized + self._moved, axis=1)
        skipped = ~np.isfinite(tables[0]).all(axis=1, keepdims=True)
        tables[0] = tables[0] / scale
        energies = [table**2 * self._shares for table in tables]
        numbers = [*energies[: 1 + self._sized], skipped.astype(float)]
        if self._moved:
            sizes, moves = energies[1:]
            numbers += [
                np.stack([table[:, of].sum(axis=1) for of in self._of_kind], axis=1)
                for table in (moves, sizes)
            ]
        return Part(self._layout, steps, np.concatenate(numbers, axis=1))


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
