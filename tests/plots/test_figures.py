import os
from functools import cache

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color, to_hex
from matplotlib.figure import Figure

from stability_probe.plots import figures, tables
from stability_probe.verify.oscillation import oscillation_table
from tests.oracles.evidence import (
    altered,
    chain,
    complete,
    ensemble,
    gradients,
    relabelled,
    trace,
)

NAN, INF = float("nan"), float("inf")


def oscillations(runs):
    return pd.concat(
        oscillation_table([run]).assign(scheme=tables.scheme_label(run)) for run in runs
    )


FROM_RUNS = {
    "plot_feature_traces": tables.feature_traces,
    "plot_oscillation": oscillations,
    "plot_gradients": tables.gradient_energies,
    "plot_sensitivity": tables.sensitivities,
    "plot_coefficients": tables.coefficients,
    "plot_losses": tables.losses,
}
TRAINED = {
    "one scheme": lambda: [complete()],
    "several schemes": lambda: [
        complete(),
        relabelled(complete("ls", (0.6, 0.5, 0.4)), kappa=None),
        complete("uniform:0", (0.0,) * 3),
    ],
    "no skips": lambda: [complete("uniform:0", (0.0,) * 3)],
    "one skip": lambda: [complete("unscaled", (1.0,))],
}
RANDOM = {
    "one scheme": lambda: [ensemble()],
    "several schemes": lambda: [ensemble(), ensemble(kappa=(1.0,) * 3, scheme="unscaled")],
    "no skips": lambda: [ensemble(kappa=(0.0,) * 3, scheme="uniform:0")],
    "one network": lambda: [ensemble(1)],
}
CASES = [(name, case) for name in FROM_RUNS for case in TRAINED] + [
    ("plot_law", case) for case in RANDOM
]


@cache
def table_of(name, case):
    if name == "plot_law":
        return tables.law(RANDOM[case]())
    return FROM_RUNS[name](TRAINED[case]())


def make(name, table):
    return getattr(figures, name)(table)


@cache
def figure_of(name, case):
    return make(name, table_of(name, case))


def draw(name, table):
    """The figure, laid out as for a file: some problems show only then."""
    figure = make(name, table)
    figure.draw_without_rendering()
    return figure


def labels(ax):
    return ax.get_legend_handles_labels()[1]


def artist(ax, label):
    handles, names = ax.get_legend_handles_labels()
    return dict(zip(names, handles, strict=True))[label]


@pytest.mark.parametrize(("name", "case"), CASES)
class TestEveryFigure:
    def test_leaves_no_trace(self, name, case, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        table = table_of(name, case)
        given, settings = table.copy(), dict(mpl.rcParams)
        figure = draw(name, table)
        assert type(figure) is Figure
        assert plt.get_fignums() == []
        assert dict(mpl.rcParams) == settings
        assert os.listdir(tmp_path) == []
        pd.testing.assert_frame_equal(table, given)

    def test_says_what_it_shows(self, name, case):
        figure = figure_of(name, case)
        assert figure.get_suptitle()
        for ax in figure.axes:
            place = ax.get_subplotspec()
            assert ax.get_xlabel() or not place.is_last_row()
            assert ax.get_ylabel() or not place.is_first_col()
        legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
        shown = {text.get_text() for legend in legends for text in legend.get_texts()}
        assert shown and shown == {name for ax in figure.axes for name in labels(ax)}


@pytest.mark.parametrize(
    ("name", "measured", "bound"),
    [
        ("plot_feature_traces", "measured, batch mean", "band of Theorem 3.1, fitted"),
        ("plot_oscillation", "CS (κ = 0.7)", "order of Theorem 3.1: ∝ ‖x$_t$‖²Σκ²"),
        ("plot_gradients", "measured", "bound of Theorem 3.3, calibrated"),
        ("plot_sensitivity", "σ$_{max}$(J), exact", "Theorem 3.4: Σκᵢ M₀ⁱ + M₀ᴺ L₀"),
        ("plot_law", "CS (κ = 0.7)", "explicit law of Theorem 3.1"),
    ],
)
def test_bound_and_measurement_share_axes(name, measured, bound):
    figure = figure_of(name, "one scheme")
    assert figure.axes
    for ax in figure.axes:
        assert {measured, bound} <= set(labels(ax))


@pytest.mark.parametrize("name", ["plot_oscillation", "plot_losses", "plot_law"])
def test_schemes_have_colours_of_their_own_beside_the_bounds(name):
    figure = figure_of(name, "several schemes")
    colours = {}
    for ax in figure.axes:
        for label in labels(ax):
            if "Theorem" not in label:
                colours.setdefault(label, set()).add(colour_of(artist(ax, label)))
    assert len(colours) >= 2
    assert all(len(mine) == 1 for mine in colours.values())  # the same in every panel
    distinct = {colour for mine in colours.values() for colour in mine}
    assert len(distinct) == len(colours)
    assert to_hex(figures.BOUND) not in distinct


def colour_of(handle):
    if hasattr(handle, "get_facecolor"):
        return to_hex(np.atleast_2d(handle.get_facecolor())[0])
    return to_hex(handle[0].get_color() if hasattr(handle, "lines") else handle.get_color())


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("plot_oscillation", "order of Theorem 3.1: ∝ ‖x$_t$‖²Σκ²"),
        ("plot_gradients", "bound of Theorem 3.3, calibrated"),
        ("plot_sensitivity", "Theorem 3.4: Σκᵢ M₀ⁱ + M₀ᴺ L₀"),
        ("plot_law", "explicit law of Theorem 3.1"),
    ],
)
def test_the_bound_has_the_bounds_colour(name, bound):
    for ax in figure_of(name, "one scheme").axes:
        assert same_color(artist(ax, bound).get_color(), figures.BOUND)


