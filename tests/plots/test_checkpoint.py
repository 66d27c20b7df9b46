"""Figures of one network at several noise levels."""

import os

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from stability_probe.plots import checkpoint as figures
from stability_probe.plots import tables
from stability_probe.plots.figures import BOUND, MEASURED
from stability_probe.verify import Evidence
from tests.oracles.evidence import altered, checkpoint, relabelled, sampled, without

FIGURES = {
    "plot_hierarchy": tables.hierarchy,
    "plot_paths": tables.paths,
    "plot_counterfactual": tables.counterfactual,
    "plot_energies": tables.energies,
}
CASES = {
    "three levels": lambda: checkpoint(),
    "one level": lambda: checkpoint(noise_levels=(0.5,)),
    "no level": lambda: relabelled(checkpoint(noise_levels=(0.0,)), noise_levels=None),
}
every = pytest.mark.parametrize("name", FIGURES)


def draw(name, evidence):
    figure = getattr(figures, name)(FIGURES[name](evidence))
    figure.draw_without_rendering()
    return figure


@every
@pytest.mark.parametrize("case", CASES)
class TestEveryFigure:
    def test_leaves_no_trace(self, name, case, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        table, settings = FIGURES[name](CASES[case]()), dict(mpl.rcParams)
        given = table.copy()
        figure = getattr(figures, name)(table)
        figure.draw_without_rendering()
        assert type(figure) is Figure
        assert plt.get_fignums() == []
        assert dict(mpl.rcParams) == settings
        assert os.listdir(tmp_path) == []
        pd.testing.assert_frame_equal(table, given)

    def test_says_what_it_shows(self, name, case):
        figure = draw(name, CASES[case]())
        assert figure.get_suptitle()
        assert figure.axes[0].get_ylabel()
        shown = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
        assert shown == set(figure.axes[0].get_legend_handles_labels()[1])
        assert len(shown) >= 2  # bound and measurement
        if name != "plot_hierarchy":
            titles = [ax.get_title() for ax in figure.axes]
            known = {"three levels": ["t = 50", "t = 500", "t = 950"], "one level": ["t = 0.5"],
                     "no level": ["no noise level"]}  # fmt: skip
            assert titles == known[case]


def line(ax, label):
    return next(handle for handle in ax.lines if handle.get_label() == label)


def test_hierarchy_values_and_colours():
    ax = draw("plot_hierarchy", checkpoint()).axes[0]
    for label, value, colour in (
        ("Theorem 3.4", 16, BOUND), ("path by path", 5.5, None), ("σ$_{max}$(J), exact", 4, None),
        ("measured, random directions", 1, MEASURED), ("block by block", 9, None),
    ):  # fmt: skip
        drawn = line(ax, label)
        np.testing.assert_allclose(drawn.get_ydata(), [value] * 3)
        assert colour in (None, drawn.get_color())
    assert ax.get_yscale() == "log"


def test_hierarchy_without_paths():
    ax = draw("plot_hierarchy", without(checkpoint(), "path", "path_gap")).axes[0]
    assert "path by path" not in ax.get_legend_handles_labels()[1]


def test_paths_are_bars_beside_the_exact_norm():
    ax = draw("plot_paths", checkpoint()).axes[1]
    assert [bar.get_height() for bar in ax.patches] == [3.0, 1.5, 1.0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "mid"]
    np.testing.assert_array_equal(line(ax, "σ$_{max}$(J), exact").get_ydata(), [4, 4])


def test_paths_around_have_a_bar_where_there_are_some():
    around = altered(checkpoint(), "path", "around", 0.5)
    ax = draw("plot_paths", around).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "mid", "around"]
    assert tables.paths(without(checkpoint(), "path")).empty


def test_counterfactual_is_relative_to_the_network_itself():
    """‖h_0‖² = 2S + 3 with S = 1.25 s²."""
    ax = draw("plot_counterfactual", checkpoint(noise=0)).axes[0]
    drawn = line(ax, "‖h$_{0}$‖², measured")
    s = np.array([0, 0.25, 0.5, 0.71, 1])
    np.testing.assert_allclose(drawn.get_xdata(), s**2)
    np.testing.assert_allclose(drawn.get_ydata(), (2.5 * s**2 + 3) / 5.5)
    fitted = line(ax, "line through ‖h$_{0}$‖²")
    np.testing.assert_allclose(fitted.get_ydata(), [3 / 5.5, 1.0])
    assert "‖h$_{2}$‖², measured" not in ax.get_legend_handles_labels()[1]  # no skip feeds it
    assert tables.counterfactual(without(checkpoint(), "counterfactual_energy")).empty


def test_counterfactual_shows_the_level_that_a_line_fits_worst():
    """Of five levels the first, the middle and the last are drawn, and level 3, which is bent."""
    evidence = checkpoint(kappa=(1.0,) * 5, noise=0)
    assert set(tables.counterfactual(evidence).level) == {0, 2, 4}
    frame = evidence.frame.copy()
    bent = (frame.metric == "counterfactual_energy") & (frame.level == 3) & (frame.site == "s=0.5")
    frame.loc[bent, "value"] *= 3
    bent_one = Evidence(evidence.name, frame, evidence.info)
    assert set(tables.counterfactual(bent_one).level) == {0, 2, 3, 4}


def test_energies_lie_in_their_band():
    table = tables.energies(checkpoint())
    assert len(table) == 3 * 3 * 40
    assert table.energy.between(table.lower, table.upper).mean() > 0.9
    ax = draw("plot_energies", checkpoint(noise=0)).axes[0]
    np.testing.assert_allclose(line(ax, "measured").get_ydata(), [55, 35, 30])


def test_a_band_that_could_not_be_fitted():
    broken = altered(checkpoint(), "sample_energy", "h", 0.0, stat="s3")
    assert tables.energies(broken).lower.isna().all()
    draw("plot_energies", broken)


def test_blame_has_a_place_for_the_middle():
    bare = checkpoint()
    shares = [
        sampled("path_share", site, np.full((3, len(values), 40), 1 / 3), first_level=first)
        for site, values, first in (("skip", (1, 2), 1), ("mid", (0,), 0))
    ]
    read = [
        sampled("sample_energy", site, np.ones((3, 2, 40)), first_level=1) for site in ("ku", "z")
    ]
    frame = pd.concat([bare.frame, *shares, *read])
    evidence = Evidence(bare.name, frame, bare.info)
    table = tables.blame(evidence)
    at = table[(table.noise_level == table.noise_level.iloc[0]) & (table.share == "bound")]
    assert list(at.level) == [1, 2, 3]
    assert at.value.sum() == pytest.approx(1)
    assert set(table[table.share == "energy"].level) == {1, 2}
    ax = figures.plot_blame(table).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "mid"]
