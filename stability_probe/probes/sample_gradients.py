"""Theorem 3.3's left side: the gradient energies of single samples."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.records import Key
from stability_probe.skips import Block


def sample_gradients(
    model: nn.Module, blocks: Mapping[str, Block], batch: ProbeBatch, chunk: int
) -> dict[Key, Tensor]:
    """ℓ_s, and for every block a_i, b_i the largest ‖∇_W ℓ_s‖² over its weight matrices W.

    Args:
        model: the network, in the mode it is to run in.
        blocks: the block of every parameter by name.
        batch: the samples, with a target.
        chunk: samples whose gradients are held at once; 0 takes one after the other without
            `torch.vmap`.

    Returns:
        `sample_loss`, and `sample_grad_energy` at the sites a and b: vectors over samples.
    """
    names = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and blocks[name].kind in ("a", "b")
    ]
    if not names:
        return {}
    per_weight, losses = (
        _together(model, names, batch, chunk) if chunk else _in_turn(model, names, batch)
    )
    found = {Key("sample_loss", "loss", 0, ""): losses}
    for name, energy in per_weight.items():
        block = blocks[name]
        key = Key("sample_grad_energy", block.kind, block.level, "")
        found[key] = torch.maximum(found[key], energy) if key in found else energy
    return found


def _together(
    model: nn.Module, names: list[str], batch: ProbeBatch, chunk: int
) -> tuple[dict[str, Tensor], Tensor]:
    """‖∇_W ℓ_s‖² of every weight, and ℓ_s, a chunk of samples at a time."""
    frozen = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
        one = batch.with_tensors([tensor[None] for tensor in sample])
        all_of_them = {**frozen, **weights}
        return one.losses(lambda *a, **kw: functional_call(model, all_of_them, a, kw))[0]

    def energies(sample: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        weights = {name: frozen[name] for name in names}
        grads, value = grad_and_value(loss)(weights, sample)
        return {name: g.square().sum() for name, g in grads.items()}, value

    found: tuple[dict[str, Tensor], Tensor] = vmap(energies, chunk_size=chunk)(batch.tensors())
    return found


def _in_turn(
    model: nn.Module, names: list[str], batch: ProbeBatch
) -> tuple[dict[str, Tensor], Tensor]:
    """The same, one sample after the other."""
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in names]
    rows: list[Tensor] = []
    losses: list[Tensor] = []
    for s in range(len(batch.x)):
        alone = batch if batch.whole else batch.samples(slice(s, s + 1))
        with torch.enable_grad():
            loss = alone.losses(model)[s if batch.whole else 0]
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
        nothing = loss.new_zeros(())
        rows.append(torch.stack([nothing if g is None else g.square().sum() for g in grads]))
        losses.append(loss.detach())
    return dict(zip(names, torch.stack(rows, dim=1), strict=True)), torch.stack(losses)
