import json
from pathlib import Path

import pytest

from stability_probe import StabilityProbeError
from stability_probe.checkpoints import reading as module
from stability_probe.checkpoints.reading import (
    brief,
    brief_name,
    listed,
    problem,
    read_json_object,
    reading,
)
from tests.checkpoints.mutations import assert_one_line

PATH = Path("some/file")


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\n\tb", "a\x0bb", "a\x85b", "a\u2028b", "a \n\n b"], ids=ascii
)
def test_a_problem_is_one_line(text):
    assert str(problem(PATH, text)) == "some/file: a b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[31mred", r"\x1b[31mred"), ("\0", r"\x00"), ("\ud800", r"\ud800"), ("κ", "κ")],
    ids=ascii,
)
def test_a_problem_does_not_write_to_the_terminal_what_a_file_says(text, shown):
    assert str(problem(PATH, f"is {text}")) == f"some/file: is {shown}"


def test_a_path_with_control_characters_or_of_no_encoding_is_shown_too():
    message = str(problem(Path("a\nb\x1b") / "\udcff", "is damaged"))
    assert message == r"a b\x1b/\udcff: is damaged"


def test_an_exception_is_cut_to_its_start():
    assert brief(ValueError("a\n  b")) == "ValueError: a b"
    assert brief(ValueError()) == "ValueError"
    long = brief(ValueError("x" * 10_000))
    assert long.startswith("ValueError: xxx") and long.endswith("x…") and len(long) == 200


def test_long_names_are_cut():
    assert brief_name("x" * 100) == "x" * 100
    assert brief_name("x" * 101) == "x" * 100 + "…"


def test_the_first_names_and_the_number_of_others():
    assert listed([]) == ""
    assert listed(["a", "b\n"]) == r"'a', 'b\n'"
    assert listed(list("abcde")) == "'a', 'b', 'c' and 2 more"


@pytest.mark.parametrize(
    "error",
    [KeyError("a\nb"), RecursionError("deep"), MemoryError(), UnicodeError("x")],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_becomes_ours(error):
    with (
        pytest.raises(
            StabilityProbeError,
            match=f"some/file: cannot be read as a thing .{type(error).__name__}",
        ) as caught,
        reading(PATH, "a thing", "do this"),
    ):
        raise error
    assert str(caught.value).endswith("; do this")
    assert caught.value.__cause__ is error
    assert_one_line(str(caught.value))


def test_ours_pass_as_they_are():
    mine = problem(PATH, "is mine")
    with pytest.raises(StabilityProbeError) as caught, reading(PATH, "a thing"):
        raise mine
    assert caught.value is mine


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_passes(error):
    with pytest.raises(error), reading(PATH, "a thing"):
        raise error


class TestJson:
    def test_an_object(self, tmp_path):
        (tmp_path / "a.json").write_text('{"κ": [1, 2.5, null]}')
        assert read_json_object(tmp_path / "a.json") == {"κ": [1, 2.5, None]}

    @pytest.mark.parametrize(
        "data", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b'{"a": ' + b"9" * 100_000 + b"}"],
        ids=["empty", "open", "encoding", "deep", "number"],
    )  # fmt: skip
    def test_rejects_what_is_no_json(self, tmp_path, data):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(StabilityProbeError, match=r"a.json: cannot be read as JSON"):
            read_json_object(tmp_path / "a.json")

    @pytest.mark.parametrize("value", [[], 3, None, "text"])
    def test_rejects_what_is_no_object(self, tmp_path, value):
        (tmp_path / "a.json").write_text(json.dumps(value))
        kind = type(value).__name__
        with pytest.raises(StabilityProbeError, match=f"a JSON object is needed, got {kind}"):
            read_json_object(tmp_path / "a.json")

    def test_rejects_a_long_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "LARGEST_JSON", 10)
        (tmp_path / "a.json").write_text('{"a": 123}')
        assert read_json_object(tmp_path / "a.json") == {"a": 123}
        (tmp_path / "a.json").write_text('{"a": 1234}')
        with pytest.raises(StabilityProbeError, match="at most 10 bytes is read, got 11"):
            read_json_object(tmp_path / "a.json")

    def test_rejects_a_missing_file(self, tmp_path):
        with pytest.raises(StabilityProbeError, match=r"a.json: cannot be read as JSON .FileNotF"):
            read_json_object(tmp_path / "a.json")
