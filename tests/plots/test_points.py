import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from stability_probe.plots import figures, points, tables
from stability_probe.runs import EnsembleConfig, record_ensemble
from stability_probe.verify import gather
from stability_probe.verify.gradient_law import allowed_ratio, gradient_law_table
from tests.oracles.evidence import complete, ensemble, gradients, relabelled, trace

LAW = tables.law_spread([ensemble(), ensemble(kappa=(1.0,) * 3, scheme="unscaled")])
BY_BLOCK = pd.DataFrame(
    {
        "scheme": "unscaled",
        "block": ["a", "a", "b", "b"],
        "level": [1, 2, 1, 2],
        "predicted": [4.0, 2.0, 3.0, 3.0],
        "measured": [4.2, 2.1, 2.9, 3.3],
        "error": 0.1,
        "allowed": 1.5,
    }
)
SAMPLES = tables.gradient_energies([gradients(), relabelled(gradients(), scheme="unscaled")])
RUNS = pd.DataFrame(
    {
        "scheme": ["good", "good", "bad", "calm"],
        "run": ["1", "2", "3", "4"],
        "range": [2.0, 4.0, 5.0, 1.0],
        "loss": [0.2, 0.4, 0.5, 0.6],
    }
)
FIGURES = {
    "band": (lambda table: points.plot_law_band(table, 0.5), LAW),
    "gradient law": (points.plot_gradient_law, BY_BLOCK),
    "gradient order": (points.plot_gradient_order, SAMPLES),
    "tradeoff": (points.plot_tradeoff, RUNS),
}


def figure(name):
    make, table = FIGURES[name]
    return make(table)


def artist(ax, label):
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))[label]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_shows_and_leaves_no_trace(name):
    make, table = FIGURES[name]
    given = table.copy()
    drawn = make(table)
    drawn.draw_without_rendering()
    assert type(drawn) is Figure and plt.get_fignums() == []
    pd.testing.assert_frame_equal(table, given)
    assert drawn.get_suptitle()
    for ax in drawn.axes:
        assert ax.get_xlabel() or not ax.get_subplotspec().is_last_row()
        assert ax.get_ylabel() or not ax.get_subplotspec().is_first_col()
    (legend,) = drawn.legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == {name for ax in drawn.axes for name in ax.get_legend_handles_labels()[1]}


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("band", "explicit law"),
        ("gradient law", "explicit law of Theorem 3.3"),
        ("gradient order", "bound of Theorem 3.3, calibrated"),
    ],
)
def test_the_bound_is_on_the_same_axes_in_its_colour(name, bound):
    for ax in figure(name).axes:
        assert same_color(artist(ax, bound).get_color(), figures.BOUND)
        assert len(ax.get_legend_handles_labels()[1]) > 1


def test_the_band_is_around_the_law_and_every_network_is_drawn():
    drawn = figure("band")
    ax = drawn.axes[0]
    mine = LAW[LAW.scheme == ax.get_title()]
    edges = artist(ax, "band of Theorem 3.1, ρ = 0.5").get_paths()[0].vertices[:, 1]
    law = mine.groupby("level").law.first()
    assert edges.min() == pytest.approx(0.25 * law.min())
    assert edges.max() == pytest.approx(2.25 * law.max())
    offsets = artist(ax, "one random network").get_offsets()
    np.testing.assert_array_equal(np.round(offsets[:, 0]), mine.level)
    np.testing.assert_array_equal(offsets[:, 1], mine.energy)


def test_a_gradient_on_its_bound_lies_on_the_line():
    drawn = points.plot_gradient_order(SAMPLES.assign(measured=SAMPLES.bound))
    for ax in drawn.axes:
        x, y = artist(ax, "bound of Theorem 3.3, calibrated").get_data()
        np.testing.assert_array_equal(x, y)
        offsets = artist(ax, "measured, level 1").get_offsets()
        np.testing.assert_array_equal(offsets[:, 0], offsets[:, 1])


def test_schemes_that_another_beats_in_both_are_not_joined():
    (ax,) = figure("tradeoff").axes
    front = artist(ax, "beaten by none in both (means)")
    np.testing.assert_allclose(front.get_xdata(), [1, 3])
    np.testing.assert_allclose(front.get_ydata(), [0.6, 0.3])


@pytest.mark.parametrize(("largest", "scale"), [(9.0, "linear"), (11.0, "log")])
def test_the_range_is_logarithmic_where_it_spans_decades(largest, scale):
    (ax,) = points.plot_tradeoff(RUNS.assign(range=[1.0, 1.0, largest, 1.0])).axes
    assert ax.get_xscale() == scale


class TestTables:
    def test_law_spread_has_the_mean_that_the_law_has(self):
        run = ensemble()
        spread, law = tables.law_spread([run]), tables.law([run])
        by_level = spread.groupby("level")
        np.testing.assert_allclose(by_level.energy.mean(), law.measured)
        np.testing.assert_allclose(by_level.law.first(), law.predicted)
        assert spread.network.nunique() == 60

    def test_gradient_law_has_every_block_of_every_scheme(self, tmp_path):
        config = EnsembleConfig(networks=4, m=16, n_skips=2, samples=2)
        found = gather(record_ensemble(config, ["unscaled", "cs:0.5"], tmp_path))
        table = tables.gradient_law(found)
        assert list(table.block) == ["a", "a", "b", "b"] * 2
        assert list(table.level) == [1, 2] * 4
        law, measured = gradient_law_table(found[0])
        np.testing.assert_allclose(table.predicted[:4], law.mean(axis=1))
        np.testing.assert_allclose(table.measured[:4], measured.mean(axis=1))
        np.testing.assert_allclose(table.error[:4], measured.std(axis=1, ddof=1) / 2)
        assert table.allowed[0] == pytest.approx(allowed_ratio(found[0])[1])

    def test_tradeoff(self):
        run = trace()
        (row,) = tables.tradeoff([run]).itertuples()
        energy, loss = run.series("energy", "h")[0], run.series("loss", "loss")[0]
        last = energy.index.max()
        settled = energy[energy.index > last / 6]
        assert row.range == pytest.approx(np.ptp(settled) / settled.mean())
        assert row.loss == pytest.approx(loss[loss.index > 0.75 * last].mean())
        assert row.scheme == "CS (κ = 0.7)"

    def test_tradeoff_leaves_out_what_diverged(self):
        diverged = trace()
        frame = diverged.frame.copy()
        frame.loc[frame.metric == "energy", "value"] = np.inf
        broken = type(diverged)("broken", frame, diverged.info)
        assert list(tables.tradeoff([complete(), broken]).run) == [complete().name]
