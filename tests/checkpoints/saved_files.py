"""Small checkpoints of every format, made by the libraries that users make them with."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file
from torch import nn

from stability_probe import UViT, UViTConfig

UVIT = UViTConfig(embed_dim=12, depth=5, num_heads=1)
FACTORY = "tests.checkpoints.saved_files:ConvUNet"


class ConvUNet(nn.Module):
    """A convolutional UNet with one long skip, concatenated."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inp = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.out = nn.Sequential(nn.BatchNorm2d(2 * width), nn.Conv2d(2 * width, 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.inp(x).relu()
        return self.out(torch.cat([self.up(self.down(skip).relu()), skip], dim=1))


def conv_unet(width=4, seed=0):
    """A ConvUNet whose buffers have moved from their start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ConvUNet(width)
        net(torch.randn(4, 1, 8, 8))
    return net.eval()


def diffusers_unet(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=2,
            block_out_channels=(4, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip


class Canary:
    """An object whose pickle makes a file when it is read as Python reads pickles."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


class Cage(nn.Module):
    """A module that holds something."""

    def __init__(self, held) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.held = held


def save_plain(saved, path):
    path.write_bytes(pickle.dumps(saved, protocol=2))


def save_legacy(saved, path):
    torch.save(saved, path, _use_new_zipfile_serialization=False)


def save_tar(saved, path):
    """The tar format that torch wrote before 0.1.10, to the extent that it is recognised."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        data = pickle.dumps(saved, protocol=2)
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def save_export(folder: Path) -> Path:
    net = conv_unet()
    torch.export.save(torch.export.export(net, (torch.randn(1, 1, 8, 8),)), folder / "net.pt2")
    return folder / "net.pt2"


def pack_again(path: Path, members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    """Write an archive anew, with other contents of some members; their checksums are right."""
    with zipfile.ZipFile(path) as archive:
        old = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in old.items():
            archive.writestr(name, members.get(name.partition("/")[2], data))
    return path


def save_program(program: bytes, path: Path) -> Path:
    """A file of torch.save whose pickle has these instructions."""
    torch.save({"w": torch.zeros(1)}, path)
    return pack_again(path, {"data.pkl": program})


def every_format(folder: Path) -> dict[str, tuple[Path, dict]]:
    """A sound checkpoint of each format: name -> (path, options of `load_checkpoint`)."""
    unet = {"factory": FACTORY}
    state, uvit = conv_unet().state_dict(), UViT(UVIT).state_dict()
    diffusers_unet().save_pretrained(folder / "diffusers")
    diffusers_unet().save_pretrained(folder / "sharded", max_shard_size="8KB")
    diffusers_unet().save_pretrained(folder / "bin", safe_serialization=False)
    save_file(state, folder / "net.safetensors")
    torch.save({"step": 3, "model": state}, folder / "net.pt")
    save_legacy({"step": 3, "model": state}, folder / "legacy.pth")
    torch.save(uvit, folder / "uvit.pth")
    (folder / "accelerate").mkdir()
    save_file(state, folder / "accelerate" / "model.safetensors")
    torch.save(conv_unet(seed=1).state_dict(), folder / "accelerate" / "ema.bin")
    return {
        "diffusers": (folder / "diffusers", {}),
        "sharded": (folder / "sharded", {}),
        "bin": (folder / "bin", {}),
        "safetensors": (folder / "net.safetensors", unet),
        "torch": (folder / "net.pt", unet),
        "legacy": (folder / "legacy.pth", unet),
        "uvit": (folder / "uvit.pth", {}),
        "accelerate": (folder / "accelerate", unet),
        "averaged": (folder / "accelerate", unet | {"weights": "ema"}),
        "export": (save_export(folder), {"trust_pickle": True}),
    }


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint consists of."""
    return sorted(path.iterdir()) if path.is_dir() else [path]
