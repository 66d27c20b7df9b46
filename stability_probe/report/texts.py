"""Values as a page shows them, and as it sorts by them."""

import json
import math
from collections.abc import Mapping
from typing import Any

NONE = "–"
"""Stands for what was not measured or is not known."""
LONGEST = 300
"""Characters of a value that are shown where values are compared."""


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, or a dash.

    >>> number(1234.5678), number(0.000012), number(None), number(float("inf"))
    ('1,230', '1.2e-05', '–', '∞')
    """
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = float(f"{value:.{digits}g}")
    if 1e3 <= abs(rounded) < 1e6:
        return f"{rounded:,.0f}"
    return f"{rounded:.{digits}g}"


def sort_key(value: float | None) -> str:
    """A number as a script reads it; empty if there is none.

    >>> sort_key(2.5), sort_key(float("-inf")), sort_key(None), sort_key(float("nan"))
    ('2.5', '-Infinity', '', '')
    """
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(float(value))


def shown(value: Any) -> str:
    """A setting in one line, cut if it is very long.

    >>> shown(True), shown([1.0, 0.7]), shown({"a": None}), shown(0.001)
    ('yes', '1, 0.7', '{"a": null}', '0.001')
    """
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, list) and not any(isinstance(v, list | Mapping) for v in value):
        text = ", ".join(map(shown, value)) or "none"
    elif isinstance(value, list | Mapping):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def flat(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Settings within settings under one name each.

    >>> flat({"width": 8, "probe": {"every": 1}})
    {'width': 8, 'probe.every': 1}
    """
    found: dict[str, Any] = {}
    for name, inner in value.items():
        name = f"{path}{name}"
        found |= flat(inner, f"{name}.") if isinstance(inner, Mapping) and inner else {name: inner}
    return found


def bar(share: float | None) -> str:
    """A share as the width of a bar: 0 % to 100 %.

    >>> bar(0.25), bar(-0.1), bar(None)
    ('25%', '0%', '0%')
    """
    return f"{100 * min(max(share or 0.0, 0.0), 1.0):.3g}%"


def percent(share: float | None, digits: int = 3) -> str:
    """A share for people.

    >>> percent(0.12345), percent(None)
    ('12.3 %', '–')
    """
    return NONE if share is None else f"{number(100 * share, digits)} %"
