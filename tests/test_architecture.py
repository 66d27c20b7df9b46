"""Imports between the package's folders point one way."""

import ast
from pathlib import Path

import pytest

import stability_probe

PACKAGE = "stability_probe"
ROOT = Path(stability_probe.__file__).parent
ORDER = [
    "models", "skips", "probes", "runs", "checkpoints", "verify", "plots", "report", "regression",
    "integrations", "cli",
]  # fmt: skip
SHARED = {"theory", "errors"}


def imported_parts(source: str, part: str) -> set[str]:
    """The parts of the package (first name after its own) that a module in `part` imports."""
    modules: list[list[str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [PACKAGE, part][: 3 - node.level] if node.level else []
            base = inside + (node.module.split(".") if node.module else [])
            modules += [[*base, alias.name] if base == [PACKAGE] else base for alias in node.names]
    ours = [names for names in modules if names[0] == PACKAGE]
    return {names[1] if len(names) > 1 else "the whole package" for names in ours}


def forbidden(part: str, imported: set[str]) -> set[str]:
    """What a part may not import."""
    if part == "theory":
        return imported - {"theory"}
    if part == "errors":
        return imported
    return imported - SHARED - set(ORDER[: ORDER.index(part) + 1])


def modules() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left_only(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py").replace("__main__", "cli")
    assert part in {*ORDER, *SHARED}, f"{part!r} has no place in the order of imports"
    assert not forbidden(part, imported_parts(path.read_text(), part))


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("theory", "from stability_probe.errors import StabilityProbeError", {"errors"}),
        ("theory", "import stability_probe.models", {"models"}),
        ("errors", "from stability_probe.theory import x", {"theory"}),
        ("models", "from stability_probe.skips.taps import OutputTap", {"skips"}),
        ("models", "from stability_probe import skips", {"skips"}),
        ("models", "from ..skips import find_skips", {"skips"}),
        ("models", "from .. import skips", {"skips"}),
        ("probes", "def f():\n    from stability_probe.runs import Run", {"runs"}),
        ("skips", "from stability_probe import find_skips", {"find_skips"}),
        ("skips", "import stability_probe", {"the whole package"}),
        (
            "cli",
            "from stability_probe.runs import Run\nfrom stability_probe.theory import x",
            set(),
        ),
        (
            "skips",
            "from .taps import Tap\nimport torch\nfrom stability_probe.errors import E",
            set(),
        ),
    ],
)
def test_the_check_sees_through_every_form_of_import(part, source, found):
    assert forbidden(part, imported_parts(source, part)) == found
