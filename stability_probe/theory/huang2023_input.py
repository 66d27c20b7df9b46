r"""Lemma 3.2 of Huang et al. (2023): the energy of the noised input.

$x_t = \alpha_t x_0 + \sigma_t\epsilon$ with $\alpha_t^2 + \sigma_t^2 = 1$ and
$\epsilon \sim \mathcal{N}(0, I_m)$ independent of $x_0$, so

$$\mathbb{E}\|x_t\|^2 = \sum_{pixels}\alpha_t^2 s_0^2 + \sigma_t^2
  = \big(1 - (1 - s_0^2)\,\mathbb{E}_t[\alpha_t^2]\big)\,m,$$

where $s_0^2 = \mathbb{E}[x_0^2]$ is the data's second moment per coordinate (derived). The paper's
case $x_0 \sim U[-1, 1]^m$ has $s_0^2 = 1/3$:
$\mathbb{E}\|x_t\|^2 = (1 - 2\,\mathbb{E}_t[\alpha_t^2]/3)\,m$.
"""

UNIFORM_SECOND_MOMENT = 1 / 3
r"""$\mathbb{E}[x_0^2]$ of $U[-1, 1]$, the paper's assumption on the data."""


def input_energy(
    m: int, mean_alpha_squared: float, second_moment: float = UNIFORM_SECOND_MOMENT
) -> float:
    r"""$\mathbb{E}\|x_t\|^2$ (Lemma 3.2).

    Args:
        m: number of coordinates of $x_t$.
        mean_alpha_squared: $\mathbb{E}_t[\alpha_t^2]$ over the noise levels drawn, in $[0, 1]$.
        second_moment: $s_0^2$, the data's mean square per coordinate.

    Raises:
        ValueError: if $\mathbb{E}_t[\alpha_t^2] \notin [0, 1]$ or $s_0^2 < 0$.

    >>> input_energy(64, mean_alpha_squared=0.75)
    32.0
    >>> input_energy(64, mean_alpha_squared=0.75, second_moment=1.0)  # unit-variance data
    64.0
    """
    if not 0 <= mean_alpha_squared <= 1:
        raise ValueError(f"mean_alpha_squared must lie in [0, 1], got {mean_alpha_squared}")
    if second_moment < 0:
        raise ValueError(f"second_moment is a mean square, so at least 0; got {second_moment}")
    return (1 - (1 - second_moment) * mean_alpha_squared) * m
