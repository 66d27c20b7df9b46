import pytest

from stability_probe import StabilityProbeError
from stability_probe.cli.figures import save_figures
from tests.oracles.evidence import checkpoint, ensemble, stored, training


def test_figures_are_png_files_in_a_folder_that_is_made(tmp_path):
    run = stored(ensemble(), tmp_path / "run")
    folder = tmp_path / "new" / "figures"
    assert save_figures([run], folder) == [folder / "law.png"]
    assert (folder / "law.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_names_of_runs_make_plain_names_of_files(tmp_path):
    runs = [stored(checkpoint(), tmp_path / name) for name in ("a", "t: 1", "t/1", "u/1")]
    names = [file.name for file in save_figures(runs, tmp_path / "figures")]
    assert len({*names}) == len(names) == len(list((tmp_path / "figures").iterdir()))
    assert not any(set(name) & set(" :/") for name in names)
    assert sum(name.endswith("-t-1.png") for name in names) == len(names) / 4
    assert sum(name.endswith("-t-1-2.png") for name in names) == len(names) / 4


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
