"""The data flow of `diffusers.UNet2DModel`, with a factor at every skip."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def unet2d_forward(model: Any, x: Tensor, t: Tensor, kappa: Sequence[float]) -> Tensor:
    """The output when skip i (1 is the outermost) is multiplied by kappa[i - 1]."""
    temb = model.time_embedding(model.time_proj(t).to(x.dtype))

    def layers(block: Any) -> list[tuple[Any, Any]]:
        attentions = getattr(block, "attentions", [lambda h: h] * len(block.resnets))
        return list(zip(block.resnets, attentions, strict=True))

    h = model.conv_in(x)
    u = [h]
    for down in model.down_blocks:
        for resnet, attention in layers(down):
            h = attention(resnet(h, temb))
            u.append(h)
        for downsampler in down.downsamplers or ():
            h = downsampler(h)
            u.append(h)
    h = model.mid_block(h, temb)
    assert len(u) == len(kappa)
    for up in model.up_blocks:
        for resnet, attention in layers(up):
            level = len(u)
            h = attention(resnet(torch.cat([h, kappa[level - 1] * u.pop()], dim=1), temb))
        for upsampler in up.upsamplers or ():
            h = upsampler(h)
    h = torch.nn.functional.silu(model.conv_norm_out(h))
    return model.conv_out(h)
