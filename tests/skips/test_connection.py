import dataclasses
import json

import pytest

from stability_probe import SkipConnection
from stability_probe.skips import ArgumentTap, OutputTap

SKIP = SkipConnection(
    level=2,
    source="enc.1",
    sink="dec.1",
    merge="add",
    shape=(4, 8, 8),
    kappa=1.0,
    feature=OutputTap("enc.1"),
    skip=ArgumentTap("dec.1", "u"),
    main=ArgumentTap("dec.1", "z"),
    merged=ArgumentTap("dec.1.block", "v"),
    decoded=OutputTap("dec.1"),
)


def test_as_dict_is_what_the_command_line_prints():
    expected = {
        "level": 2, "source": "enc.1", "sink": "dec.1", "merge": "add", "shape": [4, 8, 8],
        "kappa": 1.0,
    }  # fmt: skip
    assert json.loads(json.dumps(SKIP.as_dict())) == expected


def test_is_a_value():
    assert dataclasses.replace(SKIP) == SKIP
    assert hash(dataclasses.replace(SKIP)) == hash(SKIP)
    assert dataclasses.replace(SKIP, level=3) != SKIP
    with pytest.raises(dataclasses.FrozenInstanceError):
        SKIP.level = 3


def test_repr_shows_what_a_reader_needs():
    assert repr(SKIP) == (
        "SkipConnection(level=2, source='enc.1', sink='dec.1', merge='add', shape=(4, 8, 8), "
        "kappa=1.0)"
    )
