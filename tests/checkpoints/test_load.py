import json

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file
from torch import nn

from stability_probe import (
    LearnableScaling,
    StabilityProbeError,
    UViT,
    UViTConfig,
    find_skips,
    scale_skips,
)
from stability_probe.checkpoints import load_checkpoint
from tests.checkpoints.mutations import assert_one_line
from tests.checkpoints.saved_files import (
    FACTORY,
    UVIT,
    Cage,
    ConvUNet,
    conv_unet,
    diffusers_unet,
    every_format,
)

trusted = pytest.mark.filterwarnings("ignore:.*trusted")


def same_state(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in state)


def image(channels=1, size=8, batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, channels, size, size, generator=generator)


# ── every format ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return every_format(tmp_path_factory.mktemp("saved"))


FORMATS = {
    "diffusers": "diffusers", "sharded": "diffusers", "bin": "diffusers",
    "safetensors": "safetensors", "torch": "torch", "legacy": "legacy torch", "uvit": "torch",
    "accelerate": "safetensors", "averaged": "torch", "export": "torch.export",
}  # fmt: skip


@trusted
@pytest.mark.parametrize(("name", "format"), FORMATS.items())
def test_every_format_computes_what_was_saved(saved, name, format):
    path, options = saved[name]
    before = torch.random.get_rng_state()
    loaded = load_checkpoint(path, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.format == format
    assert (loaded.missing, loaded.unexpected, loaded.mismatched) == ([], [], [])
    assert not any(module.training for module in loaded.model.modules())
    assert_one_line(loaded.description)
    with torch.no_grad():
        if format == "diffusers":
            x, t = image(), torch.tensor([3, 500])
            expected = diffusers_unet().eval()(x, t).sample
            assert torch.equal(loaded.model(x, t).sample, expected)
        elif name == "uvit":
            x, t = image(), torch.tensor([3, 500])
            assert torch.equal(loaded.model(x, t), UViT(UVIT)(x, t))
        else:
            x = image(batch=1)
            expected = conv_unet(seed=1 if name == "averaged" else 0)(x)
            assert torch.equal(loaded.model(x), expected)
            assert not torch.equal(expected, conv_unet(seed=2)(x))


def test_a_path_may_be_text(saved):
    path, options = saved["uvit"]
    assert load_checkpoint(str(path), **options).config == vars(UVIT)


def test_all_formats_are_covered(saved):
    assert saved.keys() == FORMATS.keys()


# ── official U-ViT ───────────────────────────────────────────────────────────────────────────────

UVITS = {
    "plain": {},
    "labels": {"num_classes": 4},
    "no conv": {"conv": False},
    "mlp time": {"mlp_time_embed": True},
    "bias": {"qkv_bias": True},
    "patch 1": {"patch_size": 1},
    "patch 4": {"patch_size": 4, "in_chans": 3, "img_size": 16},
    "published width": {"embed_dim": 128, "num_heads": 2, "depth": 3},
    "all": {"num_classes": 3, "conv": False, "mlp_time_embed": True, "qkv_bias": True,
            "patch_size": 4, "mlp_ratio": 2.5, "depth": 7},
}  # fmt: skip


def uvit(options, seed=5):
    config = UViTConfig(**({"embed_dim": 24, "depth": 5, "num_heads": 1} | options))
    net = UViT(config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in net.parameters():  # also those that start at zero
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            )
    return net.eval()


@pytest.mark.parametrize("wrap", [torch.save, save_file,
                                  lambda state, path: torch.save({"module": state}, path)],
                         ids=["torch", "safetensors", "wrapped"])  # fmt: skip
@pytest.mark.parametrize("options", UVITS.values(), ids=UVITS)
def test_a_uvit_needs_no_factory_and_computes_bit_for_bit_the_same(tmp_path, options, wrap):
    net = uvit(options)
    wrap(net.state_dict(), tmp_path / "nnet.pth")
    loaded = load_checkpoint(tmp_path / "nnet.pth")
    args = [image(net.config.in_chans, net.config.img_size), torch.tensor([3, 500])]
    if net.config.num_classes > 0:
        args.append(torch.tensor([0, 2]))
    with torch.no_grad():
        expected = net(*args)
        assert expected.std() > 0
        assert torch.equal(loaded.model(*args), expected)
    assert loaded.config == vars(net.config)
    assert loaded.description.startswith(f"U-ViT of width {net.config.embed_dim} with")
    assert loaded.scaling_state == {}


def test_the_number_of_heads_matters_and_can_be_given(tmp_path):
    net = uvit({"num_heads": 3})
    torch.save(net.state_dict(), tmp_path / "nnet.pth")
    args = image(), torch.tensor([3, 500])
    with torch.no_grad():
        expected = net(*args)
        assumed = load_checkpoint(tmp_path / "nnet.pth")
        given = load_checkpoint(tmp_path / "nnet.pth", factory_args={"num_heads": 3})
        assert not torch.equal(assumed.model(*args), expected)
        assert torch.equal(given.model(*args), expected)
    assert "1 heads of width 24 assumed (the weights do not tell" in assumed.description
    assert "3 heads of width 8 (torch)" in given.description


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_learnable_scaling_is_kept_aside(tmp_path, shared, prefix, save):
    net = uvit({})
    plain = net.state_dict()
    plain = {name: value.clone() for name, value in plain.items()}
    args = image(), torch.tensor([3, 500])
    scale_skips(net, find_skips(net, *args), LearnableScaling(shared=shared))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    path = tmp_path / "nnet.pth"
    save({prefix + name: value for name, value in state.items()}, path)
    loaded = load_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))  # what was loaded does not change with its file
    assert same_state(loaded.model, plain)
    assert loaded.unexpected == []
    assert loaded.scaling_state.keys() == state.keys() - plain.keys()
    assert all(name.startswith("se.") for name in loaded.scaling_state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.scaling_state.items())
    note = f"; {len(loaded.scaling_state)} tensors of learnable scaling (LS) under se."
    assert note in loaded.description
    with torch.no_grad():
        skips = find_skips(loaded.model, *args)
        scale_skips(loaded.model, skips, LearnableScaling(shared=shared))
        loaded.model.load_state_dict(loaded.scaling_state, strict=False)
        assert torch.equal(loaded.model(*args), net(*args))


