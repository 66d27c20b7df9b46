"""What the networks in `test_inputs.py` do not reach; there each maker is run on a real network."""

import inspect

import pytest
import torch

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.conditions import (
    MAKERS,
    STEPS,
    TIMES,
    TOKENS,
    Network,
    find,
    noise_level,
    nothing,
)

WIDTHS = {"cross_attention_dim": 6, "encoder_hid_dim": 5}


def network(shape=(3, 8, 8), names=(), seed=0, dtype=torch.float32, **config):
    generator = torch.Generator().manual_seed(seed)
    return Network("Net", config, names, shape, 2, generator, torch.empty(0, dtype=dtype))


def make(name, *args, **config):
    made = MAKERS[name](network(*args, **config))
    return made and made[0]


def size(name, **config):
    made = make(name, **config)
    return None if made is None else tuple(made.shape)


def level(name, annotation=inspect.Parameter.empty, **config):
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return noise_level(network(**config), inspect.Parameter(name, kind, annotation=annotation))[0]


# ── settings ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"a": 3}, ("a", 3)),
        ({"b": 4, "a": 3}, ("a", 3)),
        ({"b": 4, "a": None}, ("b", 4)),
        ({"a": [5, 6]}, ("a", 5)),
        ({"a": (5,)}, ("a", 5)),
        *[({"a": value}, None) for value in (0, -1, True, 2.0, "3", [], [None], [True], {})],
        ({}, None),
    ],
)
def test_the_first_positive_number(config, found):
    assert find(config, "a", "b") == found


def test_noise_is_of_the_dtype_of_the_network_and_names_its_source():
    value, note = network(dtype=torch.float64).gaussian(3, 4, source="from here")
    assert (value.dtype, tuple(value.shape)) == (torch.float64, (2, 3, 4))
    assert note == "Gaussian noise (2, 3, 4), from here"
    assert network(width=7).of_width("width", before=(3,))[1].endswith("from width=7")
    assert network().of_width("width") is None


def test_noise_is_the_same_for_every_dtype():
    single, double = (
        network(dtype=dtype).gaussian(5, source="")[0] for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(single.double(), double)


# ── noise levels ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [n for n, kind in TIMES.items() if kind == "steps"])
@pytest.mark.parametrize(
    ("config", "steps"),
    [({}, STEPS), ({"num_train_timesteps": 5}, 5), ({"num_embeds_ada_norm": 3}, 3),
     ({"num_timesteps": 1}, 2)],
    ids=str,
)  # fmt: skip
def test_steps_stay_below_their_number(name, config, steps):
    levels = torch.cat([level(name, seed=seed, **config) for seed in range(40)])
    assert levels.min() >= 1 and levels.max() == pytest.approx(steps - 1, rel=0.1)
    assert levels.max() <= steps - 1


@pytest.mark.parametrize("annotation", ["torch.LongTensor", "IntTensor", torch.LongTensor])
def test_steps_are_whole_where_that_is_declared(annotation):
    assert level("t", annotation).dtype == torch.int64
    assert level("t", "Tensor").dtype == torch.float32


def test_every_name_is_of_one_kind():
    assert set(TIMES.values()) == {"steps", "unit"}
    assert not set(TIMES) & set(MAKERS)
    assert nothing(network()) is None


# ── labels ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["class_labels", "class_label", "labels", "label", "y"])
@pytest.mark.parametrize("key", ["num_class_embeds", "num_classes", "num_labels"])
def test_labels_are_below_their_number(name, key):
    labels = torch.cat([make(name, seed=seed, **{key: 3}) for seed in range(20)])
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == {0, 1, 2}


def test_labels_of_an_adaptive_norm_only_where_it_has_them():
    assert make("class_labels", norm_type="ada_norm_zero", num_embeds_ada_norm=4).max() < 4
    assert make("class_labels", norm_type="ada_norm", num_embeds_ada_norm=4) is None


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, None),
        ({"num_classes": -1}, None),
        ({"class_embed_type": "identity"}, None),
        ({"class_embed_type": "identity", "block_out_channels": (8, 16)}, (2, 32)),
        ({"class_embed_type": "identity", "time_embedding_dim": 9}, (2, 9)),
        ({"class_embed_type": "timestep"}, (2,)),
        *[({"class_embed_type": kind, "projection_class_embeddings_input_dim": 7}, (2, 7))
          for kind in ("projection", "simple_projection")],
        ({"class_embed_type": "projection"}, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_embedded_in_place_of_labels(config, shape):
    assert size("class_labels", **config) == shape


# ── texts ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, None),
        ({"cross_attention_dim": 6}, (2, TOKENS, 6)),
        (WIDTHS, (2, TOKENS, 5)),
        ({"cross_attention_dim": [6, 7], "text_len": 3}, (2, 3, 6)),
        ({"context_dim": 4}, (2, TOKENS, 4)),
    ],
    ids=str,
)
def test_a_text_and_its_mask(config, shape):
    for name in ("encoder_hidden_states", "context"):
        assert size(name, **config) == shape
    for name in ("encoder_attention_mask", "text_embedding_mask"):
        assert size(name, **config) == (shape and shape[:2])


def test_no_mask_for_what_takes_the_place_of_a_text():
    assert size("encoder_attention_mask", encoder_hid_dim_type="text_proj", **WIDTHS)
    assert size("encoder_attention_mask", encoder_hid_dim_type="image_proj", **WIDTHS) is None


