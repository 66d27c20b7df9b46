r"""Theorem 3.1 of Huang et al. (2023): the oscillation of hidden features.

Notation (Eq. 4). $u_0 = x_t$, $u_j = a_j(u_{j-1})$ are the encoder features, $z_N = f_N(u_N)$ the
middle block and $z_{j-1} = b_j(\kappa_j u_j + z_j)$ the decoder features; $h_i := z_i$. Skip 1 is
the outermost, skip $N$ the innermost.

**Theorem 3.1.** With Kaiming initialisation and probability at least
$1 - O(N)\exp(-\Omega(m\rho^2))$, for $\rho \in (0, 1]$,

$$(1-\rho)^2\Big[c_1\|x_t\|^2\sum_{j \ge i}\kappa_j^2 + c_2\Big] \lesssim \|h_i\|^2 \lesssim
  (1+\rho)^2\Big[c_1\|x_t\|^2\sum_{j \ge i}\kappa_j^2 + c_3\Big].$$

**Index.** By Eq. 4, $h_i = z_i$ contains $\kappa_{i+1}, \dots, \kappa_N$ alone, so the tight sum
starts at $j = i+1$; the paper's starts at $j = i$ and is the looser of the two. Both are here, as
`index="tight"` and `index="paper"`; at $i = 0$ they coincide.

**Explicit law** (derived). Let $\alpha_k, \beta_k, \gamma$ be the mean-square gains
$\mathbb{E}\|block(v)\|^2 / \|v\|^2$ of $a_k$, $b_k$ and $f_N$. If the blocks are positively
homogeneous and independent, and each ends in a zero-mean Gaussian linear map, the cross term
$2\kappa\langle z, u\rangle$ of every merge has mean zero, and unrolling the recursion
$\mathbb{E}\|z_{j-1}\|^2 = \beta_j(\kappa_j^2\,\mathbb{E}\|u_j\|^2 + \mathbb{E}\|z_j\|^2)$ gives

$$\mathbb{E}\|h_i\|^2 = \|x_t\|^2\Big[\sum_{j=i+1}^{N}\kappa_j^2
  \prod_{k=i+1}^{j}\beta_k\prod_{k=1}^{j}\alpha_k
  + \gamma\prod_{k=i+1}^{N}\beta_k\prod_{k=1}^{N}\alpha_k\Big].$$
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Index = Literal["paper", "tight"]
"""Where the sum over skips starts: at j = i as the paper prints it, or at j = i + 1."""


def skip_energy_sum(kappa: Sequence[float], level: int, index: Index = "paper") -> float:
    r"""$\sum_j \kappa_j^2$ over the skips that feed $h_i$ (Theorem 3.1).

    Args:
        kappa: $\kappa_1, \dots, \kappa_N$, outermost first.
        level: $i$, from 0 (the last decoder block's output) to $N$ (the middle block's output).
        index: `"paper"` starts the sum at $j = i$, `"tight"` at $j = i + 1$.

    Raises:
        ValueError: if `level` is outside $0..N$ or `index` is unknown.

    >>> skip_energy_sum([1.0, 0.5, 0.5], level=1, index="paper")
    1.5
    >>> skip_energy_sum([1.0, 0.5, 0.5], level=1, index="tight")
    0.5
    """
    if not 0 <= level <= len(kappa):
        raise ValueError(f"level must lie in 0..{len(kappa)} (the number of skips), got {level}")
    if index not in ("paper", "tight"):
        raise ValueError(f'index must be "paper" or "tight", got {index!r}')
    first = max(level, 1) if index == "paper" else level + 1
    return float(sum(k**2 for k in kappa[first - 1 :]))


def feature_energy_law(
    kappa: Sequence[float],
    alpha: Sequence[float] | float = 1.0,
    beta: Sequence[float] | float = 1.0,
    gamma: float = 1.0,
) -> np.ndarray:
    r"""The explicit law: $\mathbb{E}\|h_i\|^2 / \|x_t\|^2$ for $i = 0, \dots, N$ (derived).

    Args:
        kappa: $\kappa_1, \dots, \kappa_N$.
        alpha: mean-square gains of $a_1..a_N$, or one for all.
        beta: mean-square gains of $b_1..b_N$, or one for all.
        gamma: mean-square gain of the middle block.

    Returns:
        The $N + 1$ expected energies per unit of input energy, $h_0$ first.

    >>> feature_energy_law([1.0, 1.0, 1.0])
    array([4., 3., 2., 1.])
    >>> feature_energy_law([0.5], alpha=2.0, beta=3.0, gamma=1.0)  # 3 * (.25 * 2 + 2), then 2
    array([7.5, 2. ])
    """
    n = len(kappa)
    alphas = np.broadcast_to(np.asarray(alpha, float), (n,))
    betas = np.broadcast_to(np.asarray(beta, float), (n,))
    encoder = np.cumprod(alphas)  # E‖u_j‖² / ‖x_t‖²
    energy = np.empty(n + 1)
    energy[n] = gamma * (encoder[-1] if n else 1.0)
    for j in range(n, 0, -1):
        energy[j - 1] = betas[j - 1] * (kappa[j - 1] ** 2 * encoder[j - 1] + energy[j])
    return energy


def feature_band(
    kappa: Sequence[float],
    level: int,
    input_energy: float | np.ndarray,
    *,
    rho: float,
    c1: float = 1.0,
    c2: float = 0.0,
    c3: float = 0.0,
    index: Index = "paper",
) -> tuple[np.ndarray, np.ndarray]:
    r"""The two sides of Theorem 3.1 for $\|h_i\|^2$.

    Args:
        kappa: $\kappa_1, \dots, \kappa_N$.
        level: $i$ in $0..N$.
        input_energy: $\|x_t\|^2$, a number or an array.
        rho: the relative half-width $\rho \in (0, 1]$.
        c1: the constant before $\|x_t\|^2 \sum \kappa_j^2$.
        c2: the additive constant of the lower side, in units of energy.
        c3: the additive constant of the upper side, in units of energy.
        index: see `skip_energy_sum`.

    Returns:
        `(lower, upper)`, each of the shape of `input_energy`.

    Raises:
        ValueError: if $\rho \notin (0, 1]$.

    >>> lower, upper = feature_band([1.0, 1.0], 0, 4.0, rho=0.5, c2=4.0, c3=4.0)
    >>> float(lower), float(upper)
    (3.0, 27.0)
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must lie in (0, 1], got {rho}")
    signal = c1 * np.asarray(input_energy, float) * skip_energy_sum(kappa, level, index)
    return np.asarray((1 - rho) ** 2 * (signal + c2)), np.asarray((1 + rho) ** 2 * (signal + c3))
