"""Archives of `torch.export`.

Reading one runs code wherever its author wants it to: constants go through `pickle`, example inputs
fall back to it, symbolic sizes are evaluated as Python by sympy, operators may be any function in
`torch`, and compiled libraries may lie inside. None of this can be switched off, so an archive is
read when the user trusts it and not otherwise.
"""

import importlib
import inspect
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from stability_probe.checkpoints.pickles import TRUST, warn_of_code
from stability_probe.checkpoints.reading import problem, reading


def read_export(path: Path, trust: bool) -> nn.Module:
    """The module in an archive, with its hierarchy; the names of its classes are lost.

    What the program was exported for is known to the module: its `forward` has the names of the
    arguments, `input_shape` is the shape of one x_t, and `batch_size` the only size of a batch that
    it takes, or `None`.

    Warns:
        UserWarning: as reading it runs code from the file.

    Raises:
        StabilityProbeError: if the archive is damaged, or not trusted.
    """
    if not trust:
        raise problem(path, f"reading a torch.export archive can run code from the file; {TRUST}")
    warn_of_code(path)
    with reading(path, "a torch.export archive"), _quiet("torch.export"):
        _import_outputs(path)
        program = torch.export.load(path)
        module = torch.export.unflatten(program)
        _describe(module, program)
        return module


def _import_outputs(path: Path) -> None:
    """Import the classes of structured outputs, which have to be known before the archive is read.

    One that is not installed is left to the reader of the archive to name.
    """
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    for name in set(re.findall(rb'\\"type\\": \\"([\w.]+)\.\w+\\"', b"".join(texts))):
        with suppress(ImportError):
            importlib.import_module(name.decode())


def _describe(module: Any, program: ExportedProgram) -> None:
    """Note on a module what it was exported for, where its inputs are plain tensors."""
    inputs = {
        node.name: node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    }
    signature = program.module_call_graph[0].signature
    names = (signature.forward_arg_names if signature else None) or []
    if len(names) != len(inputs) or not all(isinstance(v, torch.Tensor) for v in inputs.values()):
        return
    x = next(iter(inputs.values()))
    module.input_shape = tuple(map(int, x.shape[1:]))
    module.batch_size = x.shape[0] if isinstance(x.shape[0], int) else None
    whole = {n: not v.is_floating_point() for n, v in zip(names, inputs.values(), strict=True)}
    module.forward = _Named(module.forward, whole)


class _Named:
    """A `forward` that takes its arguments by name as well as in order.

    Its signature says which of them are whole numbers.
    """

    def __init__(self, forward: Any, whole: dict[str, bool]) -> None:
        self.forward = forward
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        kinds = {True: torch.LongTensor, False: torch.Tensor}
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(n, kind, annotation=kinds[w]) for n, w in whole.items()]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        return self.forward(*bound.args)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger's warnings back: what they tell of is in the error that follows."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
