r"""The counterfactual of Theorem 3.1: the same weights, with every κ multiplied by s.

The theorem says of a random network that $\mathbb{E}\|h_i\|^2$ is $c_1\|x_t\|^2\sum_j\kappa_j^2$
plus a constant. Of one network with given weights that can be tested by turning κ and nothing
else: with all of them multiplied by s, the sum is multiplied by $s^2$.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stability_probe.probes.batch import ProbeBatch
from stability_probe.probes.features import sample_energy
from stability_probe.probes.graph import feature_graph
from stability_probe.probes.records import Key
from stability_probe.skips import SkipConnection, Uniform, scale_skips
from stability_probe.skips.find import evaluating

FACTORS = (0.0, 0.25, 0.5, 0.71, 1.0)
"""Values of s; 1 is the network as it is."""


@torch.no_grad()
def counterfactual_energies(
    model: nn.Module,
    skips: Sequence[SkipConnection],
    batch: ProbeBatch,
    factors: Sequence[float] = FACTORS,
) -> dict[Key, Tensor]:
    """‖h_i‖² of every sample with all κ multiplied by each factor, in evaluation mode.

    Args:
        model: the network, whatever scales its skips attached.
        skips: its long skips, at least one.
        batch: the samples.
        factors: the values of s.

    Returns:
        `counterfactual_energy` at the site `s=...` and the level i: a vector over samples.
    """
    found: dict[Key, Tensor] = {}
    for s in factors:
        with (
            evaluating(model),
            scale_skips(model, skips, Uniform(s)),
            feature_graph(model, skips, batch) as nodes,
        ):
            for i in range(len(skips) + 1):
                key = Key("counterfactual_energy", f"s={s:g}", i, "")
                found[key] = sample_energy(nodes["h", i], len(batch.x))
    return found
