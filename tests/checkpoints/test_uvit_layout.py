from pathlib import Path

import pytest
import torch

from stability_probe import StabilityProbeError, UViT, UViTConfig
from stability_probe.checkpoints.uvit_layout import (
    assumed_heads,
    describe,
    infer_config,
    split_scaling,
    uvit_state,
)
from tests.oracles.uvit import official_layout, random_state

PATH = Path("uvit.pth")
CONFIGS = {
    "default": {},
    "labels": {"num_classes": 10},
    "one label": {"num_classes": 1},
    "no conv": {"conv": False},
    "mlp time": {"mlp_time_embed": True},
    "bias": {"qkv_bias": True},
    "patch 1": {"patch_size": 1, "img_size": 4},
    "patch 4": {"patch_size": 4, "img_size": 16},
    "one patch": {"patch_size": 8},
    "colour": {"in_chans": 3},
    "shallow": {"depth": 3},
    "deep": {"depth": 13},
    "ratio": {"mlp_ratio": 2.7},
    "ratio below 1": {"mlp_ratio": 0.3},
    "wide": {"embed_dim": 128, "num_heads": 2, "depth": 3},
    "all": {"num_classes": 3, "conv": False, "mlp_time_embed": True, "qkv_bias": True,
            "patch_size": 4, "img_size": 32, "in_chans": 4, "mlp_ratio": 3.0},
}  # fmt: skip


def config_of(name):
    return UViTConfig(**({"embed_dim": 12, "depth": 5, "num_heads": 1} | CONFIGS[name]))


def state_of(**changes):
    return UViT(
        UViTConfig(**({"embed_dim": 12, "depth": 5, "num_heads": 1} | changes))
    ).state_dict()


# ── sizes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_is_inferred(name):
    config = config_of(name)
    inferred = infer_config(UViT(config).state_dict(), {}, PATH)
    width = config.embed_dim
    assert int(width * inferred.mlp_ratio) == int(width * config.mlp_ratio)
    assert vars(inferred) == vars(config) | {"mlp_ratio": inferred.mlp_ratio}


def test_sizes_of_the_layout_that_was_published():
    state = random_state(official_layout(dim=12, depth=7))
    assert infer_config(state, {}, PATH) == UViTConfig(embed_dim=12, depth=7, num_heads=1)


@pytest.mark.parametrize("hidden", [1, 7, 10, 29, 64])
def test_the_hidden_width_survives_rounding(hidden):
    for width in range(2, 40):
        state = {
            "patch_embed.proj.weight": torch.zeros(width, 1, 2, 2),
            "pos_embed": torch.zeros(1, 17, width),
            "in_blocks.0.x": torch.zeros(1),
            "mid_block.mlp.fc1.weight": torch.zeros(hidden, width),
        }
        inferred = infer_config(state, {"num_heads": 1}, PATH)
        assert int(width * inferred.mlp_ratio) == hidden


@pytest.mark.parametrize(
    ("width", "heads"), [(1, 1), (64, 1), (96, 2), (512, 8), (768, 12), (1280, 20), (67, 67)]
)
def test_heads_of_the_published_sizes(width, heads):
    assert assumed_heads(width) == heads


def test_overrides_are_taken_as_given():
    assert infer_config(state_of(), {"num_heads": 3}, PATH).num_heads == 3


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"heads": 3}, "U-ViT has no setting 'heads'; it has .*'num_heads'"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 12 and 5"),
        ({"num_heads": "many"}, "as the weights of a U-ViT .Type"),
        ({"depth": 1}, "depth must be at least 2"),
    ],
)
def test_rejects_wrong_overrides(overrides, reason):
    with pytest.raises(StabilityProbeError, match=reason):
        infer_config(state_of(), overrides, PATH)


