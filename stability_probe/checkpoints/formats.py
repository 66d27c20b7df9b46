"""What kind of checkpoint a path is, told by its content; the name of a file proves nothing.

    zip archive         torch.save (since 1.6), torch.export, TorchScript: told by their members
    8 bytes of length, then "{"   safetensors
    header of a tar     torch.save before 0.1.10
    0x80                a pickle: torch.save before 1.6, or pickle.dump

An archive is checked before any decoder sees it: its members must be stored as they are, together
in no more bytes than the file has, each with the checksum that it was stored with (`torch.load`
does not look at those).
"""

import tarfile
import zipfile
from enum import Enum
from pathlib import Path

from stability_probe.checkpoints.reading import listed, problem, reading

EXPECTED = (
    "expected a diffusers model folder, a folder or file of weights (.safetensors, .pt, .pth, "
    ".ckpt, .bin) or a torch.export archive (.pt2)"
)
_CHUNK = 2**20
_HEAD = 512


class Kind(Enum):
    """Kinds of checkpoint."""

    FOLDER = "folder"
    SAFETENSORS = "safetensors"
    TORCH = "torch"
    PICKLE = "legacy torch"
    TAR = "legacy torch tar"
    EXPORT = "torch.export"


def kind_of(path: Path) -> Kind:
    """The kind of a checkpoint.

    Raises:
        StabilityProbeError: if there is nothing at the path, or nothing that a model can come from.
    """
    with reading(path, "a checkpoint", EXPECTED):
        if not path.exists():
            raise problem(path, f"does not exist; {EXPECTED}")
        if path.is_dir():
            return Kind.FOLDER
        if not path.is_file():
            raise problem(path, f"neither a file nor a folder; {EXPECTED}")
        with path.open("rb") as file:
            head = file.read(_HEAD)
        return _kind_of_file(path, head)


def _kind_of_file(path: Path, head: bytes) -> Kind:
    if not head:
        raise problem(path, f"is empty (0 bytes); {EXPECTED}")
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return Kind.SAFETENSORS  # before pickles: the length may start with 0x80
    if _is_tar(head):  # before pickles: the name of its first member may start with 0x80
        return Kind.TAR
    if head.startswith(b"\x80"):
        return Kind.PICKLE
    if head.startswith(b"version https://git-lfs"):
        raise problem(path, "is a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    raise problem(path, f"starts with {head[:8].hex(' ')}, which is no known format; {EXPECTED}")


def _is_tar(head: bytes) -> bool:
    """Whether `torch.load` would take this for the header of a tar, whose tensors are pickles."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _kind_of_zip(path: Path) -> Kind:
    """The kind of an archive that is sound."""
    with reading(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] or name for name in archive.namelist()]
        if "constants.pkl" in names:
            raise problem(
                path,
                "is a TorchScript archive, whose graph has no modules to hook; "
                "save model.state_dict() of the Python model",
            )
        _check_archive(path, archive)
    if "data.pkl" in names:
        return Kind.TORCH
    if {"archive_format", "serialized_exported_program.json"} & set(names):
        return Kind.EXPORT
    raise problem(path, f"a zip archive of neither torch.save nor torch.export; {EXPECTED}")


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse archives that would unpack to more than they are, and damaged ones."""
    members = archive.infolist()
    packed = [info.filename for info in members if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise problem(path, f"its members {listed(packed)} are compressed, and torch stores them "
                      "as they are; unpack it and pack it again without compression")  # fmt: skip
    size, unpacked = path.stat().st_size, sum(info.file_size for info in members)
    if unpacked > size:
        raise problem(path, f"has {size} bytes and claims to unpack to {unpacked}; it is damaged "
                      "or not of torch's making")  # fmt: skip
    for info in members:
        if info.CRC:  # 0: written with torch.serialization.set_crc32_options(False)
            with archive.open(info) as member:
                while member.read(_CHUNK):
                    pass
