"""The explicit law of Theorem 3.3: records with a known truth, and random networks."""

import re
from collections import Counter
from functools import cache

import numpy as np
import pandas as pd
import pytest

from stability_probe.runs import EnsembleConfig, record_ensemble
from stability_probe.theory import gradient_energy_law
from stability_probe.verify import Evidence
from stability_probe.verify.gradient_law import (
    allowed_ratio,
    gradient_law_table,
    gradient_law_verdict,
)
from tests.oracles.evidence import KAPPA, altered, gains, relabelled, sampled, without

M = 1024  # the band is 0.8 to 1.25 exp(49/1024) = 1.31


def networks(n=100, *, kappa=KAPPA, factor=1.0, noise=0.3, m=M, merge="add", seed=0, **info):
    """Networks of two samples that obey the law, times `factor` (2, N) and noise of mean 1."""
    rng = np.random.default_rng(seed)
    x, y = (rng.uniform(0.9 * m, 1.1 * m, (n, 1, 2)) for _ in range(2))
    law = np.array(
        [
            [gradient_energy_law(kappa, m, xs, ys, merge=merge).max(2) for xs, ys in pairs]
            for pairs in np.stack([x[:, 0], y[:, 0]], axis=2)
        ]
    )  # networks, samples, 2, N
    g = law * factor * np.exp(noise * rng.normal(size=(n, 1, 2, len(kappa))) - noise**2 / 2)
    steps = range(1, n + 1)
    frames = [
        sampled("sample_energy", "x", x, steps=steps),
        sampled("sample_energy", "target", y, steps=steps),
        sampled("sample_loss", "loss", np.full((n, 1, 2), 2.0), steps=steps),
        *(
            sampled(
                "sample_grad_energy", site, g[:, :, q].swapaxes(1, 2), first_level=1, steps=steps
            )
            for q, site in enumerate("ab")
        ),
        gains(kappa, steps),
    ]
    known = {"kind": "ensemble", "scheme": "cs:0.7", "kappa": list(kappa), "block_gain": 1.0}
    config = {"m": m, "merge": merge}
    return Evidence("cs:0.7", pd.concat(frames), {**known, "config": config, **info})


def at(block, level, factor):
    """`factor` at one block, 1 elsewhere."""
    table = np.ones((2, len(KAPPA)))
    table["ab".index(block), level - 1] = factor
    return table


@pytest.mark.parametrize("merge", ["add", "concat"])
def test_the_law_without_noise(merge):
    evidence = networks(50, noise=0, merge=merge)
    law, measured = gradient_law_table(evidence)
    assert law.shape == (6, 50)
    np.testing.assert_allclose(measured, law, rtol=1e-9)
    verdict = gradient_law_verdict(evidence)
    assert (verdict.theorem, verdict.status, verdict.n) == ("3.3", "HOLDS", 50)
    assert verdict.estimate == pytest.approx(1)
    assert verdict.slack == pytest.approx(1)
    assert verdict.confidence == pytest.approx(1 - 0.05 / 6)


def test_the_allowed_ratio_by_hand():
    low, high = allowed_ratio(networks(2, m=700))
    assert (low, high) == pytest.approx((0.8, 1.25 * np.exp(0.07)))


@pytest.mark.parametrize(
    ("factor", "status"),
    [
        (1.0, "HOLDS"),
        (at("a", 2, 1.5), "VIOLATED"),
        (at("b", 3, 1.5), "VIOLATED"),
        (at("b", 1, 0.5), "VIOLATED"),
        (at("a", 1, 1.05), "HOLDS"),  # what the law itself may be wrong by
        (at("a", 1, 1.3), "INCONCLUSIVE"),
    ],
)
def test_one_block_decides(factor, status):
    verdict = gradient_law_verdict(networks(200, factor=factor, seed=1))
    assert verdict.status == status
    if status != "HOLDS":
        worst = np.abs(np.log(factor)).argmax()
        assert verdict.statistic.endswith(f"at {'ab'[worst // 3]}_{worst % 3 + 1}")
        assert verdict.estimate == pytest.approx(np.ravel(factor)[worst], rel=0.1)
        assert verdict.measured / verdict.bound == pytest.approx(1, rel=0.1)  # the typical block


