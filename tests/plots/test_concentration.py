import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from stability_probe.plots.concentration import plot_concentration
from stability_probe.plots.figures import BOUND
from stability_probe.verify.decays import coverage_table, fit_decays, slopes_by_rho

RHOS = (0.1, 0.2, 0.3, 0.5)


def tables(depths=(1, 2, 4), count=400, m=(64, 128)):
    rng = np.random.default_rng(0)
    cells = {
        (w, n): np.exp(rng.normal(0, (14 * n / w) ** 0.5, (count, n + 1)))
        for w in m
        for n in depths
    }
    table = coverage_table(cells, RHOS)
    slopes = fit_decays(table, resamples=5).frame()
    sides = [slopes_by_rho(table, side=side).assign(side=side) for side in ("lower", "upper")]
    return table, slopes.assign(derived=0.1 / slopes.n_skips), pd.concat(sides).assign(relative=1.0)


def test_what_is_shown():
    table, slopes, by_rho = tables()
    figure = plot_concentration(table, slopes, by_rho)
    assert type(figure) is Figure
    assert plt.get_fignums() == []
    decay, sides, depth = figure.axes
    points = np.concatenate([np.asarray(found.get_offsets()) for found in decay.collections])
    failed = table[(table.event == "all") & (table.side == "both") & (table.failures > 0)]
    expected = np.stack([failed.m_rho2, failed.failures / failed.networks], 1)
    np.testing.assert_allclose(np.sort(points, 0), np.sort(expected, 0))
    assert len(decay.lines) == len(slopes)
    y, p = decay.lines[0].get_data()
    fit = slopes.iloc[0]
    np.testing.assert_allclose(p, np.minimum(1, fit.prefactor * np.exp(-fit.slope * y)))
    assert [len(found.get_offsets()) for found in sides.collections] == [
        (by_rho.side == side).sum() for side in ("upper", "lower")
    ]
    rho, upper = sides.lines[0].get_data()
    np.testing.assert_allclose(upper, (np.log(1 + rho) / rho) ** 2)
    shown = {line.get_label(): line for line in depth.lines}
    np.testing.assert_allclose(shown["derived: 2 / max$_i$ V$_i$"].get_ydata(), slopes.derived)
    assert same_color(shown["free of N, as printed"].get_color(), BOUND)
    assert list(shown["free of N, as printed"].get_ydata()) == [slopes.slope[0]] * 2


@pytest.mark.parametrize("case", [{"depths": (3,)}, {"count": 3}, {"m": (4,)}])
def test_little_to_show(case):
    figure = plot_concentration(*tables(**case))
    figure.canvas.draw()
    assert len(figure.axes) == 3