def test_the_second_text():
    config = {"cross_attention_dim_t5": 4, "text_len_t5": 3, "cross_attention_dim": 6}
    assert size("encoder_hidden_states_t5", **config) == (2, 3, 4)
    assert size("text_embedding_mask_t5", **config) == (2, 3)
    assert size("encoder_hidden_states_t5", cross_attention_dim=6) is None


# ── added conditions ─────────────────────────────────────────────────────────────────────────────


def added(**config):
    made = make("added_cond_kwargs", **config)
    return made and {key: tuple(value.shape) for key, value in made.items()}


TEXT_TIME = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 30,
             "addition_time_embed_dim": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        ({}, None),
        ({"addition_embed_type": "text"}, None),
        ({"encoder_hid_dim_type": "text_proj"}, None),
        (TEXT_TIME, {"text_embeds": (2, 6), "time_ids": (2, 6)}),
        (WIDTHS | {"addition_embed_type": "image"}, {"image_embeds": (2, 5)}),
        (WIDTHS | {"encoder_hid_dim_type": "image_proj"}, {"image_embeds": (2, 5)}),
        (WIDTHS | {"addition_embed_type": "text_image"}, {"image_embeds": (2, 6)}),
        (WIDTHS | {"encoder_hid_dim_type": "text_image_proj"}, {"image_embeds": (2, 6)}),
    ],
    ids=str,
)
def test_added_conditions(config, shapes):
    assert added(**config) == shapes


@pytest.mark.parametrize(
    "config",
    [
        {"addition_embed_type": "image_hint", **WIDTHS},
        {"addition_embed_type": "something"},
        {"addition_embed_type": "image"},
        {"addition_embed_type": "text_time"},
        TEXT_TIME | {"projection_class_embeddings_input_dim": 24},
        TEXT_TIME | {"encoder_hid_dim_type": "ip_image_proj"},
    ],
    ids=str,
)
def test_rejects_added_conditions_that_cannot_be_guessed(config):
    with pytest.raises(
        StabilityProbeError, match=r"Net.forward needs 'added_cond_kwargs', and what"
    ):
        added(**config)


def test_the_size_of_a_network_without_images():
    ids = make("added_cond_kwargs", (7,), **TEXT_TIME)["time_ids"]
    assert ids[0].tolist() == [7, 7, 0, 0, 7, 7]


# ── the others ───────────────────────────────────────────────────────────────────────────────────

ABSENT = [
    "added_time_ids", "image_meta_size", "style", "image_rotary_emb", "image_embeddings",
    "pooled_projections", "pooled_text_emb", "proj_embedding", "clip_text_pooled", "clip_text",
    "clip_img", "guidance",
]  # fmt: skip


@pytest.mark.parametrize("name", ABSENT)
def test_what_a_configuration_does_not_mention_is_left_out(name):
    assert make(name) is None


@pytest.mark.parametrize(
    ("name", "config", "shape"),
    [
        ("added_time_ids", {"projection_class_embeddings_input_dim": 13,
                            "addition_time_embed_dim": 4}, (2, 3)),
        ("image_meta_size", {"use_style_cond_and_image_meta_size": True}, (2, 6)),
        ("style", {"use_style_cond_and_image_meta_size": True}, (2,)),
        ("image_latents", {}, (2, 3, 8, 8)),
        ("image_embeddings", {"cross_attention_dim": 6}, (2, 6)),
        ("pooled_projections", {"pooled_projection_dim": 6}, (2, 6)),
        ("pooled_text_emb", {"cond_embed_dim": 6}, (2, 6)),
        ("proj_embedding", {"embedding_dim": 6}, (2, 6)),
        ("clip_text_pooled", {"clip_text_pooled_in_channels": 6}, (2, 1, 6)),
        ("clip_text", {"clip_text_in_channels": 6}, None),
        ("clip_text", {"clip_text_in_channels": 6, "clip_image_in_channels": 7}, (2, TOKENS, 6)),
        ("clip_img", {"clip_text_in_channels": 6, "clip_image_in_channels": 7}, (2, 1, 7)),
        ("guidance", {"guidance_embeds": True}, (2,)),
        ("fps", {}, (2,)),
    ],
)  # fmt: skip
def test_the_shapes_of_the_others(name, config, shape):
    assert size(name, **config) == shape


def test_rotary_positions_only_for_networks_that_know_their_image_size():
    config = {"patch_size": 2, "attention_head_dim": 8}
    net = network(names=("image_meta_size",), **config)
    cos, sin = MAKERS["image_rotary_emb"](net)[0]
    assert cos.shape == sin.shape == (16, 8)
    assert make("image_rotary_emb", **config) is None
    flat = network((8,), ("image_meta_size",), **config)
    assert MAKERS["image_rotary_emb"](flat) is None


@pytest.mark.parametrize(
    ("shape", "names", "frames"),
    [((3, 5, 8, 8), (), 5), ((5, 3, 8, 8), ("added_time_ids",), 5), ((3, 8, 8), (), 1)],
)
def test_the_number_of_frames_is_that_of_the_input(shape, names, frames):
    assert MAKERS["num_frames"](network(shape, names))[0] == frames
