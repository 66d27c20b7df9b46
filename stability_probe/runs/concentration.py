r"""Feature energies of random networks of Eq. 4, drawn without drawing the networks.

For one input, independent Gaussian weights and no biases, three scalars a block are enough, and the
joint law of $(\|h_0\|^2, \dots, \|h_N\|^2)$ over networks is exact, not an approximation:

* $W_1 v \sim \mathcal{N}(0, \tfrac{2}{m}\|v\|^2 I_m)$ whatever $v$ is; a ReLU keeps each of its
  entries with probability ½, so $\|relu(W_1 v)\|^2 = \tfrac{2}{m}\|v\|^2\,\chi^2_K$ with
  $K \sim Binomial(m, ½)$;
* $W_2 r \sim \mathcal{N}(0, \tfrac{g}{m}\|r\|^2 I_m)$, so a block multiplies the energy by

$$G = g\,\frac{2}{m}\chi^2_K\,\frac{1}{m}\chi^2_m, \qquad \mathbb{E}\,G = g, \qquad
  \mathbb{E}\,G^2 = g^2 (1 + 5/m)(1 + 2/m),$$

  with $g = 1$ for `unit_gain` and $g = 2$ without, as in `models.TheoryUNet`;
* the output's direction is uniform and independent of all that came before. At the merge of level
  j the last block of $z_j$ is not among those of $u_j$, so the cosine of their angle is that of a
  uniform direction and a fixed one: $\cos^2 \sim Beta(½, (m-1)/2)$ with a random sign, and
  $\|z + \kappa u\|^2 = \|z\|^2 + \kappa^2\|u\|^2 + 2\kappa\|z\|\|u\|\cos$. A concatenation has no
  such term.

Each layer sees one vector, so nothing else of it matters. Two inputs to the same network would need
the weights themselves.
"""

from collections.abc import Sequence

import numpy as np

from stability_probe.errors import StabilityProbeError


def simulated_energies(
    m: int,
    kappa: Sequence[float],
    networks: int,
    generator: np.random.Generator,
    *,
    merge: str = "add",
    unit_gain: bool = True,
) -> np.ndarray:
    r"""$\|h_i\|^2 / \|x\|^2$ for one input to each of many random networks of Eq. 4.

    Args:
        m: feature width, at least 2.
        kappa: $\kappa_1, \dots, \kappa_N$, outermost first.
        networks: how many networks.
        generator: source of randomness.
        merge: `"add"` or `"concat"`.
        unit_gain: blocks of mean-square gain 1 instead of 2.

    Returns:
        Energies of shape (networks, N + 1), $h_0$ first.

    Raises:
        StabilityProbeError: if a size is too small or the merge is unknown.

    >>> energies = simulated_energies(64, [1.0, 1.0], 20_000, np.random.default_rng(0))
    >>> energies.mean(0).round(1)  # `theory.feature_energy_law` says 3, 2, 1
    array([3., 2., 1.])
    """
    for name, value, least in (("m", m, 2), ("networks", networks, 1), ("N", len(kappa), 1)):
        if value < least:
            raise StabilityProbeError(
                f"simulated_energies: {name} must be at least {least}, got {value}"
            )
    if merge not in ("add", "concat"):
        raise StabilityProbeError(
            f'simulated_energies: merge must be "add" or "concat", got {merge!r}'
        )
    gain = 1.0 if unit_gain else 2.0

    def block(energy: np.ndarray) -> np.ndarray:
        """The energies after a block of fresh weights."""
        kept = generator.binomial(m, 0.5, networks)
        hidden = energy * 2 / m * _chi_square(kept, generator)
        return np.asarray(hidden * gain / m * generator.chisquare(m, networks))

    u = [np.ones(networks)]
    for _ in kappa:
        u.append(block(u[-1]))
    h = [block(u[-1])]
    for k, energy in zip(reversed(kappa), reversed(u), strict=False):  # u_0 has no skip
        merged = h[-1] + k**2 * energy
        if merge == "add":
            merged += 2 * k * np.sqrt(h[-1] * energy) * _cosine(m, networks, generator)
        h.append(block(merged))
    return np.stack(h[::-1], axis=1)


def _chi_square(freedom: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """χ² variables; one of 0 degrees of freedom, where every unit is off, is 0."""
    return 2 * generator.standard_gamma(freedom / 2)


def _cosine(m: int, n: int, generator: np.random.Generator) -> np.ndarray:
    """Cosines between a fixed and n uniform directions in m dimensions."""
    size = np.sqrt(generator.beta(0.5, (m - 1) / 2, n))
    return np.asarray(generator.choice((-1.0, 1.0), n) * size)
