import io
import pickle
import pickletools
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.opcodes import LARGEST_TUPLE, check_pickle, names_in
from tests.checkpoints.mutations import assert_one_line

PATH = Path("net.pt")


def check(program):
    check_pickle(PATH, pickletools.genops(program))


def doubled(n):
    """A tuple of two references to a tuple of two references to ... n deep."""
    return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(n))


# ── harmless ones ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x", b"y"], "b": (1, (2, 3)), "c": {1, 2}, "d": -(2**70)},
        OrderedDict(a=1, b=(2,)),
        Counter("abc"),
        tuple(range(9000)),
        [[], {}, (), [{}]],
        {"weights": {f"layer{i}": (i, (i, i)) for i in range(300)}},
    ],
    ids=lambda value: type(value).__name__,
)
def test_harmless_values(value, protocol):
    check(pickle.dumps(value, protocol))


def test_hundreds_of_tensors():
    saved = io.BytesIO()
    state = {f"layer{i}.weight": torch.zeros(1, 2, 3) for i in range(300)}
    torch.save(state, saved)
    check(torch._C.PyTorchFileReader(io.BytesIO(saved.getvalue())).get_record("data.pkl"))


def test_a_tuple_in_many_places_is_no_bomb():
    shared = tuple(range(1000))
    check(pickle.dumps([shared] * 10_000, 2))


# ── bombs ────────────────────────────────────────────────────────────────────────────────────────

TOO_LARGE = f"net.pt: its pickle makes a tuple of more than {LARGEST_TUPLE} parts, nested ones"


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}" + doubled(40) + b"K\x01s.",
        b"\x80\x02}(" + doubled(40) + b"K\x01u.",
        b"\x80\x02}(X\x01\0\0\0w(K\x01K\x02t" + doubled(40) + b"K\x01u.",
        b"\x80\x02}(" + doubled(12) + b"q\x7f(" + b"h\x7f" * 4 + b"tK\x01u.",
        b"\x80\x02}" + doubled(12) + b"r\0\1\0\0(" + b"j\0\1\0\0" * 4 + b"ts.",
        b"\x80\x04})" + b"".join(b"\x94h%c\x86" % i for i in range(40)) + b"K\x01s.",
        b"\x80\x02})" + b"\x85" * (LARGEST_TUPLE + 1) + b"K\x01s.",
        b"\x80\x02})" + b"NN\x87" * LARGEST_TUPLE + b"K\x01s.",
    ],
    ids=["item", "items", "among others", "wide", "long memo", "memoize", "deep", "threes"],
)
def test_rejects_a_tuple_that_takes_forever(program):
    with pytest.raises(StabilityProbeError, match=TOO_LARGE) as error:
        check(program)
    assert_one_line(str(error.value))


def test_what_is_below_the_limit_can_be_read():
    program = b"\x80\x02}" + doubled(11) + b"K\x01s."
    check(program)
    assert len(pickle.loads(program)) == 1


@pytest.mark.parametrize("module", [b"builtins", b"__builtin__"])
def test_rejects_a_bytearray(module):
    size = b"\x8a\x05" + (2**33).to_bytes(5, "little")
    with pytest.raises(StabilityProbeError, match="makes a bytearray, which could be of any size"):
        check(b"\x80\x02c" + module + b"\nbytearray\n" + size + b"\x85R.")


@pytest.mark.parametrize(
    ("program", "error"),
    [(b"\x80\x02\x85.", IndexError), (b"\x80\x02h\x05.", KeyError), (b"\x80\x02t.", IndexError),
     (b"\x80\x02", ValueError), (b"\xff", ValueError)],
)  # fmt: skip
def test_a_program_that_cannot_run_raises_as_it_would(program, error):
    with pytest.raises(error):
        check(program)


# ── names ────────────────────────────────────────────────────────────────────────────────────────


class Thing:
    """Something to pickle."""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_names_are_found_at_every_protocol(protocol):
    names = list(names_in(pickletools.genops(pickle.dumps([Thing(), OrderedDict()], protocol))))
    assert f"{__name__}.Thing" in names
    assert "collections.OrderedDict" in names
    assert not list(names_in(pickletools.genops(pickle.dumps({"os.system": "x"}, protocol))))
