"""From one number a sample to a few numbers a step, for many steps at once."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from stability_probe.probes.records import Column, Key, Layout

Samples = Mapping[Key, Tensor]
"""For every quantity (a key without a stat) its numbers (..., samples); ... may be steps."""

Numbers = tuple[Layout, Tensor]
"""What numbers are, and the numbers (..., columns)."""


def summarise(
    samples: Samples, noise_level: Tensor | None, edges: Tensor, single: Collection[Key] = ()
) -> Numbers:
    """Mean, least and largest over samples of every quantity, and its means by noise level.

    Means are kept as a sum and a number of samples, so that those of several processes add up.

    Args:
        samples: the quantities; those with as many samples as `noise_level` are binned.
        noise_level: t of every sample (..., samples), or `None`.
        edges: the inner edges of the noise-level bins, rising; T - 1 of them make T bins.
        single: quantities of no sample: single numbers (..., 1), which are not binned.

    >>> loss = {Key("loss", "loss", 0, ""): torch.tensor([1.0, 3.0])}
    >>> layout, values = summarise(loss, torch.tensor([10, 900]), torch.tensor([500.0]))
    >>> frame = layout.frame([1], values[None].double().numpy())
    >>> frame[frame.metric == "loss"].set_index("stat").value.to_dict()
    {'mean': 2.0, 'min': 1.0, 'max': 3.0, 't0': 1.0, 't1': 3.0}
    """
    groups: dict[int, list[Key]] = {}  # by number of samples; 0 for single numbers
    for key, values in samples.items():
        groups.setdefault(0 if key in single else values.shape[-1], []).append(key)
    if not groups:
        return _summary_layout((), None, 0), torch.empty(0)
    dtype = _common_dtype(samples)
    member = None if noise_level is None else _membership(noise_level, edges)
    binned, numbers = None, []
    for place, (size, keys) in enumerate(groups.items()):
        table = torch.stack([samples[key].to(dtype) for key in keys], dim=-2)
        count = table.new_full((*table.shape[:-2], 1), table.shape[-1])
        numbers += [table.sum(-1), *torch.aminmax(table, dim=-1), count]
        if member is not None and size == member.shape[-2]:
            binned = place
            numbers.append(_bin_sums(table, member))
    if member is not None:
        numbers.append(member.sum(-2).to(dtype))
    bins = 0 if member is None else member.shape[-1]
    layout = _summary_layout(tuple(map(tuple, groups.values())), binned, bins)
    return layout, torch.cat(numbers, dim=-1)


def per_sample(samples: Samples) -> Numbers:
    """Every sample's number on its own, as stats s0, s1, ...."""
    dtype = _common_dtype(samples)
    sizes = tuple((key, v.shape[0]) for key, v in samples.items())
    return _sample_layout(sizes), torch.cat([v.to(dtype) for v in samples.values()])


@lru_cache
def _sample_layout(sizes: Sequence[tuple[Key, int]]) -> Layout:
    keys = [key._replace(stat=f"s{i}") for key, n in sizes for i in range(n)]
    return Layout([Column(key) for key in keys])


@lru_cache
def _summary_layout(groups: Sequence[Sequence[Key]], binned: int | None, bins: int) -> Layout:
    """Columns of quantities in groups of as many samples each, one of them binned.

    Groups by groups: sums, least, largest, how many samples; in the binned group sums by bin. After
    all of them how many samples each bin has.
    """
    sizes = [3 * len(keys) + 1 + (bins * len(keys) if place == binned else 0)
             for place, keys in enumerate(groups)]  # fmt: skip
    counts = sum(sizes)  # where those of the bins begin
    columns: list[Column] = []
    for place, keys in enumerate(groups):
        size = len(columns) + 3 * len(keys)
        columns += [Column(k._replace(stat="mean"), "sum", size, "mean") for k in keys]
        columns += [Column(k._replace(stat="min"), "min") for k in keys]
        columns += [Column(k._replace(stat="max"), "max") for k in keys]
        columns.append(Column(None, "sum"))
        for b in range(bins if place == binned else 0):
            columns += [Column(k._replace(stat=f"t{b}"), "sum", counts + b, "mean") for k in keys]
    for b in range(bins):
        columns.append(Column(Key("samples", "loss", 0, f"t{b}"), "sum", how="count"))
    return Layout(columns)


def _common_dtype(samples: Samples) -> torch.dtype:
    double = any(v.dtype == torch.float64 for v in samples.values())
    return torch.float64 if double else torch.float32


def _membership(noise_level: Tensor, edges: Tensor) -> Tensor:
    """Which sample is in which bin: (..., samples, bins), boolean."""
    bins = torch.bucketize(noise_level.contiguous(), edges.to(noise_level.dtype), right=True)
    return bins[..., None] == torch.arange(len(edges) + 1, device=bins.device)


def _bin_sums(table: Tensor, member: Tensor) -> Tensor:
    """Sums of (..., quantities, samples) over the samples of each bin, bin by bin.

    NaN stays in its own bin.
    """
    mine = member.mT[..., :, None, :]
    return torch.where(mine, table[..., None, :, :], 0.0).sum(-1).flatten(-2)
