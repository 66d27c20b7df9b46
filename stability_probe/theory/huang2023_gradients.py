r"""Theorem 3.3 of Huang et al. (2023): the magnitude of parameter gradients.

For sample $s$ and $W_p^{(q)}$ the $p$-th weight of block $q \in \{a_i, b_i\}$, with high
probability

$$\|\nabla_{W_p^{(q)}}\ell_s(W)\|^2 \lesssim
  O\Big(\ell_s(W)\,\|x_t\|^2\sum_{j=i}^{N}\kappa_j^2 + c_4\Big).$$

The statement is **per sample**; a batch mean obeys it through Jensen's inequality,
$\|\mathrm{mean}_s g_s\|^2 \le \mathrm{mean}_s\|g_s\|^2$.

**Explicit law** (derived, for blocks $W_2\,relu(W_1 v)$ with $W_1 \sim \mathcal{N}(0, 2/m)$ and
$W_2 \sim \mathcal{N}(0, g/m)$, of mean-square gain $g$, and $\ell_s = \|z_0 - y\|^2/m$ with $y$
independent of the weights). Write the gradient at a feature $f$ as $\delta = s f + r$: a part along
the feature, and noise of energy $R$ that is uncorrelated with it. At the output
$\delta = \tfrac2m(z_0 - y)$, so $s = 2/m$ and $R = 4\|y\|^2/m^2$. Gaussian moments take both
through a block $v \mapsto f$:

* $W_2^\top(s f) = s W_2^\top W_2 h$ has mean $s g h$ and as much energy again in its noise, and
  $W_2^\top r$ has energy $g R$: before the ReLU of $h = relu(W_1 v)$ there is $s g h$ and, half of
  it masked, noise of energy $\tfrac g2(s^2\|f\|^2 + R)$;
* $W_1^\top h$ has mean $v$ and noise of energy $2\|h\|^2 = 2\|v\|^2$: at $v$ there is $s g v$ and
  noise of energy $g(3 s^2\|f\|^2 + R)$.

At an additive merge $v = z + \kappa u$ the part $s\kappa u$ is noise to $z$, and $\kappa s z$ to
$u$; parts of a concatenation are noise to none. $u_i$ sums what comes through its skip, times
$\kappa_i$, and through $a_{i+1}$. Weight gradients are outer products of what arrives and what was
read, so with $\mathbb{E}\|f\|^2$ from Theorem 3.1's law

$$\|\nabla_{W_2}\ell\|^2 = (s^2\|f\|^2 + R)\|v\|^2, \qquad
  \|\nabla_{W_1}\ell\|^2 = \tfrac g2(3 s^2\|f\|^2 + R)\|v\|^2,$$

to leading order in $N/m$. Where the target is far larger than the output, $s$ drops out,
$\|y\|^2 = m\ell$, and with unit gains

$$\|\nabla_{W_2}\ell\|^2 = \tfrac{4\ell}m\|x\|^2\Big(\sum_{j \ge i}\kappa_j^2 + 1\Big)$$

at both $a_i$ and $b_i$: Theorem 3.3 with $c = 4/m$ and $c_4 = c\,\ell\|x\|^2$. This also follows
from taking the backward pass to be independent of the forward pass. Where the output counts it is
not: every block passed adds three times its own energy, so that $c$ grows with the number of
blocks between the output and the weight.
"""

from collections.abc import Sequence

import numpy as np

from stability_probe.theory.huang2023_features import feature_energy_law, skip_energy_sum


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
        c4: the additive constant; `c * loss * input_energy` gives the derived law of unit gains in
            the limit of large targets.

    >>> float(gradient_bound([1.0, 0.5], 1, loss=2.0, input_energy=10.0, c=3.0, c4=1.0))
    76.0
    """
    scale = gradient_scale(kappa, level, loss, input_energy)
    return np.asarray(c * scale + np.asarray(c4, float))


def gradient_energy_law(
    kappa: Sequence[float],
    m: int,
    input_energy: float,
    target_energy: float,
    *,
    alpha: Sequence[float] | float = 1.0,
    beta: Sequence[float] | float = 1.0,
    gamma: float = 1.0,
    merge: str = "add",
) -> np.ndarray:
    r"""The explicit law: $\mathbb{E}\|\nabla_W\ell_s\|^2$ on random networks of Eq. 4 (derived).

    Args:
        kappa: $\kappa_1, \dots, \kappa_N$.
        m: width, and number of outputs the loss is a mean over.
        input_energy: $\|x_t\|^2$.
        target_energy: $\|y\|^2$.
        alpha: mean-square gains of $a_1..a_N$, or one for all.
        beta: mean-square gains of $b_1..b_N$, or one for all.
        gamma: mean-square gain of the middle block.
        merge: how decoder blocks join $z_i$ and $\kappa_i u_i$: `add` or `concat`.

    Returns:
        (2, N, 2): kind of block ($a$, $b$), level, and weight ($W_1$, $W_2$).

    Raises:
        ValueError: if the merge is unknown.

    >>> law = gradient_energy_law([1.0], m=2, input_energy=1.0, target_energy=2.0)
    >>> law[1, 0]  # b_1 reads 2 and gives 2; s = 1, R = 2: (3·2 + 2)/2 · 2, (2 + 2) · 2
    array([8., 8.])
    >>> large = gradient_energy_law([1.0, 0.5], m=2, input_energy=1.0, target_energy=1e9)
    >>> (large[:, :, 1] / 1e9).round(3)  # 4/m² (Σκ² + 1) for each of a, b
    array([[2.25, 1.25],
           [2.25, 1.25]])
    """
    if merge not in ("add", "concat"):
        raise ValueError(f'merge must be "add" or "concat", got {merge!r}')
    n, added = len(kappa), merge == "add"
    alphas = np.broadcast_to(np.asarray(alpha, float), (n,))
    betas = np.broadcast_to(np.asarray(beta, float), (n,))
    u = input_energy * np.cumprod([1.0, *alphas])
    z = input_energy * feature_energy_law(kappa, alpha, beta, gamma)
    law = np.empty((2, n, 2))
    at_u = []  # what comes to u_1..u_N through their skips
    s, r = 2 / m, 4 * target_energy / m**2
    for i in range(1, n + 1):  # down the decoder, from z_{i-1} to z_i
        g, k2 = betas[i - 1], kappa[i - 1] ** 2
        law[1, i - 1] = _weights(g, s, r, z[i - 1], k2 * u[i] + z[i])
        s, r = _through_block(g, s, r, z[i - 1])
        at_u.append((k2 * s, k2 * (r + added * s**2 * z[i])))
        r += added * s**2 * k2 * u[i]
    s, r = _through_block(gamma, s, r, z[n])
    for i in range(n, 0, -1):  # and down the encoder, from u_i to u_{i-1}
        s, r = s + at_u[i - 1][0], r + at_u[i - 1][1]
        law[0, i - 1] = _weights(alphas[i - 1], s, r, u[i], u[i - 1])
        s, r = _through_block(alphas[i - 1], s, r, u[i])
    return law


def _weights(g: float, s: float, r: float, out: float, read: float) -> tuple[float, float]:
    """The gradient energies of W_1 and W_2 of a block of gain g."""
    return g / 2 * (3 * s**2 * out + r) * read, (s**2 * out + r) * read


def _through_block(g: float, s: float, r: float, out: float) -> tuple[float, float]:
    """From the gradient s f + r at a block's output to that at its input."""
    return g * s, g * (3 * s**2 * out + r)
