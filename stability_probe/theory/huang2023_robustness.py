r"""Theorem 3.4 of Huang et al. (2023): robustness to a perturbed input.

With $M_0 = \max_i\|b_i\circ a_i\|$, $f_N$ being $L_0$-Lipschitz and
$\epsilon_\delta = \|x_t^\delta - x_t\|$,

$$\|UNet(x_t^\delta) - UNet(x_t)\| \le
  \epsilon_\delta\Big[\sum_{i=1}^{N}\kappa_i M_0^i + c_0\Big].$$

The sum is of $\kappa_i$, not of $\kappa_i^2$. **Derived**: with
$M_0 := \max_i Lip(a_i)Lip(b_i)$ and $c_0 = M_0^N L_0$ it holds rigorously, because the path
through skip $i$ runs $a_1..a_i$, then $b_i..b_1$, and the last path runs through all blocks and
the middle. Keeping each block's own constant is never looser:

$$\sum_i\kappa_i\prod_{k\le i}Lip(a_k)Lip(b_k) + L_0\prod_{k \le N}Lip(a_k)Lip(b_k).$$

Tighter than any product of blocks is the norm of the whole path (derived). The Jacobian is linear
in the paths from input to output, $J = \sum_i \kappa_i P_i + P_{mid}$, with $P_i$ the Jacobian of
$x \to a_1..a_i \to$ skip $i \to b_i..b_1$, so that

$$\sigma_{\max}(J) \le \sum_i \kappa_i\|P_i\| + \|P_{mid}\|,$$

and $\kappa_i\|P_i\|$ says which skip carries the sensitivity.

With the constants taken as the norms of the blocks' Jacobians *at a point*, both bound
$\sigma_{\max}(J)$ at that point, and so the limit of $\|\Delta out\| / \epsilon_\delta$ as
$\epsilon_\delta \to 0$.
"""

from collections.abc import Sequence

import numpy as np


def robustness_bound(
    kappa: Sequence[float] | np.ndarray,
    m0: float | np.ndarray,
    l0: float | np.ndarray,
    c0: float | np.ndarray | None = None,
) -> np.ndarray:
    r"""$\sum_i\kappa_i M_0^i + c_0$, the paper's form of Theorem 3.4.

    Args:
        kappa: $\kappa_1, \dots, \kappa_N$ along the first axis; further axes are points.
        m0: $M_0$, dimensionless; a number or an array over points.
        l0: $L_0$, the Lipschitz constant of the middle block.
        c0: the additive constant; `None` takes the derived $M_0^N L_0$.

    >>> float(robustness_bound([1.0, 0.5], m0=2.0, l0=3.0))  # 2 + .5 * 4 + 4 * 3
    16.0
    """
    m0 = np.asarray(m0, float)
    n = len(kappa)
    offset = m0**n * np.asarray(l0, float) if c0 is None else np.asarray(c0, float)
    skips = sum((k * m0**i for i, k in enumerate(kappa, start=1)), np.zeros_like(m0))
    return np.asarray(skips + offset)


def blockwise_bound(
    kappa: Sequence[float] | np.ndarray,
    lip_a: np.ndarray,
    lip_b: np.ndarray,
    l0: float | np.ndarray,
) -> np.ndarray:
    r"""Theorem 3.4 with each block's own constant; never above `robustness_bound` (derived).

    Args:
        kappa: $\kappa_1, \dots, \kappa_N$ along the first axis; further axes are points.
        lip_a: $Lip(a_1), \dots, Lip(a_N)$ along the first axis; further axes are points.
        lip_b: $Lip(b_1), \dots, Lip(b_N)$, of the same shape.
        l0: $L_0$, a number or an array over points.

    Raises:
        ValueError: if the number of blocks differs from the number of skips.

    >>> float(blockwise_bound([1.0, 0.5], np.array([2.0, 1.0]), np.array([1.0, 1.0]), 3.0))
    9.0
    """
    lip_a, lip_b = np.asarray(lip_a, float), np.asarray(lip_b, float)
    if not len(lip_a) == len(lip_b) == len(kappa):
        raise ValueError(
            f"one Lipschitz constant a block is needed for {len(kappa)} skips, "
            f"got {len(lip_a)} for a and {len(lip_b)} for b"
        )
    paths = np.cumprod(lip_a * lip_b, axis=0)
    weights = np.asarray(kappa, float)
    weights = weights.reshape(weights.shape + (1,) * (paths.ndim - weights.ndim))
    return np.asarray((weights * paths).sum(axis=0) + paths[-1] * np.asarray(l0, float))


def pathwise_bound(
    path_norms: Sequence[float] | np.ndarray, middle_norm: float | np.ndarray
) -> np.ndarray:
    r"""$\sum_i\kappa_i\|P_i\| + \|P_{mid}\|$, the tightest bound by norms of paths (derived).

    Args:
        path_norms: $\kappa_1\|P_1\|, \dots, \kappa_N\|P_N\|$ along the first axis; further axes are
            points.
        middle_norm: $\|P_{mid}\|$, a number or an array over points.

    >>> float(pathwise_bound([1.0, 0.5], 0.25))
    1.75
    """
    return np.asarray(np.asarray(path_norms, float).sum(axis=0) + np.asarray(middle_norm, float))


def max_block_gain(lip_a: np.ndarray, lip_b: np.ndarray) -> np.ndarray:
    r"""$M_0 = \max_i Lip(a_i)Lip(b_i)$, the maximum over the first axis (derived form).

    >>> float(max_block_gain(np.array([2.0, 1.0]), np.array([1.0, 3.0])))
    3.0
    """
    return np.asarray((np.asarray(lip_a, float) * np.asarray(lip_b, float)).max(axis=0))
