"""See, prove, fix and guard the training stability of networks with long skip connections."""

import lazy_loader

# Public names are listed in __init__.pyi and loaded when first used: torch and diffusers take
# seconds to import, which `stability-probe --help` need not wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
