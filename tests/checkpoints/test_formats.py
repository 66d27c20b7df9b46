import bz2
import io
import lzma
import os
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.formats import Kind, kind_of
from tests.checkpoints.mutations import assert_one_line
from tests.checkpoints.saved_files import (
    pack_again,
    save_export,
    save_legacy,
    save_plain,
    save_tar,
)

STATE = {"w": torch.arange(100.0)}


def write(path, data):
    path.write_bytes(data)
    return path


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (torch.save, Kind.TORCH),
        (save_legacy, Kind.PICKLE),
        (save_plain, Kind.PICKLE),
        (save_tar, Kind.TAR),
        (save_file, Kind.SAFETENSORS),
    ],
)
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net"])
def test_the_content_tells_and_not_the_name(tmp_path, save, kind, name):
    save(STATE, tmp_path / name)
    assert kind_of(tmp_path / name) is kind


def test_safetensors_whatever_their_length_starts_with(tmp_path):
    """A header of 128 bytes starts as pickles do."""
    lengths = set()
    for n in range(100):
        save_file({"w" * (n + 1): torch.zeros(1)}, tmp_path / "net.safetensors")
        lengths.add((tmp_path / "net.safetensors").read_bytes()[0])
        assert kind_of(tmp_path / "net.safetensors") is Kind.SAFETENSORS
    assert 0x80 in lengths


def test_folders_links_and_exports(tmp_path):
    assert kind_of(tmp_path) is Kind.FOLDER
    assert kind_of(save_export(tmp_path)) is Kind.EXPORT
    (tmp_path / "link").symlink_to(tmp_path / "net.pt2")
    assert kind_of(tmp_path / "link") is Kind.EXPORT


def test_a_tar_whose_first_name_looks_like_a_pickle(tmp_path):
    path = tmp_path / "net.pt"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("\x80\x02}."))
    assert path.read_bytes()[0] == 0x80
    assert kind_of(path) is Kind.TAR


def test_an_ancient_tar_without_its_magic(tmp_path):
    save_tar(STATE, tmp_path / "net.pt")
    data = bytearray((tmp_path / "net.pt").read_bytes())
    data[257:265] = bytes(8)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    write(tmp_path / "net.pt", bytes(data))
    assert tarfile.is_tarfile(tmp_path / "net.pt")
    assert kind_of(tmp_path / "net.pt") is Kind.TAR


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


def test_rejects_a_missing_path(tmp_path):
    with pytest.raises(
        StabilityProbeError, match=r"no: does not exist; expected a diffusers model"
    ):
        kind_of(tmp_path / "no")


def test_rejects_what_is_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer
    with pytest.raises(StabilityProbeError, match="fifo: neither a file nor a folder; expected"):
        kind_of(tmp_path / "fifo")


@pytest.mark.parametrize("name", ["x" * 300, "x\0", "\udcff"], ids=["long", "nul", "encoding"])
def test_rejects_a_path_that_cannot_be(tmp_path, name):
    with pytest.raises(
        StabilityProbeError, match=r"cannot be read as a checkpoint|does not ex"
    ) as e:
        kind_of(tmp_path / name)
    assert_one_line(str(e.value))


def test_rejects_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StabilityProbeError, match=r"a: (does not exist|cannot be read)"):
        kind_of(tmp_path / "a")


def test_rejects_an_empty_file(tmp_path):
    with pytest.raises(StabilityProbeError, match=r"is empty \(0 bytes\); expected"):
        kind_of(write(tmp_path / "a.pt", b""))


@pytest.mark.parametrize(
    "data",
    [b"\x89PNG\r\n\x1a\n", b"hello", b"\0" * 600, b"(dp0\n.", b"\xff" * 8 + b"{}", b"{}", b"P"],
)
def test_rejects_what_is_no_known_format(tmp_path, data):
    with pytest.raises(StabilityProbeError, match=r"starts with [0-9a-f ]+, which is no known for"):
        kind_of(write(tmp_path / "a.pt", data))