def test_too_few_networks_to_tell():
    verdict = gradient_law_verdict(networks(50, noise=0.8))
    assert verdict.status == "INCONCLUSIVE"
    assert "too few networks to tell; record " in verdict.advice


def test_false_alarms_are_rare():
    """At the edge of the band, at all blocks at once."""
    edge = allowed_ratio(networks(2))[1]
    trials = 50
    counts = Counter(
        gradient_law_verdict(networks(60, factor=edge, seed=s)).status for s in range(trials)
    )
    assert (counts["VIOLATED"] - 0.05 * trials) / (trials * 0.05 * 0.95) ** 0.5 < 4
    assert counts["HOLDS"] < 0.1 * trials


def test_a_smaller_alpha_widens_the_interval():
    wide, narrow = (gradient_law_verdict(networks(), alpha) for alpha in (0.001, 0.05))
    assert wide.interval[0] < narrow.interval[0] < narrow.interval[1] < wide.interval[1]


@pytest.mark.parametrize("wrong", [{"kappa": [1.0] * 3}, {"kappa": [0.0] * 3}, {"block_gain": 2.0}])
def test_wrong_statements_in_run_json(wrong):
    verdict = gradient_law_verdict(relabelled(networks(), **wrong))
    assert verdict.status == "VIOLATED"
    assert "a premise fails: κ as stated" in verdict.advice


def test_the_naive_law_is_named_for_unit_gains():
    """4·2/m ‖x‖² (Σκ² + 1) at a_1, by hand."""
    evidence = networks(noise=0)
    _, measured = gradient_law_table(evidence)
    naive = 8 / M * evidence.samples("sample_energy", "x", 0).mean()
    off = measured.mean(1).reshape(2, 3) / (naive * np.array([2.7301, 1.7301, 1.2401]))
    worst = np.abs(np.log(off)).argmax()
    expected = (
        f"{'ab'[worst // 3]}_{worst % 3 + 1} would be off by a factor of {off.flat[worst]:.3g}"
    )
    assert gradient_law_verdict(evidence).advice.endswith(expected)
    assert "would be off" not in gradient_law_verdict(relabelled(evidence, block_gain=2.0)).advice


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        (networks(49), "too few networks: 49 have recorded gradients, 50 are needed"),
        (without(networks(), "sample_grad_energy"), "too few networks: 0 have"),
        (relabelled(networks(), config={}), "does not say m and merge"),
        (networks(50, m=16), "networks too narrow .* m must be 43"),
    ],
)
def test_records_that_cannot_be_tested(evidence, why):
    verdict = gradient_law_verdict(evidence)
    assert (verdict.status, verdict.interval) == ("INCONCLUSIVE", None)
    assert re.search(why, verdict.advice)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_broke_down_is_not_left_out(value):
    verdict = gradient_law_verdict(altered(networks(), "sample_grad_energy", "a", value, step=3))
    assert verdict.status == "ASSUMPTION_UNMET"


class TestRealNetworks:
    @pytest.fixture(scope="class")
    def recorded(self, tmp_path_factory):
        """40 random networks of m = 128, N = 3 with some setting changed, by scheme."""

        @cache
        def record(*schemes, **setting):
            config = EnsembleConfig(networks=50, m=128, n_skips=3, samples=4, **setting)
            runs = record_ensemble(config, schemes, tmp_path_factory.mktemp("ensemble"))
            return [Evidence.of(run) for run in runs]

        return record

    @pytest.mark.parametrize(
        ("schemes", "setting"),
        [(("unscaled", "ls"), {}), (("cs:0.7",), {"merge": "concat", "unit_gain": False})],
        ids=str,
    )
    def test_obey_the_law(self, recorded, schemes, setting):
        for evidence in recorded(*schemes, **setting):
            law, measured = gradient_law_table(evidence)
            assert gradient_law_verdict(evidence).status != "VIOLATED"
            assert (np.abs(np.log((measured / law).mean(1))) < 0.6).all()

    def test_final_relus_break_a_premise(self, recorded):
        (evidence,) = recorded("unscaled", final_relu=True)
        assert gradient_law_verdict(evidence).status == "VIOLATED"

    def test_wrong_kappa_in_run_json(self, recorded):
        unscaled, _ = recorded("unscaled", "ls")
        mislabelled = relabelled(unscaled, kappa=[0.0] * 3)
        assert gradient_law_verdict(mislabelled).status == "VIOLATED"
