"""Baselines of stability, and the check of new runs against them."""

import lazy_loader

# As in the package's own __init__: pytest loads the plugin in here at every start, without torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
