r"""Theorem 3.1's probability: how narrowly $\log\|h_i\|^2$ is distributed at initialisation.

The theorem's band fails with probability at most $O(N)\exp(-\Omega(m\rho^2))$.

**Why the slope falls with N** (derived). A block of unit gain multiplies the energy by a factor
whose logarithm has variance about $7/m$ (5 from $relu(W_1 v)$, 2 from $W_2$), and every feature is
made by chains of independent blocks, $N+1$ of them in the case of $h_N$. So $\log\|h_i\|^2$ has a
variance $V_i/m$ (`log_energy_variance`) with $V_N = 7(N+1)$, a deviation $2\rho$ of it has the
probability $erfc\sqrt{2m\rho^2/V_i}$, and for small $\rho$ $c = 2/\max_i V_i \le 2/(7(N+1))$.
"""

from collections.abc import Sequence

import numpy as np


def log_energy_variance(kappa: Sequence[float]) -> np.ndarray:
    r"""$V_i = \lim_m m\,\mathrm{Var}\log\|h_i\|^2$ for $i = 0..N$ (derived).

    For additive merges and unit gains, with $E_i = 1 + \sum_{j>i}\kappa_j^2$ and the shares
    $q_k = E_{k-1}/E_i$ of $h_i$ that pass level k,

    $$V_i = 7\Big[i + 2\sum_{k=i+1}^{N} q_k^2 + E_i^{-2}\Big]
            + \sum_{j=i+1}^{N} 4\kappa_j^2 E_j / E_i^2 :$$

    the encoder blocks that all of $h_i$ shares, the pairs $a_k, b_k$, the middle block, and the
    cross terms of the merges.

    >>> log_energy_variance([1.0])  # 7 (2 + 1/4) + 1, and 7 * 2
    array([16.75, 14.  ])
    """
    square = np.square(np.asarray(kappa, float))
    energy = np.append(1 + np.cumsum(square[::-1])[::-1], 1.0)  # E_0..E_N
    levels = range(len(energy))
    pairs = np.array([2 * np.sum((energy[i:-1] / energy[i]) ** 2) for i in levels])
    cross = np.array([np.sum(4 * square[i:] * energy[i + 1 :]) for i in levels])
    return np.asarray(7 * (np.arange(len(energy)) + pairs + energy**-2) + cross / energy**2)
