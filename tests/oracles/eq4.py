"""Eq. 4 of Huang et al. (2023) written out for a `TheoryUNet`'s weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def eq4_features(
    state: Mapping[str, Tensor], x: Tensor, kappa: Sequence[float], *, concat: bool
) -> list[Tensor]:
    """h_0 (the output), h_1, ..., h_N for inputs x of shape (batch, m)."""

    def block(path: str, v: Tensor) -> Tensor:
        hidden = (v @ state[f"{path}.layer1.weight"].T).clamp(min=0)
        return hidden @ state[f"{path}.layer2.weight"].T

    u = [x]  # u[j] is u_j, u[0] the input
    for j in range(1, len(kappa) + 1):
        u.append(block(f"encoder.{j - 1}", u[j - 1]))
    h = [block("middle", u[-1])]
    for j in range(len(kappa), 0, -1):
        skip = kappa[j - 1] * u[j]
        merged = torch.cat([h[0], skip], dim=1) if concat else h[0] + skip
        h.insert(0, block(f"decoder.{j - 1}.block", merged))
    return h
