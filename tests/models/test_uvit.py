from functools import partial

import pytest
import torch

from stability_probe import (
    ConstantScaling,
    InverseSqrt2,
    LearnableScaling,
    StabilityProbeError,
    UViT,
    UViTConfig,
    find_skips,
    scale_skips,
)
from stability_probe.models.uvit import timestep_embedding
from tests.oracles.uvit import official_layout, random_state, squeeze_excite, uvit_forward

SIZES = {"embed_dim": 12, "depth": 7, "num_heads": 3}
LAYOUT = {"dim": 12, "depth": 7}
# changes to the configuration, and what they are in the layout's own words
VARIANTS = {
    "plain": ({}, {}),
    "mlp-time": ({"mlp_time_embed": True}, {"mlp_time_embed": True}),
    "labels": ({"num_classes": 10}, {"num_classes": 10}),
    "no-conv": ({"conv": False}, {"conv": False}),
    "qkv-bias": ({"qkv_bias": True}, {"qkv_bias": True}),
    "patch-4": ({"patch_size": 4}, {"patch": 4}),
    "colour": ({"in_chans": 3, "img_size": 16}, {"chans": 3, "img": 16}),
    "even-depth": ({"depth": 4}, {"depth": 4}),
    "odd-width": ({"embed_dim": 15}, {"dim": 15}),
    "all": (
        {"mlp_time_embed": True, "num_classes": 3, "qkv_bias": True, "mlp_ratio": 2.0},
        {"mlp_time_embed": True, "num_classes": 3, "qkv_bias": True, "mlp_ratio": 2},
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant="plain"):
    """(model with a random official state dict loaded, that state dict, example input)."""
    options, layout = VARIANTS[variant]
    config = UViTConfig(**(SIZES | options))
    state = random_state(official_layout(**(LAYOUT | layout)))
    model = UViT(config)
    model.load_state_dict(state, strict=True)
    generator = torch.Generator().manual_seed(1)
    size = config.img_size
    args = [
        torch.randn(3, config.in_chans, size, size, generator=generator),
        torch.tensor([0, 37, 999]),
    ]
    if config.num_classes > 0:
        args.append(torch.tensor([0, 2, 1]))
    return model, state, args


def assert_equal_numbers(actual, expected):
    assert expected.std() > 0.1  # so that the tolerance means something
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# ── layout ───────────────────────────────────────────────────────────────────────────────────────


@variants
def test_official_checkpoints_load_and_round_trip(variant):
    model, state, _ = build(variant)
    saved = model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


def test_a_checkpoint_of_another_variant_does_not_load():
    model = build("plain")[0]
    with pytest.raises(RuntimeError, match="time_embed"):
        model.load_state_dict(random_state(official_layout(**LAYOUT, mlp_time_embed=True)))


@pytest.mark.parametrize("img", [8, 16])
@pytest.mark.parametrize("shared", [True, False])
def test_learnable_scaling_adds_the_keys_of_scalelong(shared, img):
    tokens, hidden = {8: (17, 1), 16: (65, 4)}[img]
    model = UViT(UViTConfig(**SIZES, img_size=img))
    skips = find_skips(model, torch.zeros(1, 1, img, img), torch.zeros(1))
    scale_skips(model, skips, LearnableScaling(shared=shared))
    expected = official_layout(**LAYOUT, img=img)
    for prefix in ["se"] if shared else ["se.0", "se.1", "se.2"]:
        expected |= {
            f"{prefix}.layer1.weight": (hidden, tokens),
            f"{prefix}.layer1.bias": (hidden,),
            f"{prefix}.layer2.weight": (tokens, hidden),
            f"{prefix}.layer2.bias": (tokens,),
        }
    assert {key: tuple(v.shape) for key, v in model.state_dict().items()} == expected
    model.load_state_dict(random_state(expected), strict=True)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


@variants
def test_numbers_equal_the_public_description(variant):
    model, state, args = build(variant)
    heads = model.config.num_heads
    assert_equal_numbers(model(*args), uvit_forward(state, *args, heads=heads))


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize(
    ("scheme", "factor"),
    [
        (InverseSqrt2(), lambda j: 2**-0.5),
        (ConstantScaling(0.7), lambda j: 0.7 ** (3 - 1 - j)),  # j-th pop of 3, deepest first
    ],
    ids=["inverse-sqrt2", "cs"],
)
def test_numbers_with_constant_scaling(variant, scheme, factor):
    model, state, args = build(variant)
    unscaled = model(*args)
    expected = uvit_forward(state, *args, heads=3, scale=lambda j, skip: factor(j) * skip)
    with scale_skips(model, find_skips(model, *args), scheme):
        scaled = model(*args)
    assert_equal_numbers(scaled, expected)
    assert (scaled - unscaled).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("shared", [True, False])
def test_numbers_with_learnable_scaling(variant, shared):
    model, state, args = build(variant)
    scale_skips(model, find_skips(model, *args), LearnableScaling(shared=shared))
    gates = {key: tuple(v.shape) for key, v in model.state_dict().items() if key.startswith("se.")}
    state = state | {key: 3 * v for key, v in random_state(gates, seed=5).items()}
    model.load_state_dict(state, strict=True)

    def gate(j, skip, reverse=False):
        k = 2 - j if reverse else j
        return squeeze_excite(state, "se" if shared else f"se.{k}", skip)  # se.0: the deepest

    actual = model(*args)
    assert_equal_numbers(actual, uvit_forward(state, *args, heads=3, scale=gate))
    if not shared:
        other_order = uvit_forward(state, *args, heads=3, scale=partial(gate, reverse=True))
        assert (actual - other_order).abs().max() > 1e-2


def test_samples_do_not_interact():
    model, _, args = build("all")
    torch.testing.assert_close(model(*args)[1:2], model(*(a[1:2] for a in args)))


def test_noise_level_may_be_a_float_and_matters():
    model, _, (x, t) = build()
    assert torch.equal(model(x, t), model(x, t.float()))
    assert not torch.equal(model(x, t), model(x, t + 0.5))


def test_timestep_embedding_by_hand():
    out = timestep_embedding(torch.tensor([0.0, 2.0]), 5)
    angles = torch.tensor([[0.0, 0.0], [2.0, 2.0 * 10_000**-0.5]])
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(2, 1)], dim=1)
    torch.testing.assert_close(out, expected)


