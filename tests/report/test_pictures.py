import base64

import pytest

from stability_probe.report import pictures
from tests.oracles.evidence import ensemble, relabelled, trace


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(pictures, "DPI", 40)


def test_a_figure_as_a_data_uri():
    (picture,) = pictures.pictures([ensemble(5)])
    kind, _, data = picture.source.partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data)[:4] == b"\x89PNG"
    assert picture.caption.title == "Random networks: formula and measurement"
    assert 400 < picture.width < 700 and 300 < picture.height < 600  # 5.6 × 5.5 inches


def test_which_run_of_a_scheme_is_shown():
    names = [relabelled(trace(), seed=seed) for seed in (0, 1)]
    assert pictures._whose("features", names) == "Of each scheme one run is shown: cs:0.7."
    assert pictures._whose("loss", names) == pictures._whose("features", names[:1]) == ""
