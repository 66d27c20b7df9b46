"""The UNets of diffusers, as small as they build."""

from typing import Any

import torch
from diffusers import (
    HunyuanDiT2DModel,
    I2VGenXLUNet,
    Kandinsky3UNet,
    StableCascadeUNet,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)

from tests.oracles.architectures.architecture import Architecture, noise, seeded

T = torch.tensor([20, 700])
TEXT = noise(2, 5, 8, seed=8)


def _types(down: tuple[str, ...], up: tuple[str, ...]) -> dict[str, Any]:
    return {"down_block_types": down, "up_block_types": up}


# ── UNet2DModel ──────────────────────────────────────────────────────────────────────────────────

_TWO_D: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
    "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4,
    **_types(("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")),
}  # fmt: skip


def _unet2d(**changes: Any) -> UNet2DModel:
    return UNet2DModel(**(_TWO_D | changes))


def _checkpointed() -> UNet2DModel:
    model = _unet2d()
    model.enable_gradient_checkpointing()
    return model.train()


def _freeu() -> UNet2DConditionModel:
    model = UNet2DConditionModel(**_CROSS)
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return model


def _two_level(first: str, down: str, last: str, channels: tuple[int, int] = (8, 16)) -> Any:
    """The skips of one layer a block: conv_in, a layer, a downsampler, a layer."""
    c, d = channels
    return (
        ("conv_in", "up_blocks.1.resnets.1", "concat", (c, 8, 8)),
        (f"down_blocks.0.{first}", "up_blocks.1.resnets.0", "concat", (c, 8, 8)),
        (f"down_blocks.0.{down}", "up_blocks.0.resnets.1", "concat", (c, 4, 4)),
        (f"down_blocks.1.{last}", "up_blocks.0.resnets.0", "concat", (d, 4, 4)),
    )


_PLAIN = _two_level("resnets.0", "downsamplers.0", "resnets.0")
_IMAGE = noise(2, 1, 8, 8)
_RGB = {"in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32), "norm_num_groups": 32}

UNET2D = {
    "unet2d": Architecture(seeded(_unet2d), (_IMAGE, T), skips=_PLAIN),
    "unet2d-checkpointed": Architecture(seeded(_checkpointed), (_IMAGE, T), skips=_PLAIN),
    "unet2d-two-layers": Architecture(
        seeded(_unet2d, layers_per_block=2),
        (_IMAGE, T),
        skips=(
            ("conv_in", "up_blocks.1.resnets.2", "concat", (8, 8, 8)),
            ("down_blocks.0.resnets.0", "up_blocks.1.resnets.1", "concat", (8, 8, 8)),
            ("down_blocks.0.resnets.1", "up_blocks.1.resnets.0", "concat", (8, 8, 8)),
            ("down_blocks.0.downsamplers.0", "up_blocks.0.resnets.2", "concat", (8, 4, 4)),
            ("down_blocks.1.resnets.0", "up_blocks.0.resnets.1", "concat", (16, 4, 4)),
            ("down_blocks.1.resnets.1", "up_blocks.0.resnets.0", "concat", (16, 4, 4)),
        ),
    ),
    "unet2d-attention": Architecture(
        seeded(
            _unet2d, **_types(("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D"))
        ),
        (_IMAGE, T),
        skips=_two_level("resnets.0", "downsamplers.0", "attentions.0"),
    ),
    # The deepest skip joins a tensor to itself: no layer lies between u_4 and its merge.
    "unet2d-no-middle": Architecture(
        seeded(_unet2d, mid_block_type=None), (_IMAGE, T), skips=_PLAIN
    ),
    "unet2d-resnet-sampling": Architecture(
        seeded(
            _unet2d,
            downsample_type="resnet",
            upsample_type="resnet",
            **_types(("AttnDownBlock2D", "DownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")),
        ),
        (_IMAGE, T),
        skips=_two_level("attentions.0", "downsamplers.0", "resnets.0"),
    ),
    "unet2d-resnet-blocks": Architecture(
        seeded(
            _unet2d,
            **_types(
                ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
                ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
            ),
        ),
        (_IMAGE, T),
        skips=_PLAIN,
    ),
    # u_3 is `skip_conv(image) + resnet_down(h)`, a sum that no module puts out.
    "unet2d-skip": Architecture(
        seeded(
            _unet2d,
            **_RGB,
            **_types(("SkipDownBlock2D",) * 2, ("SkipUpBlock2D",) * 2),
        ),
        (noise(2, 3, 8, 8), T),
        skips=_two_level("resnets.0", "resnet_down", "resnets.0", (32, 32)),
    ),
    "unet2d-attention-skip": Architecture(
        seeded(
            _unet2d,
            **_RGB,
            **_types(("AttnSkipDownBlock2D",) * 2, ("AttnSkipUpBlock2D",) * 2),
        ),
        (noise(2, 3, 8, 8), T),
        skips=_two_level("attentions.0", "resnet_down", "attentions.0", (32, 32)),
    ),
}

# ── text-conditional images ──────────────────────────────────────────────────────────────────────

_CROSS: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2,
    "cross_attention_dim": 8,
    **_types(("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")),
}  # fmt: skip
_SDXL = _CROSS | {
    "layers_per_block": 2, "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
    **_types(("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")),
}  # fmt: skip
_LATENT = noise(2, 4, 8, 8)
_ADDED = {
    "text_embeds": noise(2, 8, seed=9),
    "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [32.0, 32, 4, 4, 32, 32]]),
}
_CROSS_SKIPS = _two_level("attentions.0", "downsamplers.0", "resnets.0")

