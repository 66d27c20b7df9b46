"""Damaged checkpoints of every format: a clean load or one line.

What is required of a damaged file depends on what it says of itself:

* Any damage to any file ends in a load or in a `StabilityProbeError` of one printable line.
* Archives (torch.save, torch.export) have checksums: no member can change without an error.
* Safetensors have none for their numbers: these may change, but one flipped bit changes one number,
  and a flipped bit in the header changes nothing that loads.
* Files of torch.save before 1.6 have none at all: what loads has the names and shapes of the model.
* No file of weights loads once its end is missing.
"""

import functools
import operator
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stability_probe import StabilityProbeError
from stability_probe.checkpoints import load_checkpoint
from tests.checkpoints.mutations import (
    MOST_MEMORY,
    PEAK_IS_KNOWN,
    Damage,
    damaged,
    damages,
    explains,
    mutate,
)
from tests.checkpoints.saved_files import every_format, files_of, pack_again

ARCHIVES = [
    ("bin", "diffusion_pytorch_model.bin"),
    ("torch", "net.pt"),
    ("uvit", "uvit.pth"),
    ("averaged", "ema.bin"),
    ("export", "net.pt2"),
]
SAFETENSORS = [
    ("diffusers", "diffusion_pytorch_model.safetensors"),
    ("sharded", "diffusion_pytorch_model-00002-of-00006.safetensors"),
    ("safetensors", "net.safetensors"),
    ("accelerate", "model.safetensors"),
]
LEGACY = [("legacy", "legacy.pth")]
WEIGHTS = ARCHIVES + SAFETENSORS + LEGACY
TEXTS = [
    ("diffusers", "config.json"),
    ("sharded", "diffusion_pytorch_model.safetensors.index.json"),
]
pytestmark = pytest.mark.filterwarnings("ignore")


