"""Damage to files, drawn by hypothesis, and what a program may do about it.

@given(damage=damages)
def test_...(damage):
    with damaged(file, damage):
        explains(lambda: load_checkpoint(path))
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from stability_probe import StabilityProbeError

MOST_MEMORY = 2**28
"""Bytes that reading a small damaged file may cost at its peak."""
_PIECES = (b"\0" * 16, b"\xff" * 16, b"9" * 16, b"[" * 2000, b'"', b"\n", b"-", b"e9", b"PK\3\4")


@dataclass(frozen=True)
class Damage:
    """What happens to a file.

    Attributes:
        kind: "truncate", "flip" (one bit), "overwrite", "insert" or "cut".
        at: where, modulo its length, so that negative numbers count from the end.
        bit: which bit to flip.
        piece: what to write.
        length: how much to cut out.
    """

    kind: str
    at: int
    bit: int = 0
    piece: bytes = b""
    length: int = 0


# The structure of a file is at its ends, the numbers in between.
_PLACES = st.integers(0, 300) | st.integers(-300, -1) | st.integers(0, 2**17)
damages = st.one_of(
    st.builds(Damage, st.just("flip"), _PLACES, bit=st.integers(0, 7)),
    st.builds(Damage, st.just("truncate"), _PLACES),
    st.builds(Damage, st.sampled_from(["overwrite", "insert"]), _PLACES,
              piece=st.sampled_from(_PIECES) | st.binary(min_size=1, max_size=8)),
    st.builds(Damage, st.just("cut"), _PLACES, length=st.integers(1, 64)),
)  # fmt: skip


def mutate(data: bytes, damage: Damage) -> bytes:
    """The bytes of a file after damage to it."""
    at = damage.at % len(data)
    head, tail = data[:at], data[at:]
    if damage.kind == "truncate":
        return head
    if damage.kind == "flip":
        return head + bytes([tail[0] ^ (1 << damage.bit)]) + tail[1:]
    if damage.kind == "cut":
        return head + tail[damage.length :]
    covered = len(damage.piece) if damage.kind == "overwrite" else 0
    return head + damage.piece + tail[covered:]


@contextmanager
def damaged(file: Path, damage: Damage) -> Iterator[None]:
    """Damage a file for a while."""
    sound = file.read_bytes()
    file.write_bytes(mutate(sound, damage))
    try:
        yield
    finally:
        file.write_bytes(sound)


def assert_one_line(message: str) -> None:
    """A message for people: one printable line that is not too long."""
    assert re.fullmatch(r"[^\n\r]{10,2000}", message) and message.isprintable(), message


def explains(load: Callable[[], object]) -> str | None:
    """Load; return the message of the error, or `None` if there was none.

    Any other exception passes; a message that is no single line, or a peak of memory, fails.
    """
    before = _restart_peak()
    try:
        load()
    except StabilityProbeError as error:
        message = str(error)
        assert_one_line(message)
    else:
        message = None
    assert _peak_memory() - before < MOST_MEMORY
    return message


PEAK_IS_KNOWN = Path("/proc/self/clear_refs").exists()  # on Linux


def _restart_peak() -> int:
    """Forget the peak of memory up to now; return the bytes in use."""
    if PEAK_IS_KNOWN:
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> int:
    if not PEAK_IS_KNOWN:
        return 0
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
