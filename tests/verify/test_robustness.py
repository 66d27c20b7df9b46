import operator

import numpy as np
import pandas as pd
import pytest

from stability_probe.verify import Evidence
from stability_probe.verify.robustness import (
    global_bound,
    robustness_chain,
    robustness_verdict,
    sensitivity_table,
)
from tests.oracles.evidence import (
    altered,
    bare,
    chain,
    joined,
    relabelled,
    sampled,
    trace,
    training,
    with_paths,
)


def one_of(normal, value, point=(1, 5)):
    """Points (3, 8), all `normal` but one."""
    table = np.full((3, 8), float(normal))
    table[point] = value
    return table


class TestChain:
    def test_by_hand(self):
        found = robustness_chain(chain())
        for name, value in {
            "secant": 1,
            "exact": 4,
            "upper.exact": 4,
            "upper.blockwise": 9,
            "upper.paper": 16,
            "lower.paper": 16,
        }.items():
            got = operator.attrgetter(name)(found)
            np.testing.assert_array_equal(got, np.full((3, 8), value), name)
        assert found.ordered.all()

    def test_the_smallest_perturbation_counts(self):
        evidence = chain()
        larger = sampled("secant", "eps=5e-05", np.full((3, 1, 8), 2.0))  # smallest, if not as text
        joined = training(evidence.frame, larger, kappa=(1.0, 0.5))
        np.testing.assert_array_equal(robustness_chain(joined).secant, np.full((3, 8), 2.0))

    def test_gains_of_each_sample_are_used_where_they_depend_on_the_input(self):
        gated = relabelled(altered(chain(), "sample_kappa", "skip", 0.0, stat="s3"), kappa=None)
        expected = np.full((3, 8), 9.0)
        expected[:, 3] = 3 * 2  # the middle path alone
        np.testing.assert_array_equal(robustness_chain(gated).upper.blockwise, expected)

    def test_nothing_recorded(self):
        assert robustness_chain(trace()) is None


