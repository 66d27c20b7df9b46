"""The texts of options."""

import pytest

from stability_probe import StabilityProbeError
from stability_probe.cli.options import (
    parse_json_object,
    parse_numbers,
    parse_pairs,
    parse_shape,
)


def test_pairs():
    assert parse_pairs(["a.*=b.*", "=out", "x=y=z"]) == [("a.*", "b.*"), ("", "out"), ("x", "y=z")]
    assert parse_pairs([]) == []


@pytest.mark.parametrize("text", ["a", "a=", ""])
def test_pairs_that_are_none(text):
    with pytest.raises(StabilityProbeError, match=f"--skips '{text}': must be SOURCE=SINK"):
        parse_pairs([text])


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("3,32,32", (3, 32, 32)), ("3, 4, 8, 8", (3, 4, 8, 8)), ("64", (64,)),
        ("images", None), ("3,x", None), ("", None), ("-3,4", None), ("3,,4", None),
    ],
)  # fmt: skip
def test_shapes(text, shape):
    assert parse_shape(text) == shape


def test_numbers():
    assert parse_numbers("50,0.5,1e2", "--t") == [50.0, 0.5, 100.0]
    with pytest.raises(StabilityProbeError, match="--t '5;6': must be numbers with commas"):
        parse_numbers("5;6", "--t")
    with pytest.raises(StabilityProbeError, match="--t 'nan': must be numbers"):
        parse_numbers("nan", "--t")


def test_json():
    assert parse_json_object('{"a": [1]}', "--model-args") == {"a": [1]}
    with pytest.raises(StabilityProbeError, match="--model-args: is not JSON"):
        parse_json_object("{", "--model-args")
    with pytest.raises(StabilityProbeError, match="--model-args: must be a JSON object"):
        parse_json_object("[1]", "--model-args")