def crafted(**shapes):
    state = state_of()
    names = {
        "pos": "pos_embed",
        "patch": "patch_embed.proj.weight",
        "fc1": "mid_block.mlp.fc1.weight",
    }
    return state | {names[key]: torch.zeros(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            crafted(pos=(1, 16, 12)),
            "as a U-ViT has 15 patches of 1 channels in width 12; they must",
        ),
        (crafted(pos=(1, 1, 12)), "has 0 patches"),
        (crafted(pos=(1, 0, 12)), "has -1 patches"),
        (crafted(patch=(0, 1, 2, 2)), "in width 0"),
        (crafted(patch=(12, 0, 2, 2)), "of 0 channels"),
        (crafted(patch=(12, 1, 0, 0)), "patch_size must divide img_size, got 0 and 0"),
        (crafted(patch=(12, 1, 2)), "as the weights of a U-ViT .ValueError"),
        (crafted(patch=(1, 1, 2, 2)), "embed_dim must be a multiple"),
        (crafted(pos=()), "as the weights of a U-ViT .IndexError"),
        (crafted(fc1=()), "as the weights of a U-ViT .IndexError"),
        ({k: v for k, v in state_of().items() if "fc1" not in k}, "of a U-ViT .KeyError"),
        ({k: v for k, v in state_of().items() if "blocks" not in k}, "depth must be at least 2"),
    ],
)
def test_rejects_shapes_of_no_uvit(state, reason):
    with pytest.raises(StabilityProbeError, match=reason):
        infer_config(state, {}, PATH)


# ── which states are of a U-ViT ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "nnet.", "module._orig_mod."])
def test_prefixes_are_taken_off(prefix):
    state = state_of()
    found = uvit_state({prefix + name: value for name, value in state.items()})
    assert found.keys() == state.keys()
    assert all(found[name] is state[name] for name in state)


def test_what_lies_beside_the_prefix_is_kept_to_be_named():
    state = {"module." + name: value for name, value in state_of().items()}
    assert uvit_state(state | {"other": torch.zeros(1)}).keys() == {*state_of(), "other"}


@pytest.mark.parametrize(
    "state", [{}, {"w": torch.zeros(1)}, {"pos_embed": torch.zeros(1, 17, 12)}], ids=len
)
def test_others_are_not(state):
    assert uvit_state(state) is None


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_two_in_one_file_are_not_mixed(prefix):
    """Names that coincide without the prefix: no tensor may take the place of another."""
    whole = {prefix + name: value for name, value in state_of().items()}
    rest = {name: value for name, value in state_of().items() if name != "pos_embed"}
    assert uvit_state(whole | rest) is None


def test_scaling_is_set_aside():
    state = state_of()
    scaling = {"se.layer1.weight": torch.zeros(1), "se.0.layer2.bias": torch.zeros(2)}
    own, others = split_scaling(state | scaling)
    assert (own.keys(), others) == (state.keys(), scaling)
    assert split_scaling({"seven.w": torch.zeros(1)})[1] == {}


# ── what is said ─────────────────────────────────────────────────────────────────────────────────


def test_what_was_assumed_is_said():
    said = describe(UViTConfig(embed_dim=12, depth=5, num_heads=1), {}, {})
    assert said == (
        "U-ViT of width 12 with 2 long skips for 1x8x8 images, 1 heads of width 12 assumed "
        "(the weights do not tell; num_heads overrides)"
    )
    published = describe(UViTConfig(embed_dim=512, num_heads=8), {}, {})
    assert "8 heads of width 64 assumed, as in the published sizes (" in published


def test_what_was_given_is_not_assumed():
    said = describe(UViTConfig(embed_dim=12, num_heads=3), {"num_heads": 3}, {})
    assert said.endswith("images, 3 heads of width 4")


def test_scaling_that_is_kept_aside_is_said():
    said = describe(UViTConfig(), {}, {"se.a": 1, "se.b": 2})
    assert said.endswith("; 2 tensors of learnable scaling (LS) under se.")
