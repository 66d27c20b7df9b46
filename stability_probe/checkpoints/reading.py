"""One boundary around the libraries that decode files.

A damaged file makes them raise whatever their insides happen to raise: `KeyError`, `struct.error`,
`AttributeError`. Inside `reading`, each of these becomes the one error of the package, on one line.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stability_probe.errors import StabilityProbeError

_LONGEST = 200
LARGEST_JSON = 2**26
"""Bytes; the index of a model with a million tensors is about this long."""


def problem(path: Path, text: str) -> StabilityProbeError:
    """An error about a file, on one line of printable characters whatever the names in it hold.

    >>> print(problem(Path("a.pt"), "is \x1b[31mdamaged"))
    a.pt: is \\x1b[31mdamaged
    """
    line = " ".join(f"{path}: {text}".split())
    return StabilityProbeError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def brief(error: BaseException) -> str:
    """An exception's class and the start of its message, on one line.

    >>> brief(KeyError("a"))
    "KeyError: 'a'"
    """
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def listed(names: list[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are.

    >>> listed(["a", "b", "c", "d"], most=2)
    "'a', 'b' and 2 more"
    """
    shown = ", ".join(repr(brief_name(name)) for name in names[:most])
    more = len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def brief_name(name: str) -> str:
    """A name, cut if it is too long to print.

    >>> brief_name("x" * 500)[-3:]
    'xx…'
    """
    return name if len(name) <= _LONGEST // 2 else name[: _LONGEST // 2] + "…"


@contextmanager
def reading(
    path: Path, what: str, remedy: str = "it is damaged or of another kind; make it again"
) -> Iterator[None]:
    """Turn any exception of a decoder into a `StabilityProbeError`; ours pass as they are.

    Raises:
        StabilityProbeError: naming the file, `what` was expected, the exception and the `remedy`.
    """
    try:
        yield
    except StabilityProbeError:
        raise
    except Exception as error:
        raise problem(path, f"cannot be read as {what} ({brief(error)}); {remedy}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StabilityProbeError: if the file is something else.
    """
    with reading(path, "JSON"):
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise problem(path, f"JSON of at most {LARGEST_JSON} bytes is read, got {size}")
        value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise problem(path, f"a JSON object is needed, got {type(value).__name__}")
    return value