CONDITIONAL = {
    "unet2d-condition": Architecture(
        seeded(UNet2DConditionModel, **_CROSS), (_LATENT, T, TEXT), skips=_CROSS_SKIPS
    ),
    # Filters the skips, and scales part of the decoder's features in place.
    "unet2d-condition-freeu": Architecture(seeded(_freeu), (_LATENT, T, TEXT), skips=_CROSS_SKIPS),
    # A ControlNet's outputs are added to the skips (not to what the encoder goes on with).
    "unet2d-condition-controlled": Architecture(
        seeded(UNet2DConditionModel, **_CROSS),
        (_LATENT, T, TEXT),
        {
            "down_block_additional_residuals": tuple(
                noise(2, *shape, seed=11) for *_, shape in _CROSS_SKIPS
            ),
            "mid_block_additional_residual": noise(2, 16, 4, 4, seed=12),
        },
        _CROSS_SKIPS,
    ),
    "unet2d-condition-xl": Architecture(
        seeded(UNet2DConditionModel, **_SDXL),
        (_LATENT, T),
        {"encoder_hidden_states": TEXT, "added_cond_kwargs": _ADDED},
        (
            ("conv_in", "up_blocks.1.resnets.2", "concat", (8, 8, 8)),
            ("down_blocks.0.resnets.0", "up_blocks.1.resnets.1", "concat", (8, 8, 8)),
            ("down_blocks.0.resnets.1", "up_blocks.1.resnets.0", "concat", (8, 8, 8)),
            ("down_blocks.0.downsamplers.0", "up_blocks.0.resnets.2", "concat", (8, 4, 4)),
            ("down_blocks.1.attentions.0", "up_blocks.0.resnets.1", "concat", (16, 4, 4)),
            ("down_blocks.1.attentions.1", "up_blocks.0.resnets.0", "concat", (16, 4, 4)),
        ),
    ),
    "unet2d-condition-labels": Architecture(
        seeded(UNet2DConditionModel, **_CROSS, num_class_embeds=4),
        (_LATENT, T, TEXT),
        {"class_labels": torch.tensor([0, 3])},
        _CROSS_SKIPS,
    ),
    # u_i leaves after a stage's strided layer; the last stage has no skip.
    "kandinsky3": Architecture(
        seeded(
            Kandinsky3UNet,
            in_channels=4,
            time_embedding_dim=16,
            groups=4,
            attention_head_dim=4,
            layers_per_block=2,
            block_out_channels=(8, 16, 16),
            cross_attention_dim=8,
            encoder_hid_dim=8,
        ),
        (noise(2, 4, 16, 16), T),
        {"encoder_hidden_states": TEXT, "encoder_attention_mask": torch.ones(2, 5)},
        (
            ("down_blocks.0", "up_blocks.2", "concat", (8, 8, 8)),
            ("down_blocks.1", "up_blocks.1", "concat", (16, 4, 4)),
        ),
    ),
    # The merge is inside of a residual branch: `x + channelwise(cat(norm(depthwise(x)), skip))`.
    "stable-cascade": Architecture(
        seeded(
            StableCascadeUNet,
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            conditioning_dim=8,
            block_out_channels=(8, 16, 16),
            num_attention_heads=(2, 2, 2),
            down_num_layers_per_block=(1, 1, 1),
            up_num_layers_per_block=(1, 1, 1),
            down_blocks_repeat_mappers=(1, 1, 1),
            up_blocks_repeat_mappers=(1, 1, 1),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            )
            * 3,
            clip_text_pooled_in_channels=8,
            clip_seq=2,
            dropout=(0.1, 0.1, 0.1),
        ),
        (noise(2, 4, 8, 8), torch.tensor([0.2, 0.7]), noise(2, 1, 8, seed=9)),
        skips=(
            ("down_blocks.0.2", "up_blocks.2.0.channelwise", "concat", (8, 8, 8)),
            ("down_blocks.1.2", "up_blocks.1.0.channelwise", "concat", (16, 4, 4)),
        ),
    ),
    "hunyuan-dit": Architecture(
        seeded(
            HunyuanDiT2DModel,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=6,
            learn_sigma=False,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=8,
            text_len=3,
            text_len_t5=4,
        ),
        (_LATENT, T.float()),
        {
            "encoder_hidden_states": noise(2, 3, 8, seed=9),
            "text_embedding_mask": torch.ones(2, 3),
            "encoder_hidden_states_t5": noise(2, 4, 8, seed=10),
            "text_embedding_mask_t5": torch.ones(2, 4),
            "image_meta_size": _ADDED["time_ids"],
            "style": torch.zeros(2, dtype=torch.long),
        },
        (
            ("blocks.0", "blocks.5.skip_norm", "concat", (16, 16)),
            ("blocks.1", "blocks.4.skip_norm", "concat", (16, 16)),
        ),
    ),
}

