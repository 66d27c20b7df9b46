"""Files of `torch.save`, and the line between data and code.

A pickle is a program: reading it as Python does runs whatever its author wrote. PyTorch's
`weights_only=True` reads tensors and containers alone and runs nothing; all files are read so, once
`opcodes` has found nothing in them that would take forever. One that needs more is refused with the
names it asked for, unless the user trusts it.
"""

import mmap
import pickle
import pickletools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stability_probe.checkpoints.formats import Kind
from stability_probe.checkpoints.opcodes import Instruction, check_pickle, names_in
from stability_probe.checkpoints.reading import listed, problem, reading
from stability_probe.errors import StabilityProbeError

TRUST = "if you trust its author, pass --trust-pickle (trust_pickle=True)"
_PICKLES_IN_A_LEGACY_FILE = 5
_OF_TENSORS = re.compile(
    r"torch\.\w+|torch\._(utils|tensor)\.\w+|collections\.(OrderedDict|Counter)"
    r"|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
)


def read_pickle(path: Path, kind: Kind, trust: bool) -> Any:
    """What a file of `torch.save` holds, on the CPU.

    Warns:
        UserWarning: if the file is trusted, as reading it then runs code from it.

    Raises:
        StabilityProbeError: if the file is damaged, or needs trust and has none.
    """
    if trust:
        warn_of_code(path)
        with reading(path, "a file of torch.save"):
            return _load_all(path, kind)
    if kind is Kind.TAR:
        raise problem(path, f"the tar format of torch before 0.1.10 runs code when read; {TRUST}")
    try:
        with reading(path, "a file of torch.save"):
            return _load_weights(path, kind)
    except StabilityProbeError as error:
        names = _refused(path, kind, error.__cause__)
        if not names:
            raise
        raise problem(path, f"its pickle needs more than tensors: {listed(names)}; "
                      f"reading it runs code from the file; {TRUST}") from error  # fmt: skip


def warn_of_code(path: Path) -> None:
    """Say that a trusted file is about to be read."""
    warnings.warn(f"{path}: trusted, and reading it runs code from the file", stacklevel=3)


def _load_all(path: Path, kind: Kind) -> Any:
    """Everything in a trusted file, which `pickle.dump` may have written too."""
    if kind is Kind.PICKLE:
        with path.open("rb") as file:
            first = pickle.load(file)
        if first != torch.serialization.MAGIC_NUMBER:
            return first
    return torch.load(path, map_location="cpu", weights_only=False)


def _load_weights(path: Path, kind: Kind) -> Any:
    """`torch.load` of tensors alone; of its page-long refusal the reason is kept.

    An archive is mapped: a tensor that claims more than the file has then finds its end, where some
    versions of torch read on in the memory behind it.
    """
    with _pickles(path, kind) as pickles:
        for instructions in pickles:
            check_pickle(path, instructions)
    try:
        with (
            warnings.catch_warnings()
        ):  # of another protocol, which the refusal that follows covers
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind is Kind.TORCH)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        raise pickle.UnpicklingError(reason.partition("Check the documentation")[0]) from error


def _refused(path: Path, kind: Kind, error: BaseException | None) -> list[str]:
    """Names that a file asked for and was refused; none if that was not its fault."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    named = re.findall(r"GLOBAL ([\w.]+)", str(error))
    with _pickles(path, kind) as pickles:  # as they were checked, they can be listed
        for instructions in pickles:
            named += [name for name in names_in(instructions) if not _OF_TENSORS.fullmatch(name)]
    return list(dict.fromkeys(named))


@contextmanager
def _pickles(path: Path, kind: Kind) -> Iterator[Iterator[Iterator[Instruction]]]:
    """The instructions of each pickle in a file; one must be read for the next to be found."""
    if kind is Kind.TORCH:
        archive = torch._C.PyTorchFileReader(str(path))  # finds what torch.load would
        yield iter([pickletools.genops(archive.get_record("data.pkl"))])
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        starts = range(_PICKLES_IN_A_LEGACY_FILE)
        stream: Any = view  # pickletools declares less than it takes
        yield (pickletools.genops(stream) for _ in starts if view.tell() < len(view))