def test_a_uvit_that_misses_a_tensor_is_named(tmp_path):
    state = uvit({}).state_dict()
    del state["norm.weight"]
    state["more"] = torch.zeros(1)
    torch.save(state, tmp_path / "nnet.pth")
    with pytest.raises(
        StabilityProbeError, match=r"1 missing \('norm.weight'\), 1 unexpected \('mor"
    ):
        load_checkpoint(tmp_path / "nnet.pth")
    loaded = load_checkpoint(tmp_path / "nnet.pth", strict=False)
    assert (loaded.missing, loaded.unexpected) == (["norm.weight"], ["more"])


@pytest.mark.parametrize("shape", [(1, 10**6 + 1, 24), (1, 2**40 + 1, 24)])
def test_rejects_a_uvit_far_larger_than_its_file(tmp_path, shape):
    """A tensor of one number that claims to be of any size."""
    state = uvit({}).state_dict() | {"pos_embed": torch.zeros(1).expand(shape)}
    for name in ("mid_block.mlp.fc1.weight", "mid_block.mlp.fc1.bias"):
        state[name] = torch.zeros(1).expand(2**40, 24) if "weight" in name else torch.zeros(1)
    torch.save(state, tmp_path / "nnet.pth")
    with pytest.raises(
        StabilityProbeError, match=r"describes a model of more than .* it is damaged"
    ):
        load_checkpoint(tmp_path / "nnet.pth")


# ── weights of others ────────────────────────────────────────────────────────────────────────────

WRAPPERS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"m": torch.ones(1)}}}},
    "data parallel": lambda state: {"module." + name: v for name, v in state.items()},
    "compiled": lambda state: {"_orig_mod." + name: v for name, v in state.items()},
    "lightning": lambda state: {
        "pytorch-lightning_version": "2.0", "epoch": 1, "hyper_parameters": {"lr": 0.1},
        "state_dict": {"net." + name: v for name, v in state.items()},
        "optimizer_states": [{"state": {0: {"m": torch.ones(1)}}}], "lr_schedulers": [],
    },
    "all at once": lambda state: {
        "model": {"module._orig_mod." + name: v for name, v in state.items()}
    },
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_training_scripts_save(tmp_path, wrap):
    state = conv_unet().state_dict()
    torch.save(wrap(state), tmp_path / "last.ckpt")
    assert same_state(load_checkpoint(tmp_path / "last.ckpt", factory=FACTORY).model, state)