# ── video (batch and frames share the first dimension of every feature) ──────────────────────────

_VIDEO: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8,
}  # fmt: skip
_BLOCKS_3D = _types(("CrossAttnDownBlock3D", "DownBlock3D"), ("UpBlock3D", "CrossAttnUpBlock3D"))
_CLIP = noise(2, 4, 2, 8, 8)
_SKIPS_3D = (
    ("transformer_in", "up_blocks.1.resnets.1", "concat", (8, 8, 8)),
    ("down_blocks.0.temp_attentions.0", "up_blocks.1.resnets.0", "concat", (8, 8, 8)),
    ("down_blocks.0.downsamplers.0", "up_blocks.0.resnets.1", "concat", (8, 4, 4)),
    ("down_blocks.1.temp_convs.0", "up_blocks.0.resnets.0", "concat", (16, 4, 4)),
)

VIDEO = {
    "unet3d-condition": Architecture(
        seeded(UNet3DConditionModel, **_VIDEO, **_BLOCKS_3D, attention_head_dim=4),
        (_CLIP, T, TEXT),
        skips=_SKIPS_3D,
    ),
    "i2vgen-xl": Architecture(
        seeded(I2VGenXLUNet, **_VIDEO, **_BLOCKS_3D, attention_head_dim=4),
        (_CLIP, T),
        {
            "fps": torch.tensor([8, 16]),
            "image_latents": noise(2, 4, 2, 8, 8, seed=9),
            "image_embeddings": noise(2, 8, seed=10),
            "encoder_hidden_states": TEXT,
        },
        _SKIPS_3D,
    ),
    "unet-motion": Architecture(
        seeded(
            UNetMotionModel,
            **_VIDEO,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=4,
            **_types(
                ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            ),
        ),
        (_CLIP, T, TEXT.repeat_interleave(2, dim=0)),
        skips=_two_level("motion_modules.0", "downsamplers.0", "motion_modules.0"),
    ),
    "unet-spatio-temporal": Architecture(
        seeded(
            UNetSpatioTemporalConditionModel,
            sample_size=8,
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 32),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            layers_per_block=1,
            cross_attention_dim=8,
            num_attention_heads=2,
            num_frames=2,
            **_types(
                ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            ),
        ),
        (noise(2, 2, 8, 8, 8), T, noise(2, 1, 8, seed=8)),
        {"added_time_ids": torch.tensor([[6.0, 127, 0.02], [7.0, 64, 0.1]])},
        _two_level("attentions.0", "downsamplers.0", "resnets.0", (32, 32)),
    ),
}

# ── sequences ────────────────────────────────────────────────────────────────────────────────────

ONE_D = {
    # Four stages down and three up: the feature of the first stage is never used.
    "unet1d-trajectories": Architecture(
        seeded(
            UNet1DModel,
            sample_size=16,
            in_channels=3,
            out_channels=3,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            flip_sin_to_cos=False,
            freq_shift=1.0,
            block_out_channels=(8, 16, 16, 32),
            down_block_types=("DownResnetBlock1D",) * 4,
            up_block_types=("UpResnetBlock1D",) * 3,
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            act_fn="mish",
        ),
        (noise(2, 3, 16), T),
        skips=(
            ("down_blocks.1.resnets.1", "up_blocks.2.resnets.0", "concat", (16, 8)),
            ("down_blocks.2.resnets.1", "up_blocks.1.resnets.0", "concat", (16, 4)),
            ("down_blocks.3.resnets.1", "up_blocks.0.resnets.0", "concat", (32, 2)),
        ),
    ),
    "unet1d-audio": Architecture(
        seeded(
            UNet1DModel,
            sample_size=32,
            in_channels=2,
            out_channels=2,
            extra_in_channels=16,
            time_embedding_dim=16,
            block_out_channels=(32, 32, 32),
        ),
        (noise(2, 2, 32), T),
        skips=(
            ("down_blocks.0.resnets.2", "up_blocks.2.resnets.0", "concat", (32, 32)),
            ("down_blocks.1.resnets.2", "up_blocks.1.resnets.0", "concat", (32, 16)),
            ("down_blocks.2.attentions.2", "up_blocks.0.resnets.0", "concat", (32, 8)),
        ),
    ),
}

DIFFUSERS = UNET2D | CONDITIONAL | VIDEO | ONE_D
