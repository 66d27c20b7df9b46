"""One small model of every family that `find_skips` knows, with an example input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from stability_probe import TheoryUNet, UViT, UViTConfig


@dataclass(frozen=True)
class Case:
    """A model and what to call it with."""

    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    n_skips: int

    def run(self, model: nn.Module, *args: Any) -> Tensor:
        """The output tensor for the example input, or for `args`."""
        out = model(*(args or self.args))
        return out if isinstance(out, Tensor) else out.sample


def unet2d(**changes: Any) -> UNet2DModel:
    """A two-level `UNet2DModel` on 8x8 images, with seeded weights."""
    sizes: dict[str, Any] = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**(sizes | changes))


def uvit() -> UViT:
    """A U-ViT of two skips with weights large enough for every part to matter."""
    model = UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2))
    randomise(model, seed=1)
    return model


def randomise(module: nn.Module, seed: int, std: float = 0.3) -> None:
    """Give every parameter random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
T = torch.tensor([20, 700])

CASES = {
    "theory-add": Case(lambda: TheoryUNet(m=64, n_skips=3), (X,), 3),
    "theory-concat": Case(lambda: TheoryUNet(m=64, n_skips=3, merge="concat"), (X,), 3),
    "uvit": Case(uvit, (X, T), 2),
    "unet2d": Case(unet2d, (X, T), 4),
    "unet2d-attention": Case(lambda: unet2d(**ATTENTION), (X, T), 4),
}


def hook_count(model: nn.Module) -> int:
    """How many forward hooks of either kind there are in a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