@pytest.mark.parametrize("name", FROM_RUNS)
def test_scales(name):
    logarithmic = name != "plot_coefficients"
    for ax in figure_of(name, "several schemes").axes:
        assert ax.get_yscale() == ("log" if logarithmic else "linear")


class TestFeatureTraces:
    def test_rows_are_levels_and_columns_schemes(self):
        figure = figure_of("plot_feature_traces", "several schemes")
        assert len(figure.axes) == 3 * 3
        titles = [ax.get_title() for ax in figure.axes]
        assert titles[:3] == ["CS (κ = 0.7)", "LS (learned)", "no skips (κ = 0)"]
        assert not any(titles[3:])
        rows = [figure.axes[i].get_ylabel() for i in (0, 3, 6)]
        assert "0" in rows[0] and "output side" in rows[0]
        assert "2" in rows[1] and "inside the decoder" in rows[1]
        assert "3" in rows[2] and "middle block" in rows[2]

    def test_lines_are_the_tables(self):
        table = tables.feature_traces([complete()])
        ax = make("plot_feature_traces", table).axes[0]
        mine = table[table.level == 0]
        line = artist(ax, "measured, batch mean")
        np.testing.assert_array_equal(line.get_xdata(), mine.step)
        np.testing.assert_array_equal(line.get_ydata(), mine.energy)
        (upper,) = (other for other in ax.lines if other is not line)
        np.testing.assert_array_equal(upper.get_ydata(), mine.upper.dropna())

    @pytest.mark.parametrize("where", [{"step": 90}, {"level": 0}, {}])
    def test_energies_that_are_not_finite(self, where):
        run = altered(complete(), "energy", "h", NAN, **where)
        draw("plot_feature_traces", tables.feature_traces([run]))

    def test_no_bands(self):
        ax = draw("plot_feature_traces", tables.feature_traces([trace()])).axes[0]
        assert len(artist(ax, "measured, batch mean").get_ydata()) == 100


class TestOscillation:
    def test_points_are_the_tables(self):
        runs = [complete(), complete("unscaled", (1.0,) * 3)]
        table = oscillations(runs)
        figure = make("plot_oscillation", table)
        assert len(figure.axes) == 3
        for ax, level in zip(figure.axes, (0, 2, 3), strict=True):
            for scheme in table.scheme.unique():
                mine = table[(table.level == level) & (table.scheme == scheme)]
                (point,) = artist(ax, scheme).get_offsets()
                assert tuple(point) == (mine.skip_energy.item(), mine["range"].item())

    def test_the_order_is_a_line_of_slope_1_through_the_points(self):
        table = oscillations([trace(), trace((1.0,) * 3, scheme="unscaled")])  # range = ‖x‖²Σκ²
        line = artist(
            make("plot_oscillation", table).axes[0], "order of Theorem 3.1: ∝ ‖x$_t$‖²Σκ²"
        )
        np.testing.assert_allclose(line.get_ydata(), line.get_xdata())
        assert line.get_xdata()[0] < table.skip_energy[table.level == 0].min()
        assert line.get_xdata()[1] > table.skip_energy.max()

    def test_without_skips_there_is_no_order(self):
        table = oscillations([trace((0.0,) * 3, scheme="uniform:0", amplitude=2.0)])
        for ax in draw("plot_oscillation", table).axes:
            assert labels(ax) == ["no skips (κ = 0)"]
            left, right = ax.get_xlim()
            assert left < 0 < right

    @pytest.mark.parametrize(("value", "where"), [(NAN, {}), (INF, {"step": 100})])
    def test_energies_that_are_not_finite(self, value, where):
        run = altered(complete(), "energy", "h", value, **where)
        draw("plot_oscillation", oscillations([run]))

    def test_ten_schemes(self):
        runs = [trace((k / 10,) * 3, scheme=f"uniform:{k / 10}") for k in range(1, 11)]
        assert len(labels(make("plot_oscillation", oscillations(runs)).axes[0])) == 11