def test_rejects_a_pointer_in_place_of_the_file(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    with pytest.raises(
        StabilityProbeError, match=r"is a Git LFS pointer, .*; fetch it with git lfs"
    ):
        kind_of(write(tmp_path / "a.safetensors", pointer))


# ── archives ─────────────────────────────────────────────────────────────────────────────────────


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_rejects_torchscript(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "net.pt")
    with pytest.raises(
        StabilityProbeError, match=r"is a TorchScript archive, .* save model.state_d"
    ):
        kind_of(tmp_path / "net.pt")


@pytest.mark.parametrize("members", [{"a.txt": b"x"}, {"[Content_Types].xml": b"<x/>"}])
def test_rejects_another_archive(tmp_path, members):
    with pytest.raises(
        StabilityProbeError, match=r"a zip archive of neither torch.save nor torch.e"
    ):
        kind_of(archive(tmp_path / "a.pt", members))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rejects_compressed_members_unread(tmp_path, compression, monkeypatch):
    torch.save(STATE, tmp_path / "net.pt")
    pack_again(tmp_path / "net.pt", {}, compression)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("was read"))
    with pytest.raises(
        StabilityProbeError, match=r"'net/data.pkl', .* and \d more are compressed, and torch st"
    ):
        kind_of(tmp_path / "net.pt")


@pytest.mark.parametrize("packer", [bz2, lzma], ids=["bz2", "lzma"])
def test_a_bomb_does_not_go_off(tmp_path, packer):
    method = {bz2: zipfile.ZIP_BZIP2, lzma: zipfile.ZIP_LZMA}[packer]
    path = archive(tmp_path / "net.pt", {"net/data.pkl": bytes(2**24)}, method)
    assert path.stat().st_size < 2**14
    with pytest.raises(StabilityProbeError, match="are compressed"):
        kind_of(path)


def test_rejects_members_that_overlap(tmp_path):
    path = archive(tmp_path / "net.pt", {"net/data.pkl": bytes(1000), "net/b": b""})
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("net/data.pkl")
        for i in range(3):  # three more entries of the directory for the same bytes
            again = zipfile.ZipInfo(f"net/{i}")
            for name in ("file_size", "compress_size", "header_offset", "CRC"):
                setattr(again, name, getattr(first, name))
            file.filelist.append(again)
        file._didModify = True
    with pytest.raises(StabilityProbeError, match=r"has \d+ bytes and claims to unpack to 4000; "):
        kind_of(path)


def flipped(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    return write(path, bytes(data))


def test_rejects_a_member_with_another_checksum(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(STATE, path)
    inside = path.read_bytes().index(STATE["w"].numpy().tobytes()) + 7
    assert not torch.load(flipped(path, inside))["w"].equal(STATE["w"])  # torch does not look
    with pytest.raises(StabilityProbeError, match=r"as a zip archive \(BadZipFile: Bad CRC-32 for"):
        kind_of(path)


def test_archives_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "net.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert {i.CRC for i in zipfile.ZipFile(tmp_path / "net.pt").infolist()} == {0}
    assert kind_of(tmp_path / "net.pt") is Kind.TORCH


def test_rejects_an_encrypted_member(tmp_path):
    data = io.BytesIO()
    archive(data, {"net/data.pkl": b"abc"})
    raw = bytearray(data.getvalue())
    raw[6] |= 1  # "encrypted", in the member's header and in the directory
    raw[raw.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(StabilityProbeError, match=r"as a zip archive .RuntimeError.*encrypted"):
        kind_of(write(tmp_path / "net.pt", bytes(raw)))


@pytest.mark.parametrize("keep", [4, 100, -1, -30])
def test_rejects_a_truncated_archive(tmp_path, keep):
    torch.save(STATE, tmp_path / "net.pt")
    write(tmp_path / "net.pt", (tmp_path / "net.pt").read_bytes()[:keep])
    with pytest.raises(StabilityProbeError, match=r"cannot be read as a zip archive .BadZipFile"):
        kind_of(tmp_path / "net.pt")
