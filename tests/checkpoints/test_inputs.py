from dataclasses import dataclass

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from torch import nn

from stability_probe import StabilityProbeError, TheoryUNet, UViT, UViTConfig
from stability_probe.checkpoints.inputs import example_inputs


def guess(model, shape=None, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return example_inputs(model, shape, **({"batch": 2} | options), generator=generator)


def run(model, inputs):
    """The output tensor for these inputs."""
    with torch.no_grad():
        out = model.eval()(*inputs.args, **inputs.kwargs)
    return out if isinstance(out, torch.Tensor) else out[0]


def shapes(inputs):
    """The shapes of the tensors in `kwargs`, the number for a number."""
    return {
        k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in inputs.kwargs.items()
    }


class Plain(nn.Module):
    """A network whose forward is the given function, with the given attributes."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.forward = forward
        for name, value in attributes.items():
            setattr(self, name, value)


CHANNELS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TEXT = {"cross_attention_dim": 8, "attention_head_dim": 4}


def plain_2d(**changes):
    sizes = {
        "sample_size": 8, **CHANNELS, "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DModel(**(sizes | changes))


def conditional_2d(**changes):
    sizes = {
        **CHANNELS, **TEXT, "sample_size": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(sizes | changes))


def text_time(**changes):
    sizes = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34,
    }  # fmt: skip
    return conditional_2d(**(sizes | changes))


def video_3d():
    return diffusers.UNet3DConditionModel(
        **CHANNELS, **TEXT,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip


def motion():
    return diffusers.UNetMotionModel(
        **CHANNELS, cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2,
        motion_max_seq_length=3,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip


def spatio_temporal():
    return diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=8,
        num_attention_heads=2, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip


def sequence():
    return diffusers.UNet1DModel(
        sample_size=32, block_out_channels=(32, 32), extra_in_channels=64,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    )  # fmt: skip


def hunyuan(**changes):
    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2,
        "sample_size": 8, "hidden_size": 16, "num_layers": 4, "cross_attention_dim": 8,
        "cross_attention_dim_t5": 16, "pooled_projection_dim": 8, "text_len": 3, "text_len_t5": 5,
    }  # fmt: skip
    return diffusers.HunyuanDiT2DModel(**(sizes | changes))


def kandinsky():
    return diffusers.Kandinsky3UNet(
        time_embedding_dim=16, groups=4, attention_head_dim=4, layers_per_block=2,
        block_out_channels=(8, 16, 16, 16), cross_attention_dim=8, encoder_hid_dim=12,
    )  # fmt: skip


def i2vgen():
    return diffusers.I2VGenXLUNet(
        **CHANNELS, **TEXT, sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip


def cascade(**changes):
    sizes = {
        "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8,
        "conditioning_dim": 16, "block_out_channels": (16, 16), "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": 6,
    }  # fmt: skip
    return StableCascadeUNet(**(sizes | changes))


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip


def autoencoder():
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)


B = 2
CASES = {
    "2d": (plain_2d, (3, 8, 8), {"timestep": (B,)}),
    "2d, classes": (
        lambda: plain_2d(num_class_embeds=5),
        (3, 8, 8),
        {"timestep": (B,), "class_labels": (B,)},
    ),
    "2d, classes like times": (
        lambda: plain_2d(class_embed_type="timestep"),
        (3, 8, 8),
        {"timestep": (B,), "class_labels": (B,)},
    ),
    "2d, classes embedded already": (
        lambda: plain_2d(class_embed_type="identity"),
        (3, 8, 8),
        {"timestep": (B,), "class_labels": (B, 32)},
    ),
    "conditional": (
        conditional_2d,
        (4, 8, 16),
        {"timestep": (B,), "encoder_hidden_states": (B, 8, 8), "encoder_attention_mask": (B, 8)},
    ),
    "conditional, classes": (
        lambda: conditional_2d(
            class_embed_type="projection", projection_class_embeddings_input_dim=7
        ),
        (4, 8, 16),
        {
            "timestep": (B,),
            "encoder_hidden_states": (B, 8, 8),
            "class_labels": (B, 7),
            "encoder_attention_mask": (B, 8),
        },
    ),
    "video": (
        video_3d,
        (4, 4, 16, 16),
        {"timestep": (B,), "encoder_hidden_states": (B, 8, 8)},
    ),
    "motion": (
        motion,
        (4, 3, 16, 16),
        {"timestep": (B,), "encoder_hidden_states": (3 * B, 8, 8)},
    ),
    "frames first": (
        spatio_temporal,
        (4, 8, 8, 8),
        {"timestep": (B,), "encoder_hidden_states": (B, 8, 8), "added_time_ids": (B, 3)},
    ),
    "sequence": (sequence, (2, 32), {"timestep": (B,)}),
    "two texts": (
        lambda: hunyuan(use_style_cond_and_image_meta_size=False),
        (4, 8, 8),
        None,
    ),
    "pooling": (
        kandinsky,
        (4, 64, 64),
        {"timestep": (B,), "encoder_hidden_states": (B, 8, 12), "encoder_attention_mask": (B, 8)},
    ),
    "image to video": (
        i2vgen,
        (4, 4, 16, 16),
        {
            "timestep": (B,),
            "fps": (B,),
            "image_latents": (B, 4, 4, 16, 16),
            "image_embeddings": (B, 8),
            "encoder_hidden_states": (B, 8, 8),
        },
    ),
    "cascade": (cascade, (4, 16, 16), {"timestep_ratio": (B,), "clip_text_pooled": (B, 1, 6)}),
    "cascade, text and image": (
        lambda: cascade(clip_text_in_channels=5, clip_image_in_channels=7),
        (4, 16, 16),
        {
            "timestep_ratio": (B,),
            "clip_text_pooled": (B, 1, 6),
            "clip_text": (B, 8, 5),
            "clip_img": (B, 1, 7),
        },
    ),
    "transformer": (dit, (4, 8, 8), {"timestep": (B,), "class_labels": (B,)}),
    "autoencoder": (autoencoder, (3, 8, 8), {}),
    "Eq. 4": (lambda: TheoryUNet(m=8, n_skips=2), (8,), {"t": (B,)}),
    "U-ViT": (
        lambda: UViT(UViTConfig(embed_dim=8, depth=3, num_heads=2)),
        (1, 8, 8),
        {"timesteps": (B,)},
    ),
    "U-ViT, classes": (
        lambda: UViT(UViTConfig(embed_dim=8, depth=3, num_heads=2, num_classes=4)),
        (1, 8, 8),
        {"timesteps": (B,), "y": (B,)},
    ),
}


@pytest.mark.parametrize(("build", "x", "others"), CASES.values(), ids=CASES.keys())
def test_the_network_runs_on_what_is_guessed(build, x, others):
    model = build()
    inputs = guess(model)
    assert tuple(inputs.args[0].shape) == (2, *x)
    if others is not None:
        assert shapes(inputs) == others
    assert len(inputs.args) == 1
    assert len(inputs.notes) == 1 + len(inputs.kwargs)
    out = run(model, inputs)
    assert out.shape[0] == 2 and out.isfinite().all()


def test_two_texts_size_style_and_positions():
    model = hunyuan()
    inputs = guess(model)
    cos, sin = inputs.kwargs.pop("image_rotary_emb")
    assert cos.shape == sin.shape == (16, 8)  # 4x4 patches, head width 8
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(16, 8))
    assert shapes(inputs) == {
        "timestep": (2,), "encoder_hidden_states": (2, 3, 8), "text_embedding_mask": (2, 3),
        "encoder_hidden_states_t5": (2, 5, 16), "text_embedding_mask_t5": (2, 5),
        "image_meta_size": (2, 6), "style": (2,),
    }  # fmt: skip
    assert inputs.kwargs["image_meta_size"][0].tolist() == [8, 8, 8, 8, 0, 0]
    assert run(model, guess(model)).isfinite().all()


def test_text_and_time():
    model = text_time()
    inputs = guess(model)
    added = inputs.kwargs["added_cond_kwargs"]
    assert {k: tuple(v.shape) for k, v in added.items()} == {
        "text_embeds": (2, 34 - 6 * 4),
        "time_ids": (2, 6),
    }
    assert added["time_ids"][1].tolist() == [8, 16, 0, 0, 8, 16]
    assert run(model, inputs).isfinite().all()


def test_image_embeddings_in_place_of_text():
    model = conditional_2d(
        addition_embed_type="image", encoder_hid_dim_type="image_proj", encoder_hid_dim=6
    )
    inputs = guess(model)
    assert inputs.kwargs["added_cond_kwargs"]["image_embeds"].shape == (2, 6)
    assert run(model, inputs).isfinite().all()


def test_each_frame_has_the_text_of_its_sample():
    text = guess(motion()).kwargs["encoder_hidden_states"].view(2, 3, 8, 8)
    assert (text == text[:, :1]).all()
    assert not torch.equal(text[0], text[1])


def test_notes_say_what_and_from_where():
    assert guess(conditional_2d(num_class_embeds=5)).notes == [
        "sample: Gaussian noise (2, 4, 8, 16), from in_channels=4 and sample_size=(8, 16)",
        "timestep: noise levels (2,), whole numbers from 1 to 999",
        "encoder_hidden_states: Gaussian noise (2, 8, 8), from cross_attention_dim=8",
        "class_labels: labels (2,) below 5, from num_class_embeds=5",
        "encoder_attention_mask: ones (2, 8), every token counts",
    ]
    assert guess(video_3d()).notes[0] == (
        "sample: Gaussian noise (2, 4, 4, 16, 16), from in_channels=4 and its 2 resolutions "
        "(no size is given), with 4 frames"
    )
    assert guess(TheoryUNet(m=8)).notes[0] == "x: Gaussian noise (2, 8), from m=8"


def test_the_given_shape_has_precedence():
    inputs = guess(plain_2d(), (3, 4, 12))
    assert inputs.args[0].shape == (2, 3, 4, 12)
    assert inputs.notes[0].endswith("of the given shape")


def test_the_given_configuration_has_precedence():
    assert guess(plain_2d(), config={"sample_size": 16}).args[0].shape == (2, 3, 16, 16)


def test_configuration_from_attributes_and_from_a_dataclass():
    @dataclass
    class Config:
        in_channels: int = 2
        image_size: int = 6

    by_attributes = Plain(lambda x: x, in_channels=2, image_size=6, net=nn.Conv2d(2, 2, 1))
    by_dataclass = Plain(lambda x: x, config=Config(), net=nn.Conv2d(2, 2, 1))
    for model in (by_attributes, by_dataclass):
        assert guess(model).args[0].shape == (2, 2, 6, 6)


# ── plain networks ───────────────────────────────────────────────────────────────────────────────


def test_x_alone():
    inputs = guess(Plain(lambda x: x), (3, 4))
    assert (inputs.kwargs, inputs.time) == ({}, None)


def test_x_and_time():
    inputs = guess(Plain(lambda x, t: x + t[:, None]), (4,))
    assert inputs.time == "t"
    t = inputs.kwargs["t"]
    assert t.dtype == torch.float32
    assert (t == t.round()).all() and (t >= 1).all() and (t <= 999).all()


def test_an_optional_context_of_unknown_width_is_left_out():
    inputs = guess(Plain(lambda x, t, context=None: x), (4,))
    assert inputs.kwargs.keys() == {"t"}


def test_a_context_of_known_width():
    model = Plain(lambda x, t, context=None: x, context_dim=5)
    assert shapes(guess(model, (4,))) == {"t": (2,), "context": (2, 8, 5)}


def test_a_signature_that_says_nothing():
    inputs = guess(Plain(lambda *args, **kwargs: args[0]), (4,))
    assert inputs.args[0].shape == (2, 4)
    assert inputs.notes == ["x: Gaussian noise (2, 4), of the given shape"]


@pytest.mark.parametrize("name", ["sigma", "noise_labels", "timestep_ratio", "noise_level"])
def test_noise_levels_of_order_one(name):
    scope = {}
    exec(f"def forward(x, {name}): return x", scope)
    level = guess(Plain(scope["forward"]), (4,), batch=50).kwargs[name]
    assert 0 <= level.min() < 0.2 and 0.8 < level.max() < 1


def test_whole_noise_levels_where_the_network_declares_them():
    def forward(x, t: torch.LongTensor):
        return x

    assert guess(Plain(forward), (4,)).kwargs["t"].dtype == torch.int64


def test_one_noise_level_is_enough_unless_more_are_required():
    assert guess(Plain(lambda x, t, sigma=None: x), (4,)).kwargs.keys() == {"t"}
    inputs = guess(Plain(lambda x, t, timestep_r: x), (4,))
    assert (inputs.kwargs.keys(), inputs.time) == ({"t", "timestep_r"}, "t")


def test_noise_level_is_set_later():
    inputs = guess(plain_2d())
    assert inputs.time == "timestep"
    for t in (17, 17.0, torch.tensor(17), torch.tensor([17, 17])):
        later = inputs.with_noise_level(t)
        assert later.kwargs["timestep"].tolist() == [17, 17]
        assert later.kwargs["timestep"].dtype == inputs.kwargs["timestep"].dtype
        assert later.args is inputs.args
    assert inputs.with_noise_level(torch.tensor([1, 2])).kwargs["timestep"].tolist() == [1, 2]


def test_dtype_is_that_of_the_network():
    inputs = guess(conditional_2d().double())
    for tensor in (*inputs.args, *inputs.kwargs.values()):
        assert tensor.dtype == torch.float64


def test_values_come_from_the_generator_alone():
    model = conditional_2d(num_class_embeds=1000)
    rng = torch.random.get_rng_state()
    first, again, other = guess(model), guess(model), guess(model, seed=1)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.equal(first.args[0], again.args[0])
    assert not torch.equal(first.args[0], other.args[0])
    for name in ("timestep", "encoder_hidden_states", "class_labels"):
        assert torch.equal(first.kwargs[name], again.kwargs[name])
        assert not torch.equal(first.kwargs[name], other.kwargs[name])


def test_given_values_are_taken():
    mask = torch.ones(2, 3)
    inputs = guess(Plain(lambda x, t, mask: x), (4,), given={"mask": mask, "t": torch.zeros(2)})
    assert inputs.kwargs["mask"] is mask
    assert (inputs.time, inputs.notes[1:]) == ("t", ["t: as given", "mask: as given"])
    assert inputs.with_noise_level(3.0).kwargs["t"].tolist() == [3, 3]


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


def test_rejects_a_parameter_that_is_unknown():
    with pytest.raises(
        StabilityProbeError,
        match=r"Plain.forward needs 'mask', .*\(known: x, t\); pass it with --kwargs FILE.npz, or",
    ):
        guess(Plain(lambda x, t, mask: x), (4,))


def test_rejects_a_condition_of_unknown_width():
    with pytest.raises(StabilityProbeError, match=r"needs 'context'.*\(known: x\)"):
        guess(Plain(lambda x, context: x), (4,))


def test_rejects_added_conditions_of_an_unknown_kind():
    with pytest.raises(StabilityProbeError, match="needs 'added_cond_kwargs'"):
        guess(conditional_2d(), config={"addition_embed_type": "image_hint"})


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        (nn.Conv2d(3, 3, 1), "height and width"),
        (Plain(lambda x: x), "channels"),
        (nn.Linear(3, 3), "channels"),
    ],
)
def test_rejects_an_unknown_shape(model, missing):
    with pytest.raises(
        StabilityProbeError,
        match=f"shape of an input to {type(model).__name__} .*does not give its {missing}; pass",
    ):
        guess(model)


@pytest.mark.parametrize("shape", [(), (3, 0, 4)])
def test_rejects_an_empty_shape(shape):
    with pytest.raises(StabilityProbeError, match="every dimension must be at least 1, got 2 and"):
        guess(Plain(lambda x: x), shape)


def test_rejects_an_empty_batch():
    with pytest.raises(StabilityProbeError, match="must be at least 1, got 0 and 3,4"):
        guess(Plain(lambda x: x), (3, 4), batch=0)


def test_rejects_the_noise_level_first():
    with pytest.raises(
        StabilityProbeError, match=r"takes the noise level 't' before x_t; pass --m"
    ):
        guess(Plain(lambda t, x: x), (4,))


def test_rejects_a_given_value_for_no_parameter():
    with pytest.raises(StabilityProbeError, match="no parameter 'mask' beside x_t; it takes t"):
        guess(Plain(lambda x, t: x), (4,), given={"mask": 1})


def test_rejects_a_noise_level_for_a_network_without():
    with pytest.raises(StabilityProbeError, match=r"takes no noise level.*probe it as"):
        guess(autoencoder()).with_noise_level(0.5)
