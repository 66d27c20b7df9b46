"""Every notebook is committed as a reader should find it: executed, clean, and small."""

import json
import re
from pathlib import Path
from typing import Any

import papermill
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_500_000
"""Bytes."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def notebook(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in code(notebook) for output in cell["outputs"]]


def test_the_six_are_there():
    assert [path.stem for path in NOTEBOOKS] == [
        "choose_kappa", "probe_a_checkpoint", "quickstart", "theorem_3_1", "theorem_3_3",
        "theorem_3_4",
    ]  # fmt: skip


def test_parameters_are_in_the_first_code_cell_alone(notebook):
    tagged = [cell["metadata"].get("tags") == ["parameters"] for cell in code(notebook)]
    assert tagged == [True] + [False] * (len(tagged) - 1)


def test_it_was_executed_from_top_to_bottom(notebook):
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


def test_nothing_failed_and_nothing_warned(notebook):
    for output in outputs(notebook):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output


def test_outputs_hold_no_path_and_no_address_of_the_machine(notebook):
    for output in outputs(notebook):
        texts = [output.get("text", []), *output.get("data", {}).values()]
        kept = [t for t in texts if not str(t).startswith("iVBOR")]  # not the bytes of figures
        assert not re.search(r"/(tmp|home|root|work|usr|var)/| at 0x[0-9a-f]+|\x1b", str(kept))


def test_figures_are_shown_and_sharp(notebook):
    shown = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(shown) >= 2
    for output in shown:  # drawn with twice the pixels that they take
        assert output["metadata"]["image/png"]["width"] > 0


def test_metadata_are_those_of_any_machine(notebook):
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])


def test_it_is_small(path):
    assert path.stat().st_size < LARGEST


def test_equations_are_in_blocks_that_github_renders(notebook):
    text = "\n".join(
        "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"
    )
    assert text.count("$$") >= 2 and text.count("$$") % 2 == 0
    assert r"\[" not in text and r"\(" not in text


def test_the_readme_names_every_notebook():
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"\((\w+\.ipynb)\)", text)) == {path.name for path in NOTEBOOKS}


@pytest.mark.slow
def test_papermill_changes_the_parameters(tmp_path):
    changed = {"steps": 4, "width": 8, "samples": 4, "sensitive": 1, "kappa": 0.5, "seed": 3}
    result = papermill.execute_notebook(
        FOLDER / "quickstart.ipynb", tmp_path / "out.ipynb", changed,
        kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    cells = [cell for cell in result.cells if cell.cell_type == "code"]
    assert "kappa = 0.5" in cells[1].source  # what papermill put after the parameters
    assert "[17, 8]" in json.dumps([cell.outputs for cell in cells])  # the skips' tokens and width
