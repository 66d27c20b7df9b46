"""Nothing is left unexplained."""

import ast
from pathlib import Path

import pytest

import stability_probe
from stability_probe.report.explanations import CAPTIONS, STATUSES, explain
from stability_probe.verify.verdict import Status

PACKAGE = Path(stability_probe.__file__).parent


def claims() -> list[str]:
    """Every claim that some verdict makes, as it begins."""
    found = []
    for file in (PACKAGE / "verify").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
                continue
            if node.targets[0].id.lower() == "claim":
                text = node.value.values[0] if isinstance(node.value, ast.JoinedStr) else node.value
                found += [text.value] if isinstance(text, ast.Constant) else []
    return found


def test_all_claims_are_found():
    assert len(claims()) >= 11


@pytest.mark.parametrize("claim", claims())
def test_every_claim_has_an_explanation_of_its_own(claim):
    found = explain(claim)
    assert found is not None
    assert all((found.name, found.asked, found.holds, found.violated, found.slack))
    assert [other for other in claims() if explain(other) is found] == [claim]


def test_a_claim_that_is_not_known():
    assert explain("something new") is None


def test_every_status_has_a_sign_of_its_own():
    assert {*STATUSES} == {*Status.__args__}
    assert len({meaning.sign for meaning in STATUSES.values()}) == 4


def test_every_figure_has_a_caption():
    source = (PACKAGE / "plots" / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    drawn = {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    } | {
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
    }  # fmt: skip
    assert drawn >= {"energies", "loss"} and drawn == {*CAPTIONS}
