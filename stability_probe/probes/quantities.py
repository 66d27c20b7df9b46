"""What is recorded of features, by what hooks take of them: per sample."""

from collections.abc import Mapping

from torch import Tensor

from stability_probe.probes.records import Key

NORM, GRADIENT_NORM = "norm", "gradient norm"
"""What hooks take: ‖·‖ of features, and of the gradients with respect to them."""
NOISE_LEVEL = Key("t", "x", 0, "")
"""t of every sample."""


def quantities(taken: Mapping[Key, Tensor], grad_scale: float | Tensor) -> dict[Key, Tensor]:
    """Energies of features and of gradients, gains κ_i and cross terms, per sample.

    Args:
        taken: (..., samples) each, from `FeatureProbe.taken`.
        grad_scale: what the loss was multiplied by before the backward pass.
    """
    norm = {(key.site, key.level): v for key, v in taken.items() if key.metric == NORM}
    norm |= {("z", i): v for (site, i), v in norm.items() if site == "h" and i > 0}
    found = {Key("energy", *site, ""): v.square() for site, v in norm.items()}
    for level in sorted(i for site, i in norm if site == "merged"):
        sites = [(q, level) for q in ("u", "ku", "z", "merged")]
        if all(site in norm for site in sites) and len({norm[s].shape for s in sites}) == 1:
            u, ku, z, merged = (norm[site] for site in sites)
            found[Key("kappa", "skip", level, "")] = ku / u
            found[Key("cross", "merge", level, "")] = merged.square() - z.square() - ku.square()
    for key, v in taken.items():
        if key.metric == GRADIENT_NORM:
            found[key._replace(metric="feature_grad_energy")] = (v / grad_scale).square()
    return found