def thoroughly(examples):
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return every_format(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def case(request, saved):
    """(file to damage, path of the checkpoint, options that load it)."""
    name, file = request.param
    path, options = saved[name]
    (found,) = [f for f in files_of(path) if f.name == file]
    return found, path, options


@pytest.fixture
def sound(case):
    """What the file holds before it is damaged."""
    return load(case)


def files(*groups):
    return pytest.mark.parametrize(
        "case", functools.reduce(operator.iadd, groups, []), ids="/".join, indirect=True
    )


def load(case):
    _, path, options = case
    return load_checkpoint(path, **options)


def differences(one, other):
    """How many numbers of two models with the same names and shapes differ in their bits."""
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    assert [v.shape for v in first.values()] == [v.shape for v in second.values()]
    as_bytes = [
        [state[name].contiguous().view(-1).view(torch.uint8).view(-1, state[name].element_size())
         for name in first] for state in (first, second)
    ]  # fmt: skip
    return sum(int((a != b).any(dim=1).sum()) for a, b in zip(*as_bytes, strict=True) if a.numel())


# ── any damage ───────────────────────────────────────────────────────────────────────────────────


@files(WEIGHTS, TEXTS)
def test_sound_files_load(case):
    assert explains(lambda: load(case)) is None


@files(WEIGHTS, TEXTS)
@thoroughly(40)
@given(damage=damages)
def test_damage_ends_in_a_load_or_in_one_line(case, damage):
    with damaged(case[0], damage):
        explains(lambda: load(case))


@files(WEIGHTS, TEXTS)
@thoroughly(15)
@given(first=damages, second=damages, third=damages)
def test_so_does_damage_upon_damage(case, first, second, third):
    with damaged(case[0], first):
        for damage in (second, third):
            data = case[0].read_bytes()
            case[0].write_bytes(mutate(data, damage) if data else data)
        explains(lambda: load(case))


@files(WEIGHTS)
@thoroughly(15)
@given(keep=st.floats(0, 0.999) | st.sampled_from([0.0, 0.9999]))
def test_no_weights_load_without_their_end(case, keep):
    length = case[0].stat().st_size
    with damaged(case[0], Damage("truncate", int(keep * length))):
        assert explains(lambda: load(case))


@files(WEIGHTS, TEXTS)
def test_the_files_are_whole_again_after_all_this(case):
    """Else the tests above would have looked at the same damage again and again."""
    assert explains(lambda: load(case)) is None


@files([case for case in ARCHIVES if case[0] != "export"])
@thoroughly(40)
@given(damage=damages)
def test_so_does_damage_under_the_right_checksum(case, damage):
    """As nobody would make it by accident."""
    with damaged(case[0], Damage("insert", 0)):
        program = torch._C.PyTorchFileReader(str(case[0])).get_record("data.pkl")
        pack_again(case[0], {"data.pkl": mutate(program, damage)})
        explains(lambda: load(case))


# ── what a load still guarantees ─────────────────────────────────────────────────────────────────


def members(file):
    """Where the bytes of each member of an archive lie."""
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            at = info.header_offset
            lengths = [int.from_bytes(data[at + i : at + i + 2], "little") for i in (26, 28)]
            start = at + 30 + sum(lengths)
            yield range(start, start + info.file_size)


@files(ARCHIVES)
@thoroughly(25)
@given(pick=st.data())
def test_no_bit_of_a_member_of_an_archive_can_change(case, pick):
    inside = pick.draw(st.sampled_from(list(members(case[0]))))
    damage = Damage("flip", pick.draw(st.sampled_from(inside)), bit=pick.draw(st.integers(0, 7)))
    with damaged(case[0], damage):
        message = explains(lambda: load(case))
    assert message and "Bad CRC-32" in message


def end_of_header(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@files(SAFETENSORS)
@thoroughly(25)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_of_the_numbers_of_safetensors_changes_one_number(case, sound, at, bit):
    start = end_of_header(case[0])
    place = start + int(at * (case[0].stat().st_size - start))
    with damaged(case[0], Damage("flip", place, bit=bit)):
        assert differences(load(case), sound) == 1


@files(SAFETENSORS)
@thoroughly(40)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_of_the_header_of_safetensors_changes_nothing_that_loads(case, sound, at, bit):
    end = end_of_header(case[0])
    with damaged(case[0], Damage("flip", int(at * end), bit=bit)):
        if explains(lambda: load(case)) is None:
            assert differences(load(case), sound) == 0


@files(LEGACY)
@thoroughly(60)
@given(damage=damages)
def test_what_loads_of_a_legacy_file_has_the_shapes_of_the_model(case, sound, damage):
    with damaged(case[0], damage):
        if explains(lambda: load(case)) is None:
            differences(load(case), sound)


# ── the damage itself ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("damage", "after"),
    [
        (Damage("truncate", 2), b"ab"),
        (Damage("truncate", -1), b"abcde"),
        (Damage("flip", 0, bit=1), b"cbcdef"),
        (Damage("flip", 6 + 2, bit=0), b"abbdef"),
        (Damage("overwrite", 1, piece=b"XY"), b"aXYdef"),
        (Damage("insert", 1, piece=b"XY"), b"aXYbcdef"),
        (Damage("cut", 1, length=3), b"aef"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_each_damage_does(damage, after):
    assert mutate(b"abcdef", damage) == after


def test_damage_is_undone(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with damaged(tmp_path / "file", Damage("truncate", 1)):
        assert (tmp_path / "file").read_bytes() == b"a"
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_other_errors_and_longer_messages_are_not_taken():
    def fail(error):
        raise error

    with pytest.raises(KeyError):
        explains(lambda: fail(KeyError("inside")))
    for text in ("two lines\nof text", "with \x1b[31m colour", "short"):
        with pytest.raises(AssertionError):
            explains(lambda text=text: fail(StabilityProbeError(text)))
    assert explains(lambda: fail(StabilityProbeError("a good message"))) == "a good message"
    assert explains(lambda: None) is None


@pytest.mark.skipif(not PEAK_IS_KNOWN, reason="the peak of memory is read as Linux tells it")
def test_a_huge_allocation_is_noticed():
    assert explains(lambda: bytearray(MOST_MEMORY // 4)) is None
    with pytest.raises(AssertionError):
        explains(lambda: bytearray(2 * MOST_MEMORY))
