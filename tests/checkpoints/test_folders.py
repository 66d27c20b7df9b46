import json
import os

import diffusers
import pytest
import torch

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.folders import (
    LARGEST_SETTING,
    diffusers_builder,
    diffusers_class,
    part_of,
    weight_files,
)
from tests.checkpoints.mutations import assert_one_line
from tests.checkpoints.saved_files import diffusers_unet


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder):
    """name -> names of its files."""
    return {name: [f.name for f in files] for name, files in weight_files(folder).items()}


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def test_files_by_name(tmp_path):
    touch(tmp_path, "nnet.pth", "nnet_ema.pth", "config.json", "README.md", "sub/model.pt")
    assert found(tmp_path) == {"nnet": ["nnet.pth"], "nnet_ema": ["nnet_ema.pth"]}


def test_the_state_of_training_is_left_aside(tmp_path):
    touch(
        tmp_path, "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl",
        "scaler.pt", "sampler.bin", "lr_scheduler.pth",
    )  # fmt: skip
    assert found(tmp_path) == {"model": ["model.safetensors"]}


def test_safetensors_before_pickles_of_the_same_name(tmp_path):
    touch(tmp_path, "model.bin", "model.safetensors", "other.pt", "other.bin")
    assert found(tmp_path) == {"model": ["model.safetensors"], "other": ["other.bin"]}


def test_variants_have_names_of_their_own(tmp_path):
    stem = "diffusion_pytorch_model"
    touch(tmp_path, f"{stem}.safetensors", f"{stem}.fp16.safetensors")
    assert found(tmp_path) == {
        stem: [f"{stem}.safetensors"],
        f"{stem}.fp16": [f"{stem}.fp16.safetensors"],
    }


@pytest.mark.parametrize(
    ("index", "shard", "name"),
    [
        ("model.safetensors.index.json", "model-0000{}-of-00002.safetensors", "model"),
        ("model.bin.index.json", "model-0000{}-of-00002.bin", "model"),
        ("m.safetensors.index.fp16.json", "m.fp16-0000{}-of-00002.safetensors", "m.fp16"),
        ("m.safetensors.index.fp16.json", "m-0000{}-of-00002.fp16.safetensors", "m.fp16"),
    ],
)
def test_the_parts_that_an_index_lists(tmp_path, index, shard, name):
    parts = [shard.format(i) for i in (1, 2)]
    touch(tmp_path, *parts)
    write_index(tmp_path, {"c": parts[1], "a": parts[0], "b": parts[1]}, index)
    assert found(tmp_path) == {name: [parts[1], parts[0]]}


def test_what_diffusers_really_writes(tmp_path):
    diffusers_unet().save_pretrained(tmp_path, max_shard_size="8KB", variant="fp16")
    (files,) = weight_files(tmp_path).values()
    assert len(files) > 1
    assert set(files) == set(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, {"w": 3}, {"w": "a/b"}, {"w": "/etc/passwd"}, {"w": "../up.bin"}]
)
def test_rejects_an_index_that_leads_elsewhere(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(
        StabilityProbeError, match=r"index.json: weight_map must give a file of the same folder"
    ):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["missing.bin", "..", "", "sub", "a\0b", "x" * 5000])
def test_rejects_an_index_of_files_that_are_not_there(tmp_path, name):
    touch(tmp_path, "sub/file", "here.bin")
    write_index(tmp_path, {"a": "here.bin", "b": name})
    with pytest.raises(StabilityProbeError, match=r"index.json: (lists|cannot be read)") as error:
        weight_files(tmp_path)
    assert_one_line(str(error.value))


def test_rejects_a_damaged_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(StabilityProbeError, match=r"index.json: cannot be read as JSON"):
        weight_files(tmp_path)


def test_rejects_what_is_no_folder(tmp_path):
    with pytest.raises(StabilityProbeError, match="missing: cannot be read as a folder"):
        weight_files(tmp_path / "missing")


def test_what_is_neither_file_nor_link_to_one_is_left_aside(tmp_path):
    touch(tmp_path, "real.pt")
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    assert found(tmp_path) == {"real": ["real.pt"], "link": ["link.pt"]}


