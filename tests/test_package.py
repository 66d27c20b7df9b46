"""What is installed: modules, and the files beside them that are read."""

from pathlib import Path

import pytest

import stability_probe

PACKAGE = Path(stability_probe.__file__).parent


def test_every_file_beside_the_modules_is_declared():
    """What `pyproject.toml` does not name is in a clone, and not in the wheel."""
    toml = pytest.importorskip("tomllib")
    settings = toml.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]
    everything = (file for file in PACKAGE.rglob("*") if "__pycache__" not in file.parts)
    files = {file for file in everything if file.is_file()}
    by_itself = {file for file in files if file.suffix in (".py", ".pyi")}  # setuptools takes those
    named = {
        file
        for package, names in patterns.items()
        for name in names
        for file in (PACKAGE.parent / package.replace(".", "/")).glob(name)
    }
    assert files - by_itself - named == set()
    folders = {file.parent for file in files}
    assert all((folder / "__init__.py").exists() for folder in folders)
