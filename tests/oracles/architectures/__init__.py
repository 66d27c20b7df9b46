"""A zoo of tiny networks, with the long skips that one finds by reading their source code.

`ZOO` has those with long skips, `WITHOUT` those that have none, `NESTED` those whose long skips
cross, so that they have no order of levels.
"""

from tests.oracles.architectures.architecture import Architecture, Skip, tensors
from tests.oracles.architectures.diffusers_models import DIFFUSERS
from tests.oracles.architectures.diffusion import DIFFUSION
from tests.oracles.architectures.nested import NESTED
from tests.oracles.architectures.recursive import RECURSIVE
from tests.oracles.architectures.segmentation import SEGMENTATION
from tests.oracles.architectures.transformers import TRANSFORMERS
from tests.oracles.architectures.unets import UNETS
from tests.oracles.architectures.variations import VARIATIONS
from tests.oracles.architectures.without import WITHOUT

ZOO: dict[str, Architecture] = {
    **RECURSIVE,
    **UNETS,
    **VARIATIONS,
    **SEGMENTATION,
    **DIFFUSION,
    **TRANSFORMERS,
    **DIFFUSERS,
}

__all__ = ["NESTED", "WITHOUT", "ZOO", "Architecture", "Skip", "tensors"]
