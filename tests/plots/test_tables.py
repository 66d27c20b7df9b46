import numpy as np
import pandas as pd
import pytest

from stability_probe.plots import tables
from stability_probe.verify import Evidence
from stability_probe.verify.feature_band import fit_bands
from stability_probe.verify.gradients import Gradients
from tests.oracles.evidence import (
    KAPPA,
    altered,
    band,
    bare,
    chain,
    checkpoint,
    complete,
    ensemble,
    gains,
    gradients,
    relabelled,
    tail_sums,
    trace,
    training,
    without,
)


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        ("unscaled", "unscaled"),
        ("inverse-sqrt2", "1/√2"),
        ("cs:0.7", "CS (κ = 0.7)"),
        ("uniform:0.5", "uniform (κ = 0.5)"),
        ("uniform:0", "no skips (κ = 0)"),
        ("ls", "LS (learned)"),
        ("ls-non-shared", "LS (one gate a skip)"),
        ("something else", "something else"),
    ],
)
def test_scheme_label(scheme, label):
    assert tables.scheme_label(training(scheme=scheme)) == label


def test_scheme_label_of_records_without_a_run():
    assert tables.scheme_label(bare(trace())) == "records"


class TestFeatureTraces:
    def test_energies(self):
        run = trace()
        table = tables.feature_traces([run])
        assert set(table.columns) == {"scheme", "level", "step", "energy", "lower", "upper"}
        wide = table.pivot(index="step", columns="level", values="energy")
        np.testing.assert_array_equal(wide, run.series("energy", "h"))
        assert set(table.scheme) == {"CS (κ = 0.7)"}

    def test_bands_are_there_where_they_were_measured(self):
        run = complete()
        table = tables.feature_traces([run])
        shown = table.dropna(subset=["lower"])
        assert set(shown.step) == {1, 50, 100}
        assert set(shown.level) == {0, 1, 2, 3}
        fitted = fit_bands(run)
        sums = tail_sums(KAPPA)
        for row in shown.itertuples():
            b = fitted[[1, 50, 100].index(row.step)]
            line = b.c1 * 32 * sums[row.level] + b.c2  # the run's mean ‖x_t‖² is 32
            assert row.lower == pytest.approx((1 - b.rho) ** 2 * line)
            assert row.upper == pytest.approx((1 + b.rho) ** 2 * line)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_no_bands_from_broken_energies(self, value):
        table = tables.feature_traces([altered(complete(), "sample_energy", "h", value, stat="s2")])
        assert table.lower.isna().all() and table.energy.notna().all()

    def test_no_bands_from_zero_energies(self):
        table = tables.feature_traces([altered(complete(), "sample_energy", "h", 0.0, stat="s2")])
        assert table.lower.isna().all()

    def test_runs_stand_below_each_other(self):
        table = tables.feature_traces([trace(), trace(scheme="unscaled", steps=7)])
        assert table.groupby("scheme").step.max().to_dict() == {"CS (κ = 0.7)": 100, "unscaled": 7}


class TestGradientEnergies:
    def test_the_last_step_with_its_bound(self):
        run = gradients(50)
        table = tables.gradient_energies([run])
        assert list(table.columns) == ["scheme", "block", "level", "sample", "measured", "bound"]
        assert len(table) == 2 * 3 * 50
        bounds = Gradients.of(run).bounds()
        for q in "ab":
            mine = table[table.block == q].pivot(index="level", columns="sample")
            assert list(mine.index) == [1, 2, 3]
            np.testing.assert_array_equal(mine.measured, run.samples("sample_grad_energy", q)[-1])
            bound = np.stack([bounds[q, i][-1] for i in (1, 2, 3)])
            np.testing.assert_array_equal(mine.bound, bound)

    def test_by_hand(self):
        table = tables.gradient_energies([gradients(noise=0)])
        np.testing.assert_allclose(table.measured, table.bound)

    def test_nothing_recorded(self):
        assert tables.gradient_energies([trace()]).empty
        assert tables.gradient_energies([]).empty

    def test_one_kind_of_block_alone(self):
        table = tables.gradient_energies([without(gradients(), "sample_grad_energy/b")])
        assert set(table.block) == {"a"}


