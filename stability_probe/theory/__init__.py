"""The theorems as pure functions: tensors and numbers in, numbers out.

One module a result of Huang et al. (2023), *ScaleLong* (NeurIPS 2023, arXiv:2310.13545), and
`spectral`, the matrix-free norms that Theorem 3.4 needs. Nothing here imports the rest of the
package, so every other part may use it.
"""

from stability_probe.theory.huang2023_concentration import log_energy_variance
from stability_probe.theory.huang2023_features import (
    feature_band,
    feature_energy_law,
    skip_energy_sum,
)
from stability_probe.theory.huang2023_gradients import (
    gradient_bound,
    gradient_energy_law,
    gradient_scale,
)
from stability_probe.theory.huang2023_input import input_energy
from stability_probe.theory.huang2023_robustness import (
    blockwise_bound,
    max_block_gain,
    pathwise_bound,
    robustness_bound,
)
from stability_probe.theory.spectral import (
    SpectralNorm,
    golub_kahan_norm,
    jacobian_norm,
    jacobian_products,
)

__all__ = [
    "SpectralNorm",
    "blockwise_bound",
    "feature_band",
    "feature_energy_law",
    "golub_kahan_norm",
    "gradient_bound",
    "gradient_energy_law",
    "gradient_scale",
    "input_energy",
    "jacobian_norm",
    "jacobian_products",
    "log_energy_variance",
    "max_block_gain",
    "pathwise_bound",
    "robustness_bound",
    "skip_energy_sum",
]
