import json
import os

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import nn

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.source import Wanted, read_source
from tests.checkpoints.mutations import assert_one_line
from tests.checkpoints.saved_files import conv_unet, diffusers_unet, save_tar

STATE, EMA = conv_unet(seed=0).state_dict(), conv_unet(seed=1).state_dict()
DIFFUSERS = "diffusion_pytorch_model"


def read(path, weights="model", trust=False):
    return read_source(path, Wanted(weights, trust))


def same(source, state):
    found = source.weights
    return found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_of_one(tmp_path):
    save_file(STATE, tmp_path / "net.safetensors")
    source = read(tmp_path / "net.safetensors")
    assert (source.path, source.format, source.name) == (
        tmp_path / "net.safetensors",
        "safetensors",
        "",
    )
    assert (source.folder, source.config) == (None, {})
    assert same(source, STATE)
    assert len(source.tensors) == len(STATE)


@pytest.mark.parametrize(
    ("weights", "name", "state"), [("model", "model", STATE), ("ema", "ema", EMA)]
)
def test_a_file_of_two(tmp_path, weights, name, state):
    torch.save({"model": STATE, "ema": EMA, "step": 3}, tmp_path / "net.pt")
    source = read(tmp_path / "net.pt", weights)
    assert (source.format, source.name) == ("torch", name)
    assert same(source, state)


def test_the_tensors_of_a_list_and_of_a_module(tmp_path):
    torch.save({"shadow_params": [torch.ones(1), torch.ones(2)]}, tmp_path / "ema.pt")
    assert [len(t) for t in read(tmp_path / "ema.pt", "ema").tensors] == [1, 2]
    torch.save(nn.Linear(1, 2), tmp_path / "net.pt")
    with pytest.warns(UserWarning, match="trusted"):
        assert [len(t) for t in read(tmp_path / "net.pt", trust=True).tensors] == [2, 2]


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        ({"epoch": 3, "args": {"lr": 0.1}}, "a dict of 'epoch', 'args'; save"),
        ([STATE], "a list; save"),
        (3, "a int; save"),
        ({}, "a dict; save"),
        ({1: torch.ones(1)}, "a dict of '1'; save"),
    ],
)
def test_rejects_a_file_without_weights(tmp_path, saved, found):
    torch.save(saved, tmp_path / "net.pt")
    with pytest.raises(StabilityProbeError, match=f"net.pt: holds no weights but {found} model.st"):
        read(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "header",
    [
        '{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}',
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}',
        '{"w":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,4]}}',
        '{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        '{"w":{"dtype":"F32","shape":[0,1000000000000000000],"data_offsets":[0,0]}}',
        '{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        "{" + '"a":[' * 10_000,
        "{" + " " * 500 + "}",
    ],
    ids=["shape", "offsets", "overflow", "negative", "rest", "dtype", "deep", "empty"],
)
def test_rejects_crafted_safetensors(tmp_path, header):
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    (tmp_path / "net.safetensors").write_bytes(data)
    with pytest.raises(StabilityProbeError, match="cannot be read as a safetensors file") as error:
        read(tmp_path / "net.safetensors")
    assert_one_line(str(error.value))


def test_rejects_what_is_not_there(tmp_path):
    with pytest.raises(StabilityProbeError, match="does not exist"):
        read(tmp_path / "no")


# ── folders ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def accelerate(tmp_path):
    """What accelerate's `save_state` leaves, with averages beside it."""
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.ones(1)}}}, tmp_path / "optimizer.bin")
    torch.save({"rng": [torch.ones(1)]}, tmp_path / "random_states_0.pkl")
    return tmp_path


def test_a_folder_of_training(accelerate):
    source = read(accelerate)
    assert (source.path.name, source.name, source.format) == (
        "model.safetensors",
        "model",
        "safetensors",
    )
    assert same(source, STATE)


def test_averages_in_a_file_beside_it(accelerate):
    torch.save(EMA, accelerate / "ema.pth")
    assert same(read(accelerate), STATE)
    assert same(read(accelerate, "ema"), EMA)
    with pytest.raises(StabilityProbeError, match="'other' is not in it; found 'model', 'ema'"):
        read(accelerate, "other")


def test_averages_that_diffusers_saves(accelerate):
    averages = EMAModel(conv_unet(seed=1).parameters())
    torch.save(averages.state_dict(), accelerate / "ema.bin")
    found = read(accelerate, "ema").weights
    assert all(map(torch.equal, found, conv_unet(seed=1).parameters()))


