"""A check as other programs read it: Markdown for a pull request, JUnit's XML for a CI server."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from stability_probe.regression.check import Check, GroupCheck
from stability_probe.regression.compare import Comparison
from stability_probe.regression.requirements import Outcome

MOST_BETTER = 5
"""Improvements that are listed one by one."""


def markdown(check: Check) -> str:
    """A section for a pull request or a job's summary: what got worse, by how much and where."""
    title = "passed" if check.passed else "**failed**"
    lines = [f"## Training stability: {title}", ""]
    for group in check.groups:
        lines += _group_lines(group)
    if check.requirements:
        lines += ["| requirement | met | by |", "|---|---|---|"]
        lines += [f"| `{r.requirement}` | {_yes(r)} | {r.found} |" for r in check.requirements]
        lines.append("")
    return "\n".join(lines)


def _yes(outcome: Outcome) -> str:
    return "yes" if outcome.met else "**no**"


def _group_lines(group: GroupCheck) -> list[str]:
    n, m = group.seeds
    better = [c for c in group.compared if c.change == "better"]
    lines = [
        f"### {group.name}",
        "",
        f"{m} run{'s' * (m > 1)} against {n} of the baseline, {len(group.compared)} numbers: "
        f"{len(group.worse)} worse, {len(better)} better.",
        "",
    ]
    if group.worse:
        lines += _table(group.worse)
    fallen = [flip for flip in group.flips if flip.change == "worse"]
    lines += [f"- {flip.claim}: was HOLDS, is **VIOLATED**" for flip in fallen]
    if group.cause:
        lines += [f"Likely cause: {group.cause}.", ""]
    same = [c for c in group.compared if c.change == "same"]
    if same:
        lines += [f"Not worse, as far as can be told: {len(same)}; {sensitivity(same)}.", ""]
    if better:
        named = ", ".join(f"{c.name} {c.percent}" for c in better[:MOST_BETTER])
        lines += [f"Better: {named}{' ...' if len(better) > MOST_BETTER else ''}.", ""]
    return [*lines, *(f"- {note}" for note in group.notes), ""]


def _table(compared: Sequence[Comparison]) -> list[str]:
    rows = [
        f"| `{c.name}` | {c.percent} | {c.was:.4g} | {c.is_now:.4g} | {p_value(c)} |"
        for c in compared
    ]
    return ["| worse | change | baseline | now | p |", "|---|---|---|---|---|", *rows, ""]


def junit(check: Check) -> str:
    """JUnit's XML: a test case for every number, verdict and requirement."""
    suites = ET.Element("testsuites", name="stability-probe check")
    for group in check.groups:
        suite = _suite(suites, group.name)
        for c in group.compared:
            text = f"{c.percent}: {c.was:.4g} -> {c.is_now:.4g}, p = {p_value(c)}"
            broken = f"{text}. {group.cause}" if c.change == "worse" else None
            _case(suite, f"stability.{group.name}", c.name, broken, text)
        for flip in group.flips:
            text = f"was {flip.baseline[0]}, is {flip.now[0]}"
            broken = text if flip.change == "worse" else None
            _case(suite, f"stability.{group.name}", flip.claim, broken, text)
        _count(suite)
    if check.requirements:
        suite = _suite(suites, "requirements")
        for r in check.requirements:
            _case(
                suite, "stability.requirements", r.requirement, None if r.met else r.found, r.found
            )
        _count(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _suite(suites: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(suites, "testsuite", name=name)


def _case(suite: ET.Element, kind: str, name: str, broken: str | None, text: str) -> None:
    case = ET.SubElement(suite, "testcase", classname=kind, name=name)
    if broken is not None:
        ET.SubElement(case, "failure", message=broken)
    else:
        ET.SubElement(case, "system-out").text = text


def _count(suite: ET.Element) -> None:
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))


def sensitivity(compared: Sequence[Comparison]) -> str:
    """What rises would have shown in numbers that are not worse, from the clearest on.

    >>> sensitivity([Comparison("loss", (1.0,), (1.0,), 1.0, 1.0, 1.2, "same")])
    'a rise of ×1.2 would have shown in loss'
    """
    clearest, faintest = (f(compared, key=lambda c: c.visible) for f in (min, max))
    text = f"a rise of ×{clearest.visible:.3g} would have shown in {clearest.name}"
    if faintest is clearest:
        return text
    return f"{text}, one of ×{faintest.visible:.3g} in {faintest.name}, the others between"


def p_value(compared: Comparison) -> str:
    """A p-value for showing.

    >>> p_value(Comparison("loss", (1.0,), (2.0,), 2.0, 1e-9, 1.5, "worse"))
    '<1e-4'
    """
    return "<1e-4" if compared.p < 1e-4 else f"{compared.p:.2g}"