class TestGradients:
    def test_lines_are_medians_over_samples(self):
        table = tables.gradient_energies([gradients()])
        figure = make("plot_gradients", table)
        assert [ax.get_ylabel()[:7] for ax in figure.axes] == ["encoder", "decoder"]
        for ax, q in zip(figure.axes, "ab", strict=True):
            mine = table[table.block == q].groupby("level")
            for label, column in (("measured", "measured"), ("bound of Theorem 3.3, calibrated",
                                                             "bound")):  # fmt: skip
                np.testing.assert_allclose(artist(ax, label).get_ydata(), mine[column].median())

    def test_energies_that_are_not_finite(self):
        run = altered(gradients(), "sample_grad_energy", "a", NAN)
        draw("plot_gradients", tables.gradient_energies([run]))


class TestSensitivity:
    def test_lines_are_medians_and_the_slack_is_written(self):
        exact = np.ones((3, 8)) * [[2.0], [4.0], [8.0]]
        figure = make("plot_sensitivity", tables.sensitivities([chain(exact=exact)]))
        (ax,) = figure.axes
        expected = {
            "Theorem 3.4: Σκᵢ M₀ⁱ + M₀ᴺ L₀": [16, 16, 16],
            "block by block": [9, 9, 9],
            "σ$_{max}$(J), exact": [2, 4, 8],
            "measured: largest ‖Δout‖/ε": [1, 1, 1],
        }
        for label, value in expected.items():
            np.testing.assert_array_equal(artist(ax, label).get_ydata(), value)
            np.testing.assert_array_equal(artist(ax, label).get_xdata(), [1, 50, 100])
        assert [text.get_text() for text in ax.texts] == ["slack at the end: 2×"]

    def test_norms_that_are_not_finite(self):
        draw("plot_sensitivity", tables.sensitivities([chain(exact=NAN)]))


class TestCoefficients:
    def test_constants_have_one_panel_and_learned_ones_a_second(self):
        assert len(figure_of("plot_coefficients", "one scheme").axes) == 1
        figure = figure_of("plot_coefficients", "several schemes")
        assert [ax.get_title() for ax in figure.axes] == [
            "at the end of training", "LS (learned) over training",
        ]  # fmt: skip
        assert labels(figure.axes[1]) == ["level 1", "level 2", "level 3"]

    def test_the_last_step_is_shown(self):
        run = altered(trace(), "kappa", "skip", 0.2, step=100, level=2)
        line = artist(make("plot_coefficients", tables.coefficients([run])).axes[0], "CS (κ = 0.7)")
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), [1, 0.2, 0.49])

    def test_seeds_are_averaged(self):
        other = altered(trace(seed=1), "kappa", "skip", 0.5, level=1)
        table = tables.coefficients([trace(), other])
        line = artist(make("plot_coefficients", table).axes[0], "CS (κ = 0.7)")
        assert line.get_ydata()[0] == pytest.approx(0.75)


@pytest.mark.parametrize("name", ["plot_coefficients", "plot_losses"])
def test_ten_schemes_are_all_drawn(name):
    runs = [trace((k / 10,) * 3, scheme=f"uniform:{k / 10}") for k in range(1, 11)]
    assert len(labels(make(name, FROM_RUNS[name](runs)).axes[0])) == 10


def test_ten_ensembles_are_all_drawn():
    runs = [ensemble(5, kappa=(k / 10,) * 3, scheme=f"uniform:{k / 10}") for k in range(1, 11)]
    assert len(labels(make("plot_law", tables.law(runs)).axes[0])) == 11


class TestLosses:
    def test_the_raw_losses_are_there_and_the_thick_line_is_their_running_mean(self):
        raw, smooth = make("plot_losses", tables.losses([trace()])).axes[0].lines
        np.testing.assert_allclose(raw.get_ydata(), 1 / np.arange(1, 101))
        assert smooth.get_linewidth() > raw.get_linewidth()
        assert (smooth.get_ydata()[1:] > raw.get_ydata()[1:]).all()  # it lags behind a fall

    def test_seeds_share_a_colour_and_a_label(self):
        runs = [relabelled(trace(), seed=seed) for seed in (0, 1)]
        table = tables.losses(runs).assign(run=np.repeat(["a", "b"], 100))
        ax = make("plot_losses", table).axes[0]
        assert len(ax.lines) == 4 and labels(ax) == ["CS (κ = 0.7)"]
        assert len({to_hex(line.get_color()) for line in ax.lines}) == 1

    def test_a_loss_that_is_not_finite(self):
        run = altered(trace(), "loss", "loss", NAN, step=100)
        draw("plot_losses", tables.losses([run]))


class TestLaw:
    def test_points_and_the_law(self):
        table = tables.law([ensemble()])
        ax = make("plot_law", table).axes[0]
        line = artist(ax, "explicit law of Theorem 3.1")
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
        points = artist(ax, "CS (κ = 0.7)")[0]
        np.testing.assert_array_equal(points.get_xdata(), table.predicted)
        np.testing.assert_array_equal(points.get_ydata(), table.measured)

    def test_bars_are_intervals_of_95_percent(self):
        table = tables.law([ensemble()])
        bars = artist(make("plot_law", table).axes[0], "CS (κ = 0.7)")[2][0].get_segments()
        half = [(high[1] - low[1]) / 2 for low, high in bars]
        np.testing.assert_allclose(half, 1.96 * table.error)