# ── parts of a pipeline ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("there", "ema", "name"),
    [
        (["unet", "vae"], False, "unet"),
        (["transformer"], False, "transformer"),
        (["unet", "unet_ema"], False, "unet"),
        (["unet", "unet_ema"], True, "unet_ema"),
        (["unet"], True, None),
        (["vae"], False, None),
        ([], False, None),
    ],
)
def test_the_denoiser_of_a_pipeline(tmp_path, there, ema, name):
    touch(tmp_path, *[f"{part}/config.json" for part in there])
    part = part_of(tmp_path, ema)
    assert (part and part.name) == name


def test_a_folder_without_a_configuration_is_no_part(tmp_path):
    touch(tmp_path, "unet/model.safetensors")
    assert part_of(tmp_path, ema=False) is None


def test_rejects_several_denoisers(tmp_path):
    touch(tmp_path, "unet/config.json", "transformer/config.json")
    with pytest.raises(StabilityProbeError, match="has 'unet', 'transformer'; give one of these"):
        part_of(tmp_path, ema=False)


def test_rejects_a_path_that_is_too_long(tmp_path):
    with pytest.raises(StabilityProbeError, match=r"cannot be read as a folder .OSError") as error:
        part_of(tmp_path / ("x" * 300), ema=False)
    assert_one_line(str(error.value))


# ── classes of diffusers ─────────────────────────────────────────────────────────────────────────


def test_the_class_and_the_model(tmp_path):
    config = json.loads(diffusers_unet().to_json_string())
    assert diffusers_class(tmp_path, config) is diffusers.UNet2DModel
    model = diffusers_builder(tmp_path, config)()
    assert model.config.block_out_channels == [4, 8]


@pytest.mark.parametrize(
    "name",
    ["NoSuchModel", "__class__", "DDPMScheduler", "StableDiffusionPipeline", "__doc__", "", "utils",
     "\x1b[31m", "a\nb", 3, None, ["UNet2DModel"]],
    ids=repr,
)  # fmt: skip
def test_rejects_what_is_no_model_of_diffusers(tmp_path, name):
    with pytest.raises(
        StabilityProbeError, match=r"config.json: _class_name must be a model of diffusers \d"
    ) as error:
        diffusers_class(tmp_path, {"_class_name": name})
    assert_one_line(str(error.value))


def test_rejects_a_class_that_cannot_be_imported(tmp_path, monkeypatch):
    def fail(name):
        raise RuntimeError(f"Failed to import diffusers.{name}\nbecause of something")

    monkeypatch.setattr(diffusers, "__getattr__", fail, raising=False)
    with pytest.raises(StabilityProbeError, match=r"a model's configuration .RuntimeError: Failed"):
        diffusers_class(tmp_path, {"_class_name": "SomeModelThatIsNotThere"})


@pytest.mark.parametrize("value", [LARGEST_SETTING + 1, -(10**30), [1, [2**40]], {"a": [2**40]}])
def test_rejects_absurd_settings(tmp_path, value):
    config = {"_class_name": "UNet2DModel", "sample_size": value}
    with pytest.raises(
        StabilityProbeError, match=r"config.json: 'sample_size' holds a number above 16777216; dam"
    ):
        diffusers_class(tmp_path, config)


def test_the_largest_setting_is_not_absurd(tmp_path):
    diffusers_class(tmp_path, {"_class_name": "UNet2DModel", "sample_size": [LARGEST_SETTING]})


def test_rejects_a_nest_that_is_too_deep(tmp_path):
    nest = 1
    for _ in range(2000):
        nest = [nest]
    with pytest.raises(StabilityProbeError, match=r"a model's configuration .RecursionError"):
        diffusers_class(tmp_path, {"_class_name": "UNet2DModel", "sample_size": nest})


def test_building_draws_nothing_from_the_network(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("opened a socket"))
    config = {"_class_name": "UNet2DModel", "_name_or_path": "someone/some-model",
              "block_out_channels": [32], "down_block_types": ["DownBlock2D"],
              "up_block_types": ["UpBlock2D"]}  # fmt: skip
    with torch.device("meta"):
        assert diffusers_builder(tmp_path, config)().config.block_out_channels == [32]