class TestVerdict:
    def test_holds(self):
        verdict = robustness_verdict(chain())
        assert (verdict.status, verdict.theorem, verdict.n) == ("HOLDS", "3.4", 8)
        assert (verdict.measured, verdict.bound, verdict.slack) == (4.0, 16.0, 4.0)
        assert verdict.estimate == 1.0
        assert verdict.interval == (pytest.approx(0.025 ** (1 / 8)), 1.0)
        assert "slack 4 at the tightest point, 2.25 block by block" in verdict.advice
        assert "σ_max(J) is 4 times the largest random secant" in verdict.advice

    def test_measured_and_bound_are_those_of_the_typical_point(self):
        verdict = robustness_verdict(chain(exact=one_of(4, 8)))
        assert (verdict.measured, verdict.bound, verdict.slack) == (4.0, 16.0, 4.0)
        assert "slack 2 at the tightest point" in verdict.advice

    def test_without_skips_the_middle_is_left(self):
        verdict = robustness_verdict(chain(kappa=(0.0, 0.0)))
        assert (verdict.status, verdict.bound) == ("HOLDS", 12.0)

    @pytest.mark.parametrize(
        ("broken", "share"),
        [
            ({"exact": 17.0}, 0),  # above the paper's form
            ({"exact": 10.0}, 0),  # above the blocks' own constants
            ({"exact": one_of(4, 10)}, 23 / 24),
            ({"l0": 0.0, "kappa": (0.1, 0.1)}, 0),
            ({"exact": 10.0, "width": 5.0}, 0),
        ],
    )
    def test_one_point_out_of_order_violates(self, broken, share):
        verdict = robustness_verdict(chain(**broken))
        assert verdict.status == "VIOLATED"
        assert verdict.estimate == pytest.approx(share)

    def test_secants_above_the_norm_violate_nothing_and_settle_nothing(self):
        """σ_max(J) bounds their limit alone."""
        verdict = robustness_verdict(chain(secant=one_of(1, 4.1)))
        assert (verdict.status, verdict.estimate) == ("INCONCLUSIVE", 1.0)
        assert "at 1 points a secant of the smallest ε_δ is above σ_max(J)" in verdict.advice

    @pytest.mark.parametrize("within", [{"secant": 4.03}, {"exact": 9.0008}])
    def test_estimation_errors_are_allowed_for(self, within):
        assert robustness_verdict(chain(**within)).status == "HOLDS"

    def test_wrong_kappa_in_run_json(self):
        evidence = chain(exact=8.5)
        assert robustness_verdict(evidence).status == "HOLDS"
        assert robustness_verdict(relabelled(evidence, kappa=[0.0, 0.0])).status == "VIOLATED"

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    def test_broken_norms(self, value):
        verdict = robustness_verdict(chain(exact=one_of(4, value)))
        assert (verdict.status, verdict.n) == ("ASSUMPTION_UNMET", 8)
        assert "not finite at 1 of 24 points" in verdict.advice

    @pytest.mark.parametrize("broken", [{"l0": float("nan")}, {"lip_a": (float("inf"), 1.0)}])
    def test_broken_bounds(self, broken):
        assert robustness_verdict(chain(**broken)).status == "ASSUMPTION_UNMET"

    @pytest.mark.parametrize("broken", [{"secant": float("nan")}, {"width": float("nan")}])
    def test_broken_estimates(self, broken):
        assert robustness_verdict(chain(**broken)).status in ("ASSUMPTION_UNMET", "INCONCLUSIVE")

    @pytest.mark.parametrize(("width", "status"), [(0.039, "HOLDS"), (0.041, "INCONCLUSIVE")])
    def test_norms_that_did_not_settle(self, width, status):
        verdict = robustness_verdict(chain(width=one_of(0, width)))
        assert verdict.status == status
        assert ("did not settle at 1 points" in verdict.advice) == (status == "INCONCLUSIVE")

    def test_nothing_recorded(self):
        verdict = robustness_verdict(trace())
        assert (verdict.status, verdict.n, verdict.measured) == ("INCONCLUSIVE", 0, None)
        assert "set sensitivity_every above 0" in verdict.advice

    def test_records_without_a_run(self):
        verdict = robustness_verdict(bare(chain()))
        assert (verdict.status, verdict.bound, verdict.run) == ("HOLDS", 16.0, "records")

    def test_gates_are_said_to_be_left_out(self):
        note = "the theorem leaves out how gates change with the input"
        assert note in robustness_verdict(relabelled(chain(), kappa=None)).advice
        assert note not in robustness_verdict(chain()).advice


def test_units_are_samples():
    assert robustness_verdict(chain()).n == 8


def test_points_of_one_step():
    evidence = chain()
    first = Evidence("e", evidence.frame.query("step == 1"), evidence.info)
    assert robustness_verdict(first).n == 8


def test_a_norm_that_did_not_settle_violates_nothing():
    """σ_max(J) is estimated from below: a secant above the estimate may be below the truth."""
    verdict = robustness_verdict(chain(secant=4.5, width=1.0))
    assert verdict.status == "INCONCLUSIVE"


