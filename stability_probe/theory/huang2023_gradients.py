r"""Theorem 3.3 of Huang et al. (2023): the magnitude of parameter gradients.

For sample $s$ and $W_p^{(q)}$ the $p$-th weight of block $q \in \{a_i, b_i\}$, with high
probability

$$\|\nabla_{W_p^{(q)}}\ell_s(W)\|^2 \lesssim
  O\Big(\ell_s(W)\,\|x_t\|^2\sum_{j=i}^{N}\kappa_j^2 + c_4\Big).$$

The statement is **per sample**; a batch mean obeys it through Jensen's inequality,
$\|\mathrm{mean}_s g_s\|^2 \le \mathrm{mean}_s\|g_s\|^2$.

**Derived**, for unit block gains: a weight gradient is an outer product $\delta\otimes v$. At
$a_i$ the back-propagated energy $\|\delta\|^2$ grows as $\ell(\sum_{j\ge i}\kappa_j^2 + 1)$
while $\|v\|^2 \propto \|x\|^2$; at $b_i$ the two change places. Both give
$\ell\|x\|^2(\sum_{j \ge i}\kappa_j^2 + 1)$, that is
$c_4 = c\,\ell\|x\|^2$. Near the output the loss depends on $b_i$ through the residual, so there
it is an upper bound alone.
"""

from collections.abc import Sequence

import numpy as np

from stability_probe.theory.huang2023_features import skip_energy_sum


def gradient_scale(
    kappa: Sequence[float],
    level: int,
    loss: float | np.ndarray,
    input_energy: float | np.ndarray,
) -> np.ndarray:
    r"""$\ell_s\|x_t\|^2\sum_{j \ge i}\kappa_j^2$, what Theorem 3.3 says a gradient scales with.

    Args:
        kappa: $\kappa_1, \dots, \kappa_N$.
        level: $i$ in $1..N$, the level of the blocks $a_i$ and $b_i$.
        loss: $\ell_s$, one number a sample.
        input_energy: $\|x_t\|^2$, one number a sample.

    Raises:
        ValueError: if `level` is outside $1..N$.

    >>> float(gradient_scale([1.0, 0.5], 2, loss=2.0, input_energy=10.0))
    5.0
    """
    if not 1 <= level <= len(kappa):
        raise ValueError(f"level must lie in 1..{len(kappa)} (the blocks a_i, b_i), got {level}")
    energy = np.asarray(loss, float) * np.asarray(input_energy, float)
    return np.asarray(energy * skip_energy_sum(kappa, level))


def gradient_bound(
    kappa: Sequence[float],
    level: int,
    loss: float | np.ndarray,
    input_energy: float | np.ndarray,
    *,
    c: float = 1.0,
    c4: float | np.ndarray = 0.0,
) -> np.ndarray:
    r"""$c\,\ell_s\|x_t\|^2\sum_{j \ge i}\kappa_j^2 + c_4$, the right side of Theorem 3.3.

    Args:
        kappa: $\kappa_1, \dots, \kappa_N$.
        level: $i$ in $1..N$.
        loss: $\ell_s$, one number a sample.
        input_energy: $\|x_t\|^2$, one number a sample.
        c: the constant inside $O(\cdot)$.
        c4: the additive constant; `c * loss * input_energy` gives the derived law of unit gains.

    >>> float(gradient_bound([1.0, 0.5], 1, loss=2.0, input_energy=10.0, c=3.0, c4=1.0))
    76.0
    """
    scale = gradient_scale(kappa, level, loss, input_energy)
    return np.asarray(c * scale + np.asarray(c4, float))