def test_averages_inside_the_only_file(tmp_path):
    torch.save({"model": STATE, "ema": EMA}, tmp_path / "last.ckpt")
    source = read(tmp_path, "ema")
    assert (source.name, same(source, EMA)) == ("last.ema", True)
    assert same(read(tmp_path, "last.model"), STATE)
    assert same(read(tmp_path, "last"), STATE)
    assert same(read(tmp_path), STATE)


def test_a_file_by_its_name(tmp_path):
    torch.save(STATE, tmp_path / "first.pt")
    torch.save({"model": EMA, "optimizer": {}}, tmp_path / "second.pt")
    assert same(read(tmp_path, "first"), STATE)
    assert same(read(tmp_path, "second"), EMA)
    with pytest.raises(StabilityProbeError, match="'model' fits 'first', 'second'"):
        read(tmp_path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: (p / "config.json").write_text("{}")])
def test_rejects_a_folder_without_weights(tmp_path, make):
    make(tmp_path)
    with pytest.raises(
        StabilityProbeError, match="has no weights in it, nor a unet or transformer"
    ):
        read(tmp_path)


# ── diffusers ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def model():
    return diffusers_unet()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}, {"safe_serialization": False},
                                     {"variant": "fp16"}], ids=str)  # fmt: skip
def test_a_model_folder(tmp_path, model, options):
    model.save_pretrained(tmp_path, **options)
    source = read(tmp_path)
    assert (source.format, source.folder) == ("diffusers", tmp_path)
    assert source.config["_class_name"] == "UNet2DModel"
    assert same(source, model.state_dict())


def test_a_variant_beside_the_model(tmp_path, model):
    model.save_pretrained(tmp_path)
    diffusers_unet(seed=1).half().save_pretrained(tmp_path, variant="fp16")
    assert same(read(tmp_path), model.state_dict())
    half = read(tmp_path, f"{DIFFUSERS}.fp16")
    assert half.name == f"{DIFFUSERS}.fp16"
    assert same(half, diffusers_unet(seed=1).half().state_dict())


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_the_denoiser_of_a_pipeline(tmp_path, model, part):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    model.save_pretrained(tmp_path / part)
    source = read(tmp_path)
    assert source.folder == tmp_path / part
    assert same(source, model.state_dict())


def test_averages_in_a_folder_beside_it(tmp_path, model):
    model.save_pretrained(tmp_path / "unet")
    diffusers_unet(seed=1).save_pretrained(tmp_path / "unet_ema")
    assert same(read(tmp_path), model.state_dict())
    source = read(tmp_path, "ema")
    assert source.folder == tmp_path / "unet_ema"
    assert same(source, diffusers_unet(seed=1).state_dict())


def test_rejects_averages_that_are_not_there(tmp_path, model):
    model.save_pretrained(tmp_path / "unet")
    with pytest.raises(StabilityProbeError, match=f"'ema' is not in it; found '{DIFFUSERS}'"):
        read(tmp_path, "ema")


def test_rejects_parts_of_which_one_is_damaged(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    max(tmp_path.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(StabilityProbeError, match=r"-of-00006.safetensors: is empty"):
        read(tmp_path)


def test_a_part_that_an_index_omits_is_missed(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    (index,) = tmp_path.glob("*.index.json")
    table = json.loads(index.read_text())
    last = max(table["weight_map"].values())
    table["weight_map"] = {k: v for k, v in table["weight_map"].items() if v != last}
    index.write_text(json.dumps(table))
    assert read(tmp_path).weights.keys() < model.state_dict().keys()


@pytest.mark.parametrize("text", ["[]", "{", "", "3"])
def test_rejects_a_damaged_configuration(tmp_path, model, text):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        StabilityProbeError, match=r"config.json: (cannot be read as JSON|a JSON ob)"
    ):
        read(tmp_path)


def test_a_configuration_of_another_library_is_left_aside(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["Something"]}')
    source = read(tmp_path)
    assert (source.format, source.folder, source.config) == ("safetensors", None, {})


def test_rejects_a_pipeline_inside_itself(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "unet").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(
        StabilityProbeError, match=r"has no weights in it|cannot be read as"
    ) as error:
        read(tmp_path)
    assert_one_line(str(error.value))


def test_a_configuration_that_is_a_pipe_is_not_waited_for(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert same(read(tmp_path), STATE)


def test_rejects_a_folder_of_a_tar(tmp_path):
    save_tar(STATE, tmp_path / "pytorch_model.bin")
    with pytest.raises(StabilityProbeError, match=r"pytorch_model.bin: the tar format of torch"):
        read(tmp_path)
