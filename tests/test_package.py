"""What is installed: modules, and the files beside them that are read."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import stability_probe
from stability_probe.probes.outer_products import outer_energy

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


class TestShapeChecking:
    def test_is_on_in_every_module_that_states_shapes(self, request):
        *listed, _ = request.config.getoption("--jaxtyping-packages").split(",")
        stating = {
            ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
            for file in PACKAGE.rglob("*.py")
            if "jaxtyping" in file.read_text(encoding="utf-8")
        }
        assert {*listed} == stating

    def test_finds_a_wrong_shape(self):
        with pytest.raises(TypeCheckError, match="batch"):
            outer_energy(torch.zeros(2, 1, 3, 4), torch.zeros(3, 1, 5, 4))
