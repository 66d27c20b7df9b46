"""Checks as Markdown and as JUnit's XML."""

import xml.etree.ElementTree as ET

import pytest

from stability_probe.regression.check import Check, GroupCheck
from stability_probe.regression.compare import Comparison, Flip
from stability_probe.regression.reports import junit, markdown
from stability_probe.regression.requirements import Outcome

WORSE = Comparison("energy.h_0", (1.0, 4.0), (4.0, 9.0), 3.0, 1e-9, 1.4, "worse")
BETTER = Comparison("loss", (2.0,), (1.0,), 0.5, 1.0, 1.4, "better")
SAME = Comparison("path.mid", (2.0,), (2.0,), 1.0, 0.7, 1.4, "same")
FLIP = Flip("3.4: bound <holds>", ("HOLDS",) * 5, ("VIOLATED",) * 5, "worse")


def group(*compared, flips=(), cause="", notes=()):
    return GroupCheck("cs:0.7", (5, 1), list(compared), list(flips), cause, list(notes))


FAILED = Check(
    [group(WORSE, BETTER, SAME, flips=[FLIP], cause="skips pass more", notes=["one seed"])],
    [Outcome("loss<3", True, "loss: 2"), Outcome("loss<1", False, "loss: 2")],
)
PASSED = Check([group(SAME)])


def test_markdown_says_what_where_how_much_and_why():
    text = markdown(FAILED)
    assert "## Training stability: **failed**" in text
    assert "1 run against 5 of the baseline, 3 numbers: 1 worse, 1 better." in text
    assert "| `energy.h_0` | ×3 | 2 | 6 | <1e-4 |" in text
    assert "- 3.4: bound <holds>: was HOLDS, is **VIOLATED**" in text
    assert "Likely cause: skips pass more." in text
    assert "Better: loss -50 %." in text
    assert "- one seed" in text
    assert "Not worse, as far as can be told: 1; a rise of ×1.4 would have shown in pa" in text
    assert "| `loss<1` | **no** | loss: 2 |" in text and "| `loss<3` | yes | loss: 2 |" in text


def test_markdown_of_a_check_that_passed_is_short():
    text = markdown(PASSED)
    assert "## Training stability: passed" in text
    assert "worse |" not in text and "Likely" not in text and "Better" not in text


def test_junit_has_a_case_for_everything_and_its_counts():
    root = ET.fromstring(junit(FAILED).encode())
    suites = {s.get("name"): s for s in root}
    assert set(suites) == {"cs:0.7", "requirements"}
    assert [(s.get("tests"), s.get("failures")) for s in root] == [("4", "2"), ("2", "1")]
    cases = {c.get("name"): c for c in root.iter("testcase")}
    failure = cases["energy.h_0"].find("failure").get("message")
    assert failure == "×3: 2 -> 6, p = <1e-4. skips pass more"
    assert cases["3.4: bound <holds>"].find("failure") is not None
    assert cases["loss"].find("failure") is None
    assert cases["loss<1"].find("failure").get("message") == "loss: 2"


def test_junit_of_a_check_that_passed_has_no_failure():
    root = ET.fromstring(junit(PASSED).encode())
    assert not list(root.iter("failure"))
    assert len(list(root.iter("testcase"))) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_can_be_shown(bad):
    diverged = Comparison("loss", (1.0,), (bad,), float("inf"), 0.0, 1.0, "worse")
    found = Check([group(diverged)])
    assert "not finite" in markdown(found)
    assert "not finite" in ET.fromstring(junit(found).encode()).find(".//failure").get("message")