def test_patches_go_back_where_they_came_from():
    """Rows run before columns inside a patch: its four pixels come out as 0 1 / 2 3."""
    model, _, (x, t) = build("no-conv")
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.bias.copy_(torch.arange(4.0))
    expected = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(4, 4)
    assert torch.equal(model(x, t), expected.expand(3, 1, 8, 8))


def test_initial_weights():
    model = UViT(UViTConfig(embed_dim=64, depth=5))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == float(name.endswith("weight"))).all(), name
        elif name == "pos_embed" or (name.endswith("weight") and p.ndim == 2):
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.2), name
        elif name.endswith("bias") and "proj" not in name and "final" not in name:
            assert (p == 0).all(), name
    assert model.patch_embed.proj.weight.abs().max() <= 0.5  # fan-in 1 * 2 * 2


def test_weights_come_from_the_generator_alone():
    config = UViTConfig(**SIZES, num_classes=3)
    first, again = UViT(config).state_dict(), UViT(config).state_dict()
    other = UViT(config, torch.Generator().manual_seed(9)).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert {"pos_embed", "label_emb.weight", "mid_block.mlp.fc1.weight"} <= changed
    assert {"final_layer.bias", "patch_embed.proj.weight", "out_blocks.2.skip_linear.weight"} <= (
        changed
    )


def test_building_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    UViT(UViTConfig(**SIZES))
    assert torch.equal(torch.random.get_rng_state(), before)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, "depth must be at least 2 to have a long skip, got 1"),
        ({"patch_size": 3}, "patch_size must divide img_size, got 3 and 8"),
        ({"patch_size": 0}, "patch_size must divide img_size, got 0 and 8"),
        ({"img_size": 0}, "patch_size must divide img_size, got 2 and 0"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 64 and 5"),
        ({"num_heads": 0}, "embed_dim must be a multiple of num_heads, got 64 and 0"),
        ({"embed_dim": 0}, "embed_dim must be a multiple of num_heads, got 0 and 4"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(StabilityProbeError, match=message):
        UViTConfig(**options)


def test_labels_are_given_exactly_when_there_is_a_table_of_them():
    plain, labelled = build("plain")[0], build("labels")[0]
    x, t, y = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 1])
    with pytest.raises(StabilityProbeError, match="num_classes=-1: labels y are not taken"):
        plain(x, t, y)
    with pytest.raises(StabilityProbeError, match="num_classes=10: labels y are missing"):
        labelled(x, t)


def test_an_out_block_needs_its_skip():
    model, _, _ = build()
    with pytest.raises(StabilityProbeError, match="out-block was called without its skip"):
        model.out_blocks[0](torch.zeros(1, 17, 12))
