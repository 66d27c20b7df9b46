"""From one number a sample to a few numbers a step, on the device, in a handful of operations."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stability_probe.probes.records import Key

Samples = Mapping[Key, Tensor]
"""For every quantity (a key without a stat) a vector over samples."""

Numbers = tuple[list[Key], Tensor]
"""Keys and a vector of as many numbers."""


def summarise(samples: Samples, noise_level: Tensor | None, edges: Tensor) -> Numbers:
    """Mean, least and largest over samples of every quantity, and its means by noise level.

    Args:
        samples: the quantities; those with as many samples as `noise_level` are binned.
        noise_level: t of every sample, or `None`.
        edges: the inner edges of the noise-level bins, rising; T - 1 of them make T bins.

    >>> loss = {Key("loss", "loss", 0, ""): torch.tensor([1.0, 3.0])}
    >>> keys, values = summarise(loss, torch.tensor([10, 900]), torch.tensor([500.0]))
    >>> {key.stat: float(v) for key, v in zip(keys, values) if key.metric == "loss"}
    {'mean': 2.0, 'min': 1.0, 'max': 3.0, 't0': 1.0, 't1': 3.0}
    """
    keys: list[Key] = []
    values: list[Tensor] = []
    for group, table in _tables(samples):
        stats = {"mean": table.mean(1), "min": table.amin(1), "max": table.amax(1)}
        if noise_level is not None and len(noise_level) == table.shape[1]:
            stats |= _bin_means(table, noise_level, edges)
        for stat, column in stats.items():
            keys += [key._replace(stat=stat) for key in group]
            values.append(column)
    if noise_level is not None:
        counts = _membership(noise_level, edges).sum(0)
        keys += [Key("samples", "loss", 0, f"t{b}") for b in range(len(counts))]
        values.append(counts.to(values[0].dtype))
    return keys, torch.cat(values) if values else torch.empty(0)


def per_sample(samples: Samples) -> Numbers:
    """Every sample's number on its own, as stats s0, s1, ...."""
    keys = [key._replace(stat=f"s{i}") for key, v in samples.items() for i in range(len(v))]
    dtype = _common_dtype(samples)
    return keys, torch.cat([v.to(dtype) for v in samples.values()])


def _tables(samples: Samples) -> list[tuple[list[Key], Tensor]]:
    """Quantities with the same number of samples, stacked."""
    groups: dict[int, list[Key]] = {}
    for key, v in samples.items():
        groups.setdefault(len(v), []).append(key)
    dtype = _common_dtype(samples)
    return [(keys, torch.stack([samples[k].to(dtype) for k in keys])) for keys in groups.values()]


def _common_dtype(samples: Samples) -> torch.dtype:
    double = any(v.dtype == torch.float64 for v in samples.values())
    return torch.float64 if double else torch.float32


def _membership(noise_level: Tensor, edges: Tensor) -> Tensor:
    """Which sample is in which bin: (samples, bins), boolean."""
    bins = torch.bucketize(noise_level.float(), edges, right=True)
    return bins[:, None] == torch.arange(len(edges) + 1, device=bins.device)


def _bin_means(table: Tensor, noise_level: Tensor, edges: Tensor) -> dict[str, Tensor]:
    """Means of (quantities, samples) over the samples of each bin; NaN stays in its own bin."""
    member = _membership(noise_level, edges)
    sums = torch.where(member, table[:, :, None], 0.0).sum(1)
    means = sums / member.sum(0)
    return {f"t{b}": column for b, column in enumerate(means.unbind(1))}