@pytest.mark.parametrize("factory", [FACTORY, ConvUNet, lambda width: ConvUNet(width)])
def test_the_factory_and_its_arguments(tmp_path, factory):
    state = conv_unet(width=6).state_dict()
    torch.save(state, tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt", factory=factory, factory_args={"width": 6})
    assert same_state(loaded.model, state)
    assert loaded.config["factory_args"] == {"width": 6}
    assert loaded.description.startswith("ConvUNet of ")


def test_averages_are_chosen(tmp_path):
    torch.save(
        {"model": conv_unet(seed=0).state_dict(), "ema": conv_unet(seed=1).state_dict()},
        tmp_path / "net.pt",
    )
    for weights, seed in (("model", 0), ("ema", 1)):
        loaded = load_checkpoint(tmp_path / "net.pt", factory=FACTORY, weights=weights)
        assert same_state(loaded.model, conv_unet(seed=seed).state_dict())
        assert f"weights '{weights}'" in loaded.description


def test_averages_under_a_prefix_are_chosen(tmp_path):
    """As latent diffusion saves them: one state dict, two prefixes."""
    both = {f"model.{k}": v for k, v in conv_unet(seed=0).state_dict().items()}
    both |= {f"model_ema.{k}": v for k, v in conv_unet(seed=1).state_dict().items()}
    torch.save({"state_dict": both}, tmp_path / "net.ckpt")
    for weights, seed in (("model", 0), ("ema", 1)):
        loaded = load_checkpoint(tmp_path / "net.ckpt", factory=FACTORY, weights=weights)
        assert same_state(loaded.model, conv_unet(seed=seed).state_dict())


def test_averages_in_order_leave_the_buffers_missing(tmp_path):
    torch.save({"shadow_params": list(conv_unet(seed=1).parameters())}, tmp_path / "ema.pt")
    with pytest.raises(StabilityProbeError, match=r"2 missing \('out.0.running_mean', 'out.0.runn"):
        load_checkpoint(tmp_path / "ema.pt", factory=FACTORY, weights="ema")
    loaded = load_checkpoint(tmp_path / "ema.pt", factory=FACTORY, weights="ema", strict=False)
    assert all(map(torch.equal, loaded.model.parameters(), conv_unet(seed=1).parameters()))
    assert loaded.missing == ["out.0.running_mean", "out.0.running_var"]


def test_what_does_not_fit_is_in_the_result(tmp_path):
    state = conv_unet().state_dict()
    del state["inp.bias"]
    torch.save(state | {"extra": torch.ones(1), "down.bias": torch.ones(7)}, tmp_path / "net.pt")
    with pytest.raises(StabilityProbeError, match=r"1 missing .*, 1 unexpected .*, 1 mismatched"):
        load_checkpoint(tmp_path / "net.pt", factory=FACTORY)
    loaded = load_checkpoint(tmp_path / "net.pt", factory=FACTORY, strict=False)
    assert (loaded.missing, loaded.unexpected, loaded.mismatched) == (
        ["inp.bias"],
        ["extra"],
        ["down.bias"],
    )


def test_rejects_weights_alone(tmp_path):
    torch.save(conv_unet().state_dict(), tmp_path / "net.pt")
    with pytest.raises(
        StabilityProbeError, match=r"holds weights alone, .* --model package.module:function .fact"
    ):
        load_checkpoint(tmp_path / "net.pt")


def test_rejects_averages_in_order_alone(tmp_path):
    torch.save({"shadow_params": [torch.ones(1)]}, tmp_path / "ema.pt")
    with pytest.raises(StabilityProbeError, match="holds weights alone"):
        load_checkpoint(tmp_path / "ema.pt", weights="ema")


def test_rejects_values_that_are_no_tensors(tmp_path):
    torch.save(conv_unet().state_dict() | {"version": 3}, tmp_path / "net.pt")
    with pytest.raises(
        StabilityProbeError, match=r"1 values that are no dense tensors \('version: "
    ):
        load_checkpoint(tmp_path / "net.pt", factory=FACTORY)


@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_rejects_a_model_without_storage(tmp_path):
    torch.save(conv_unet().state_dict(), tmp_path / "net.pt")
    with pytest.raises(
        StabilityProbeError, match=r"cannot be read as a model .NotImplementedError"
    ):
        load_checkpoint(tmp_path / "net.pt", factory=lambda: ConvUNet().to("meta"))


# ── modules stored whole ─────────────────────────────────────────────────────────────────────────


@trusted
def test_a_module_stored_whole(tmp_path):
    torch.save({"net": conv_unet().double().train()}, tmp_path / "net.pt")
    with pytest.raises(StabilityProbeError, match="its pickle needs more than tensors"):
        load_checkpoint(tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt", trust_pickle=True)
    assert same_state(loaded.model, conv_unet().double().state_dict())
    assert not loaded.model.training
    assert loaded.description == "ConvUNet, module stored whole (torch, weights 'net')"
    assert loaded.config == {"class": "ConvUNet"}


@trusted
def test_the_factory_has_precedence_over_a_module_stored_whole(tmp_path):
    torch.save(conv_unet(), tmp_path / "net.pt")
    other = conv_unet(seed=1)
    loaded = load_checkpoint(tmp_path / "net.pt", factory=lambda: other, trust_pickle=True)
    assert loaded.model is other
    assert same_state(other, conv_unet().state_dict())


@trusted
def test_rejects_a_module_that_cannot_be_put_to_use(tmp_path):
    torch.save(Cage(None).to("meta"), tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert loaded.weight.is_meta
    with pytest.raises(
        StabilityProbeError, match=r"cannot be read as a model .NotImplementedError"
    ):
        load_checkpoint(tmp_path / "net.pt", trust_pickle=True)


# ── diffusers ────────────────────────────────────────────────────────────────────────────────────


def test_a_diffusers_folder_needs_no_factory(tmp_path):
    diffusers_unet().save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded.model) is UNet2DModel
    assert loaded.config["block_out_channels"] == [4, 8]
    assert loaded.description.startswith("UNet2DModel of diffusers (diffusers, ")


def test_a_factory_may_be_given_for_a_diffusers_folder(tmp_path):
    diffusers_unet().save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path, factory=diffusers_unet, factory_args={"seed": 1})
    assert same_state(loaded.model, diffusers_unet(seed=0).state_dict())
    assert loaded.config["_class_name"] == "UNet2DModel"


def test_rejects_arguments_for_a_diffusers_folder(tmp_path):
    diffusers_unet().save_pretrained(tmp_path)
    with pytest.raises(
        StabilityProbeError, match=r"factory_args need a factory: config.json has the"
    ):
        load_checkpoint(tmp_path, factory_args={"sample_size": 8})


def test_rejects_weights_of_another_configuration(tmp_path):
    diffusers_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"block_out_channels": [4, 16]}))
    with pytest.raises(StabilityProbeError, match=r"does not fit UNet2DModel: .* mismatched \("):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"block_out_channels": [2**24, 2**24]}, {"layers_per_block": 2**24}, {"in_channels": 2**24}],
    ids=str,
)
def test_rejects_a_configuration_far_larger_than_its_weights(tmp_path, changes):
    diffusers_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(StabilityProbeError, match=r"config.json: describes a model of more than"):
        load_checkpoint(tmp_path)


