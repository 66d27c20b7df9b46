"""The grammar of thresholds, and what they are held against."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe.errors import StabilityProbeError
from stability_probe.regression import parse_requirement
from stability_probe.regression.groups import Group
from stability_probe.regression.requirements import OPERATORS, hold

GROUP = Group(
    "cs", {}, {}, "", ["0", "1"],
    {"loss": [0.2, 0.4], "energy.h_0": [10.0, 12.0], "energy.h_1": [5.0, 6.0],
     "energyx": [99.0, 99.0]},
    verdicts={"3.4: a": ["HOLDS", "HOLDS"], "3.3: b": ["HOLDS", "VIOLATED"]},
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "met", "found"),
    [
        ("loss<0.5", True, "loss of cs, seed 1: 0.4, the nearest"),
        ("loss<0.3", False, "loss of cs, seed 1: 0.4"),
        ("loss <= 0.4", True, "loss of cs, seed 1: 0.4, the nearest"),
        ("loss>0.2", False, "loss of cs, seed 0: 0.2"),
        ("loss>=.2", True, "loss of cs, seed 0: 0.2, the nearest"),
        ("loss!=0.4", False, "loss of cs, seed 1: 0.4"),
        ("energy<12", False, "energy.h_0 of cs, seed 1: 12"),
        ("energy < 1.3e1", True, "energy.h_0 of cs, seed 1: 12, the nearest"),
        ("theorem_3_4=HOLDS", True, "3.4: a of cs, seed 0: HOLDS"),
        ("theorem_3_3=HOLDS", False, "3.3: b of cs, seed 1: VIOLATED"),
        ("theorem_3_3 != INCONCLUSIVE", True, "3.3: b of cs, seed 0: HOLDS"),
    ],
)
def test_every_number_of_every_run_has_to_meet_it(text, met, found):
    outcome = hold(parse_requirement(text), [GROUP])
    assert (outcome.requirement, outcome.met, outcome.found) == (text, met, found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_breaks_an_upper_limit(bad):
    group = Group("g", {}, {}, "", ["0", "1"], {"loss": [0.1, bad]})
    outcome = hold(parse_requirement("loss<1"), [group])
    assert (outcome.met, outcome.found) == (False, f"loss of g, seed 1: {bad}")


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("", 1, "a name such as loss"),
        ("<3", 1, "a name such as loss"),
        ("  3<4", 3, "a name such as loss"),
        ("loss", 5, "one of <= >= != < > = is needed, it ends there"),
        ("loss 3", 6, "one of <= >= != < > ="),
        ("loss~3", 5, "one of <= >= != < > ="),
        ("loss<", 6, "a number is needed, it ends there"),
        ("loss<<3", 6, "a number is needed, got '<3'"),
        ("loss< three", 7, "a number is needed, got 'three'"),
        ("loss<3 4", 6, "a number is needed, got '3 4'"),
        ("loss<nan", 6, "a number"),
        ("loss==3", 6, "a number is needed, got '=3'"),
        ("theorem_3_1<3", 12, "= or != after the name of a theorem"),
        ("theorem_3_1=holds", 13, "one of HOLDS, VIOLATED"),
        ("theorem_3_1=", 13, "one of HOLDS, VIOLATED"),
    ],
)
def test_errors_point_at_the_character(text, place, expected):
    with pytest.raises(StabilityProbeError) as error:
        parse_requirement(text)
    message = str(error.value)
    assert message.startswith(f"--require {text!r}, character {place}: {expected}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("lss<2", r"such as loss \(they begin with loss, .*baseline"),
        ("losss<3", "loss"),
        ("energy.h_9<3", "energy.h_"),
        ("path.mid<3", "train --paths"),
    ],
)
def test_a_name_that_nothing_has_is_refused_with_those_near_it(text, near):
    with pytest.raises(
        StabilityProbeError, match=f"character 1: a name that all of runs of cs .*{near}"
    ):
        hold(parse_requirement(text), [GROUP])


@pytest.mark.parametrize("name", ["theorem_3_9", "theorem", "lemma_3_2"])
def test_a_theorem_that_there_is_not_is_pointed_at(name):
    match = r"character 1: one of theorem_3_1, .*lemma is theorem_3_2"
    with pytest.raises(StabilityProbeError, match=match):
        parse_requirement(f"{name}=HOLDS")


def test_a_theorem_that_nothing_was_said_about_is_refused():
    with pytest.raises(StabilityProbeError, match="a name that all of runs of cs have"):
        hold(parse_requirement("theorem_3_1=HOLDS"), [GROUP])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["loss", "energy.h_0", "path.skip_12"]),
    st.sampled_from(sorted(OPERATORS)),
    st.floats(allow_nan=False, allow_infinity=False),
    st.tuples(*[st.sampled_from(["", " ", "  "])] * 4),
)
def test_what_is_written_is_read(name, sign, value, space):
    text = f"{space[0]}{name}{space[1]}{sign}{space[2]}{value!r}{space[3]}"
    found = parse_requirement(text)
    assert (found.name, found.operator, found.value) == (name, sign, value)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        parse_requirement(text)
    except StabilityProbeError as error:
        assert 1 <= int(str(error).partition(", character ")[2].split(":")[0]) <= len(text) + 1


def test_a_group_without_the_number_is_not_passed_over():
    bare = Group("bare", {}, {}, "", ["0"], {"energy.h_0": [1.0]})
    with pytest.raises(StabilityProbeError, match="a name that all of runs of bare have"):
        hold(parse_requirement("loss<1"), [GROUP, bare])
