import pytest

from stability_probe import StabilityProbeError
from stability_probe.cli.figures import save_figures
from tests.oracles.evidence import ensemble, stored, training


def test_figures_are_png_files_in_a_folder_that_is_made(tmp_path):
    run = stored(ensemble(), tmp_path / "run")
    folder = tmp_path / "new" / "figures"
    assert save_figures([run], folder) == [folder / "law.png"]
    assert (folder / "law.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_to_draw_makes_no_folder(tmp_path):
    run = stored(training(), tmp_path / "run")
    with pytest.raises(StabilityProbeError, match="the runs hold no records to draw"):
        save_figures([run], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    run = stored(ensemble(), tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StabilityProbeError, match="file/figures: cannot be written"):
        save_figures([run], tmp_path / "file" / "figures")
    assert (tmp_path / "file").read_text() == "mine"