def attentive():
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=2,
        block_out_channels=(8,), down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )  # fmt: skip


def test_the_names_of_older_versions_are_known(tmp_path):
    model = attentive()
    state = model.state_dict()
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in state.items():
        for new, before in renames.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = value.clone()
    assert old.keys() != state.keys()
    model.save_config(tmp_path)
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    assert same_state(load_checkpoint(tmp_path).model, state)


def test_rejects_weights_whose_names_cannot_be_changed(tmp_path):
    class Renames(nn.Linear):
        def _fix_state_dict_keys_on_load(self, state):
            raise KeyError("inside")

    torch.save({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, tmp_path / "net.pt")
    with pytest.raises(
        StabilityProbeError, match=r"as the weights of this model .KeyError: 'inside"
    ):
        load_checkpoint(tmp_path / "net.pt", factory=lambda: Renames(1, 1))


# ── precision ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_and_that_is_said(tmp_path, dtype):
    diffusers_unet().to(dtype).save_pretrained(tmp_path / "diffusers")
    state = {k: v.to(dtype) for k, v in uvit({}).state_dict().items()}
    torch.save(state, tmp_path / "nnet.pth")
    for name in ("diffusers", "nnet.pth"):
        loaded = load_checkpoint(tmp_path / name)
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
        said = f", {str(dtype).removeprefix('torch.')} converted to float32)"
        assert loaded.description.endswith(said)
    own = loaded.model.state_dict()
    assert all(torch.equal(own[name], state[name].float()) for name in state)


def test_the_factory_decides_the_precision(tmp_path):
    state = {k: v.bfloat16() for k, v in uvit({}).state_dict().items()}
    torch.save(state, tmp_path / "nnet.pth")
    make = lambda: UViT(uvit({}).config).bfloat16()  # noqa: E731
    loaded = load_checkpoint(tmp_path / "nnet.pth", factory=make)
    assert same_state(loaded.model, state)
    assert "converted" not in loaded.description
