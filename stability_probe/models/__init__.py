"""The two networks that no library has: Eq. 4's MLP UNet, and U-ViT in its official layout."""

from stability_probe.models.theory_unet import TheoryUNet
from stability_probe.models.uvit import UViT, UViTConfig

__all__ = ["TheoryUNet", "UViT", "UViTConfig"]