class TestPaths:
    def test_pathwise_by_hand(self):
        found = robustness_chain(with_paths(chain(), around=0.5))
        np.testing.assert_array_equal(found.upper.pathwise, np.full((3, 8), 6.0))
        np.testing.assert_array_equal(found.upper.blockwise, np.full((3, 8), 9.5))
        np.testing.assert_array_equal(found.upper.paper, np.full((3, 8), 16.5))
        assert found.upper.paths.shape == (2, 3, 8)
        assert robustness_chain(chain()).upper.pathwise is None

    def test_holds_and_names_the_skip_to_blame(self):
        verdict = robustness_verdict(with_paths(chain()))
        assert verdict.status == "HOLDS"
        assert "path by path 1.38 (median), most of it through skip 1" in verdict.advice
        verdict = robustness_verdict(with_paths(chain(), paths=(1.5, 3.0)))
        assert "most of it through skip 2" in verdict.advice

    @pytest.mark.parametrize(
        "broken",
        [
            {"paths": (1.0, 0.5)},  # 2.5 < exact
            {"paths": (9.0, 1.0)},  # 11 > blockwise
        ],
        ids=["below exact", "above blockwise"],
    )
    def test_violated_where_pathwise_is_out_of_order(self, broken):
        assert robustness_verdict(with_paths(chain(), **broken)).status == "VIOLATED"

    @pytest.mark.parametrize(
        ("dtype", "gap", "status"),
        [
            ("float32", 0.01, "ASSUMPTION_UNMET"),
            ("float32", 1e-4, "HOLDS"),
            ("bfloat16", 0.01, "HOLDS"),
            ("bfloat16", 0.2, "ASSUMPTION_UNMET"),
        ],
    )
    def test_paths_that_do_not_add_up_to_the_jacobian(self, dtype, gap, status):
        verdict = robustness_verdict(relabelled(with_paths(chain(), gap=gap), dtype=dtype))
        assert verdict.status == status
        assert ("two of them share a way" in verdict.advice) == (status == "ASSUMPTION_UNMET")

    @pytest.mark.parametrize("why", [{"kappa": None}, {"skips": [{"kappa": None}, {"kappa": 1.0}]}])
    def test_more_than_a_constant_counts_with_its_norm(self, why):
        norms = sampled(
            "lipschitz", "skip", np.broadcast_to([[[3.0]], [[0.0]]], (2, 1, 8))[None, :, 0]
            .repeat(3, 0), first_level=1,
        )  # fmt: skip
        evidence = relabelled(joined(chain(), training(norms)), **why)
        expected = 3 * 2 + 0 * 2 + 3 * 2
        np.testing.assert_array_equal(
            robustness_chain(evidence).upper.blockwise, np.full((3, 8), expected)
        )

    def test_a_constant_of_the_network_itself_counts(self):
        evidence = relabelled(chain(), skips=[{"kappa": 0.5}, {"kappa": 2.0}])
        assert evidence.kappa == [0.5, 1.0]
        expected = 0.5 * 2 + 1.0 * 2 + 3 * 2
        np.testing.assert_array_equal(
            robustness_chain(evidence).upper.blockwise, np.full((3, 8), expected)
        )


class TestTable:
    def test_by_hand(self):
        rows = sensitivity_table(with_paths(chain(), around=0.25))
        assert len(rows) == 3
        assert rows[0] == {
            "measured": 1.0, "worst": 1.0, "exact": 4.0, "exact_upper": 4.0, "pathwise": 5.75,
            "blockwise": 9.25, "paper": 16.25, "paths": [3.0, 1.5], "middle": 1.0, "around": 0.25,
            "shares": None, "alignment": None, "energy_shares": None, "gap": 1e-6,
        }  # fmt: skip

    def test_means_over_samples(self):
        rows = sensitivity_table(with_paths(chain(exact=one_of(4, 12))))
        assert [row["exact"] for row in rows] == [4.0, 5.0, 4.0]

    def test_without_paths(self):
        row = sensitivity_table(chain())[0]
        assert row["pathwise"] is None
        assert row["paths"] is None
        assert sensitivity_table(trace()) == []


class TestGlobalBound:
    def test_by_hand(self):
        constants = {"lip_a": [2.0, 1.0], "lip_b": [1.0, 1.0], "l0": 3.0, "kappa": [1.0, 0.5]}
        assert global_bound(relabelled(chain(), global_constants=constants)) == 16.0

    @pytest.mark.parametrize("info", [{}, {"global_constants": {"refused": "a norm"}}])
    def test_there_may_be_none(self, info):
        assert global_bound(relabelled(chain(), **info)) is None


def test_every_bound_is_compared_with_every_smaller_quantity():
    """σ_max(J) ≥ 12 is above the blockwise 9, though the pathwise between is unsettled."""
    evidence = with_paths(chain(exact=12.0), paths=(3.0, 1.5))
    upper = sampled("path_upper", "skip", np.full((3, 2, 8), 50.0), first_level=1)
    other = [sampled("path_upper", site, np.full((3, 1, 8), 0.0)) for site in ("mid", "around")]
    unsettled = Evidence(evidence.name, pd.concat([evidence.frame, upper, *other]), evidence.info)
    assert robustness_chain(unsettled).upper.pathwise.min() == 100.0
    assert not robustness_chain(unsettled).ordered.any()
