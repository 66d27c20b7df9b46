"""Theorem 3.3's left side: the gradient energies of single samples.

Layers give them without the gradients (`outer_products`), for many samples at once. The first and
the last sample's gradients are also taken as they are: a weight whose energy differs at either,
because it is used elsewhere too or because samples do not lie in order in its layer, is not left to
the layers (what shows at neither of the two is not seen). Such
weights, and those of no layer, are left to `torch.vmap`, and where the network cannot be put
through it, to one backward pass a sample, which needs the least memory too.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.outer_products import LayerEnergy, layer_calls, layer_energies
from stability_probe.probes.records import Key
from stability_probe.skips import Block

MEMORY = 2**27
"""Bytes that samples measured at once take unless another number is asked for."""

Energies = dict[str, Tensor]
"""‖∇_W ℓ_s‖² of every weight by name, a vector over samples."""


def sample_gradients(
    model: nn.Module, blocks: Mapping[str, Block], batch: ProbeBatch, memory: int
) -> dict[Key, Tensor]:
    """ℓ_s, and for every block a_i, b_i the largest ‖∇_W ℓ_s‖² over its weight matrices W.

    Args:
        model: the network, in a mode in which samples do not interact.
        blocks: the block of every parameter by name.
        batch: the samples, with a target.
        memory: bytes that the samples measured at once may take, beside the network; one sample
            is always measured, and all if the network takes batches of just this size.

    Returns:
        `sample_loss`, and `sample_grad_energy` at the sites a and b: vectors over samples.
    """
    weights = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and blocks[name].kind in ("a", "b")
    }
    if not weights:
        return {}
    per_weight, losses = weight_energies(model, weights, batch, memory)
    found = {Key("sample_loss", "loss", 0, ""): losses}
    for name, energy in per_weight.items():
        block = blocks[name]
        key = Key("sample_grad_energy", block.kind, block.level, "")
        found[key] = torch.maximum(found[key], energy) if key in found else energy
    return found


def weight_energies(
    model: nn.Module, weights: Mapping[str, Tensor], batch: ProbeBatch, memory: int
) -> tuple[Energies, Tensor]:
    """‖∇_W ℓ_s‖² of every weight, and ℓ_s."""
    first, need = _one_sample(model, weights, batch, 0)
    last, _ = _one_sample(model, weights, batch, len(batch.x) - 1)
    size = _at_once(batch, memory, need)
    found, losses = _by_layers(model, weights, batch, (first, last), size)
    rest = {name: w for name, w in weights.items() if name not in found}
    if rest:
        need += sum(w.nbytes for w in rest.values())
        found |= _by_vmap(model, rest, batch, _at_once(batch, memory, need))
    return {name: found[name] for name in weights}, losses


def _at_once(batch: ProbeBatch, memory: int, need: int) -> int:
    """How many samples to measure at once, if one needs so many bytes."""
    samples = len(batch.x)
    return samples if batch.whole else min(samples, max(1, memory // max(1, need)))


def _one_sample(
    model: nn.Module, weights: Mapping[str, Tensor], batch: ProbeBatch, s: int
) -> tuple[Energies, int]:
    """The energies of one sample from its gradients, and the bytes that a sample needs."""
    few = batch if batch.whole else batch.samples(slice(s, s + 1))
    with torch.enable_grad(), layer_calls(model, weights) as calls, _saved_bytes(model) as saved:
        loss = few.losses(model)[s if batch.whole else 0]
    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    held = sum(saved.values()) + sum(call.bytes_held for call in calls)
    need = held + max((call.bytes_worked for call in calls), default=0)
    return dict(zip(weights, map(_energy, grads), strict=True)), need


def _energy(grad: Tensor | None) -> Tensor:
    return torch.zeros(()) if grad is None else grad.square().sum()


@contextmanager
def _saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collects the bytes of every tensor kept for the backward pass, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _by_layers(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batch: ProbeBatch,
    ends: Sequence[Energies],
    size: int,
) -> tuple[Energies, Tensor]:
    """What the layers give for certain, and ℓ_s, so many samples at once.

    Args:
        model: the network.
        weights: the weights by name.
        batch: the samples.
        ends: the energies of the first and of the last sample.
        size: how many samples to measure at once.
    """
    parts: list[dict[str, LayerEnergy]] = []
    losses: list[Tensor] = []
    for start in range(0, len(batch.x), size):
        some = batch if size == len(batch.x) else batch.samples(slice(start, start + size))
        with torch.enable_grad(), layer_calls(model, weights) as calls:
            here = some.losses(model)
        parts.append(layer_energies(weights, calls, here))
        losses.append(here.detach())
    found = {
        name: torch.cat([part[name].energy for part in parts])
        for name in weights
        if _certain([part.get(name) for part in parts], [end[name] for end in ends])
    }
    return found, torch.cat(losses)


def _certain(parts: Sequence[LayerEnergy | None], ends: Sequence[Tensor]) -> bool:
    """Whether all samples passed the same layers, and the ends have the energies of gradients."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.shape for part in known}) > 1:
        return False
    found, right = torch.stack([known[0].energy[0], known[-1].energy[-1]]), torch.stack([*ends])
    rtol = torch.finfo(found.dtype).eps ** 0.5
    return bool(((found - right).abs() <= rtol * right).all())


def _by_vmap(
    model: nn.Module, weights: Mapping[str, Tensor], batch: ProbeBatch, size: int
) -> Energies:
    """The energies of any weights, so many samples at once, or in turn if vmap fails."""
    if batch.whole:
        return _in_turn(model, weights, batch)
    frozen = {name: p.detach() for name, p in model.named_parameters()}

    def loss(wanted: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
        one = batch.with_tensors([tensor[None] for tensor in sample])
        all_of_them = {**frozen, **wanted}
        return one.losses(lambda *a, **kw: functional_call(model, all_of_them, a, kw))[0]

    def energies(sample: list[Tensor]) -> Energies:
        grads = grad(loss)({name: frozen[name] for name in weights}, sample)
        return {name: g.square().sum() for name, g in grads.items()}

    try:
        with sdpa_kernel(SDPBackend.MATH):  # vmap knows no other
            found: Energies = vmap(energies, chunk_size=size)(batch.tensors())
    except Exception:  # whatever the network itself raises, it raises again below
        return _in_turn(model, weights, batch)
    return found


def _in_turn(model: nn.Module, weights: Mapping[str, Tensor], batch: ProbeBatch) -> Energies:
    """The energies of any weights of any network, one sample after the other."""
    rows = []
    for s in range(len(batch.x)):
        alone = batch if batch.whole else batch.samples(slice(s, s + 1))
        with torch.enable_grad():
            loss = alone.losses(model)[s if batch.whole else 0]
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        rows.append(torch.stack([_energy(g).to(loss.device) for g in grads]))
    return dict(zip(weights, torch.stack(rows, dim=1), strict=True))