class TestSensitivities:
    def test_by_hand(self):
        table = tables.sensitivities([chain()])
        assert list(table.columns) == ["scheme", "step", "sample", "quantity", "value"]
        assert set(table.step) == {1, 50, 100} and set(table["sample"]) == set(range(8))
        values = table.groupby("quantity", sort=False).value.unique()
        assert [list(v) for v in values] == [[16.0], [9.0], [4.0], [1.0]]
        assert [name.split(":")[0] for name in values.index] == [
            "Theorem 3.4", "block by block", "σ$_{max}$(J), exact", "measured",
        ]  # fmt: skip

    def test_steps_and_samples_stay_together(self):
        exact = np.arange(1.0, 25).reshape(3, 8)
        table = tables.sensitivities([chain(exact=exact)])
        mine = table[table.quantity.str.startswith("σ")]
        wide = mine.pivot(index="step", columns="sample", values="value")
        np.testing.assert_array_equal(wide, exact)

    def test_nothing_recorded(self):
        assert tables.sensitivities([trace()]).empty


class TestCoefficients:
    def test_by_hand(self):
        run = training(gains([1.0, 0.5], steps=[1, 2], spread=0.2), kappa=[1.0, 0.5])
        table = tables.coefficients([run]).sort_values(["step", "level"])
        assert list(table.step) == [1, 1, 2, 2] and list(table.level) == [1, 2, 1, 2]
        np.testing.assert_allclose(table["mean"], [1, 0.5] * 2)
        np.testing.assert_allclose(table["min"], [0.8, 0.4] * 2)
        np.testing.assert_allclose(table["max"], [1.2, 0.6] * 2)
        assert not table.learned.any()

    def test_learned_ones_are_marked(self):
        table = tables.coefficients([trace(), relabelled(trace(scheme="ls"), kappa=None)])
        assert table.groupby("scheme").learned.first().to_dict() == {
            "CS (κ = 0.7)": False, "LS (learned)": True,
        }  # fmt: skip


class TestLosses:
    def test_by_hand(self):
        table = tables.losses([trace(steps=4)])
        assert list(table.step) == [1, 2, 3, 4]
        np.testing.assert_allclose(table.loss, [1, 1 / 2, 1 / 3, 1 / 4])
        assert set(table.scheme) == {"CS (κ = 0.7)"} and set(table.run) == {"cs:0.7"}

    def test_nothing_recorded(self):
        assert tables.losses([band()]).empty
        assert tables.losses([]).empty
        assert len(tables.losses([band(), trace(steps=4)])) == 4


class TestLaw:
    def test_by_hand(self):
        table = tables.law([ensemble(4, kappa=(1.0, 0.5))])
        assert list(table.columns) == ["scheme", "level", "predicted", "measured", "error"]
        np.testing.assert_allclose(table.predicted, [2.25, 1.25, 1])
        run = ensemble(4, kappa=(1.0, 0.5))
        ratio = run.series("energy", "h").to_numpy() / run.series("energy", "x").to_numpy()
        np.testing.assert_allclose(table.measured, ratio.sum(0) / 4)
        variance = ((ratio - ratio.mean(0)) ** 2).sum(0) / 3
        np.testing.assert_allclose(table.error, np.sqrt(variance / 4))

    def test_one_network_has_no_error(self):
        assert list(tables.law([ensemble(1)]).error) == [0] * 4

    def test_the_output_is_level_0(self):
        table = tables.law([ensemble(noise=0)])
        pd.testing.assert_series_equal(table.measured, table.predicted, check_names=False)
        assert table.measured.is_monotonic_decreasing and list(table.level) == [0, 1, 2, 3]


def test_noise_levels_of_a_probe_that_was_killed():
    run = checkpoint(noise_levels=(50.0, 500.0, 950.0))
    begun = Evidence(run.name, run.frame[run.frame.step <= 2], run.info)
    assert tables.noise_level_names(begun) == ["t = 50", "t = 500"]
    assert [part.info["scheme"] for part in tables.by_noise_level(begun)] == ["t = 50", "t = 500"]
    assert set(tables.hierarchy(begun).noise_level) == {"t = 50", "t = 500"}
