"""What every claim finds on runs whose truth is known, and the other way round."""

import importlib

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.figures import scheme_colours
from experiments.findings import answer_all
from experiments.input_noise.claim import responses
from experiments.measures import (
    feature_range,
    final_loss,
    geometric_mean,
    gradient_energy,
    output_range,
    parameter_range,
)
from experiments.studies import LABELS, OTHERS, OUTERMOST, label
from tests.oracles.planted import SCHEMES, kappa_of, planted


def examine(claim, *studies):
    return importlib.import_module(f"experiments.{claim}.claim").examine(studies)


ORDER = {"uniform:0": 1.0, "ls": 2.0, "cs:0.7": 3.0, "inverse-sqrt2": 4.0, "unscaled": 5.0}
"""Of stability, as the paper claims it."""


def statuses(found):
    return {f.question.text: f.status for f in answer_all(found.questions)}


def by_skips(scheme):
    """Proportional to Σκ²."""
    return float(np.square(kappa_of(scheme)).sum()) + 0.01


def opposite(scheme):
    return 1 / by_skips(scheme)


class TestOscillation:
    def test_it_is_found_where_it_is(self):
        found = examine("oscillation", planted(features=by_skips, parameters=by_skips))
        assert set(statuses(found).values()) == {"REPRODUCED"}
        row = found.table.query("kind == '‖h_0‖²' and scheme == '1/√2'").iloc[0]
        assert row["over unscaled"] == pytest.approx(0.5, rel=0.05)
        assert row["Σκ²"] == pytest.approx(1.5)

    def test_and_not_where_it_is_not(self):
        found = statuses(examine("oscillation", planted(features=opposite)))
        features = [v for k, v in found.items() if "‖h_" in k]
        assert set(features) == {"NOT REPRODUCED AT THIS SCALE"}
        assert "REPRODUCED" not in found.values()

    def test_all_three_scalings_count(self):
        found = examine("oscillation", planted(lambda s: 0.1 if s == "inverse-sqrt2" else 1.0))
        assert np.mean(found.questions[0].values) == pytest.approx(0.1 ** (1 / 3), rel=0.05)


class TestKappaTradeoff:
    def test_the_claimed_order(self):
        study = planted(ORDER.get, loss=lambda s: 2.0 if s == "uniform:0" else 1.0)
        assert set(statuses(examine("kappa_tradeoff", study)).values()) == {"REPRODUCED"}

    def test_the_reverse_order(self):
        study = planted(lambda s: 6 - ORDER[s], loss=lambda s: 0.5 if s == "uniform:0" else 1.0)
        assert set(statuses(examine("kappa_tradeoff", study)).values()) == {
            "NOT REPRODUCED AT THIS SCALE"
        }


@pytest.mark.parametrize(
    ("effect", "status"),
    [(by_skips, "REPRODUCED"), (opposite, "NOT REPRODUCED AT THIS SCALE")],
)
def test_gradients(effect, status):
    found = examine("gradients", planted(gradients=effect))
    assert len(found.questions) == 3
    assert set(statuses(found).values()) == {status}
    expected = 1 if effect is by_skips else -1
    for question in found.questions:
        assert np.mean(question.values) == pytest.approx(expected, abs=0.1)


def test_gradients_are_also_taken_over_the_loss():
    found = examine("gradients", planted(gradients=by_skips, loss=by_skips))
    plain, over_loss, training = (np.mean(q.values) for q in found.questions)
    assert (plain, over_loss, training) == pytest.approx((1, 0, 1), abs=0.1)


class TestMeasures:
    def test_the_first_steps_and_the_rest_are_told_apart(self):
        (member,) = planted(schemes=("unscaled",), seeds=1).members
        frame = member.evidence.frame
        frame.loc[(frame.metric == "grad_energy") & (frame.step <= 3), "value"] = 100.0
        frame.loc[(frame.metric == "grad_energy") & (frame.step > 3), "value"] = 2.0
        weights = 2 * 3
        assert gradient_energy(member, first=3) == pytest.approx(100 * weights)
        assert gradient_energy(member) == pytest.approx(2 * weights)
        loss = member.evidence.series("loss", "loss")[0].iloc[:3]
        expected = (100 * weights / loss).mean()
        assert gradient_energy(member, first=3, over_loss=True) == pytest.approx(expected)

    def test_what_rises_from_initialisation_is_no_oscillation(self):
        (member,) = planted(schemes=("unscaled",), seeds=1).members
        before = parameter_range(member)
        frame = member.evidence.frame
        frame.loc[(frame.metric == "param_energy") & (frame.step == 1), "value"] = 1e6
        assert parameter_range(member) == before

    @pytest.mark.parametrize("measure", [output_range, feature_range, parameter_range, final_loss])
    def test_what_diverges_is_infinite(self, measure):
        (member,) = planted(schemes=("unscaled",), seeds=1, failed=lambda c: True).members
        assert measure(member) == np.inf

    def test_a_mean_with_none_in_it_is_none(self):
        assert np.isnan(geometric_mean(pd.Series([1.0, np.nan])))
        assert geometric_mean(pd.Series([1.0, 0.0])) == 0


class TestConvergence:
    def test_a_little_faster_is_not_about_one_and_a_half_times(self):
        study = planted(faster=lambda s: 1.0 if s == "unscaled" else 1.05)
        assert "REPRODUCED" not in statuses(examine("convergence", study)).values()

    def test_one_lucky_step_is_not_there(self):
        study = planted(loss=lambda s: 1.0 if s == "unscaled" else 3.0)
        for member in study.where(scheme="ls").members:
            frame = member.evidence.frame
            frame.loc[(frame.metric == "loss") & (frame.step == 20), "value"] = 0.2
        found = examine("convergence", study)
        assert found.table.query("scheme == 'LS (learned)'")["got there"].item() == 0

    def test_what_diverges_cannot_be_told(self):
        study = planted(failed=lambda c: c.scheme == "ls")
        found = statuses(examine("convergence", study))
        (status,) = [v for k, v in found.items() if "LS" in k]
        assert status == "INCONCLUSIVE"

    def test_what_is_faster_takes_fewer_steps(self):
        study = planted(faster=lambda s: 1.0 if s == "unscaled" else 2.0)
        found = examine("convergence", study)
        assert set(statuses(found).values()) == {"REPRODUCED"}
        row = found.table.query("scheme == '1/√2'").iloc[0]
        assert row["steps over unscaled"] < 0.6 and row["got there"] == row["of"] == 5

    def test_what_never_gets_there_is_no_faster(self):
        study = planted(loss=lambda s: 1.0 if s == "unscaled" else 9.0)
        found = examine("convergence", study)
        assert set(statuses(found).values()) == {"NOT REPRODUCED AT THIS SCALE"}
        assert found.table.query("scheme == '1/√2'")["got there"].item() == 0


class TestLearnedCoefficients:
    def test_the_exponential_is_fitted(self):
        found = examine("learned_coefficients", planted(schemes=("unscaled", "ls")))
        row = found.table.iloc[0]
        assert row["r"] == pytest.approx((0.85 / 0.95) ** 0.5, rel=1e-3)
        assert row["κ_1"] == pytest.approx(0.95)
        fall, first = found.questions
        assert fall.values == pytest.approx([0.85 / 0.95] * 5, rel=1e-3)
        assert [q.answer().status for q in (fall, first)] == ["REPRODUCED"] * 2

    def test_what_counts_is_the_end_of_training(self, monkeypatch):
        study = planted(schemes=("ls",))
        for member in study.members:
            frame = member.evidence.frame
            frame.loc[(frame.metric == "kappa") & (frame.step < 50), "value"] = 0.95
            frame.loc[(frame.metric == "kappa") & (frame.step >= 50), "value"] = 0.8
        fall, first = examine("learned_coefficients", study).questions
        assert fall.values == pytest.approx([1.0] * 5) and first.values == pytest.approx([0.8] * 5)
        assert [q.answer().status for q in (fall, first)] == ["NOT REPRODUCED AT THIS SCALE"] * 2

    def test_every_learning_rate_is_asked_about(self):
        slow = planted(schemes=("ls",), learning_rate=0.01).members
        fast = planted(schemes=("ls",), learning_rate=0.03).members
        found = examine("learned_coefficients", type(planted())("planted", [*slow, *fast]))
        assert found.table.seeds.tolist() == [5, 5]
        assert [("rate 0.01" in name, "rate 0.03" in name) for name in found.table.runs] == [
            (True, False), (False, True),
        ]  # fmt: skip


class TestDepthAndRate:
    def test_what_is_rescued(self):
        study = planted(failed=lambda c: c.scheme == "unscaled")
        found = examine("depth_and_rate", study)
        assert set(statuses(found).values()) == {"REPRODUCED"}
        assert found.table.query("scheme == 'unscaled'").failed.item() == 5

    def test_what_needs_no_rescue(self):
        found = examine("depth_and_rate", planted())
        assert "REPRODUCED" not in statuses(found).values()
        assert not found.table.failed.any()

    def test_what_is_worse_than_no_prediction_is_worth_no_less(self):
        study = planted(loss=lambda s: 9.0 if s == "unscaled" else 6.0)
        found = examine("depth_and_rate", study)
        assert (found.table.failed == 5).all()
        assert all(value == pytest.approx(1) for q in found.questions for value in q.values)

    @pytest.mark.parametrize(("end", "failed"), [(0.98, 5), (0.75, 0)])
    def test_next_to_useless_is_failed(self, end, failed):
        base = examine("depth_and_rate", planted()).table["median final loss"].iloc[0]
        found = examine("depth_and_rate", planted(loss=lambda s: end / base))
        assert found.table.query("scheme == 'unscaled'").failed.item() == failed


class TestInputNoise:
    def test_the_response_of_a_linear_network_is_its_gain(self):
        (member,) = planted(schemes=("unscaled",), seeds=1).members
        member.__dict__["network"] = lambda: lambda x, t: 3 * x
        found = responses(member)
        assert found.gain.to_numpy() == pytest.approx(3, rel=1e-4)
        assert (found.loss.diff().dropna() > 0).all() and found.loss.iloc[0] > 1

    @staticmethod
    def examined(monkeypatch, gain, bound):
        claim = importlib.import_module("experiments.input_noise.claim")

        def response(member):
            noise = np.exp(0.02 * np.random.default_rng(member.config.seed).standard_normal())
            value = gain(member.config.scheme) * noise
            return pd.DataFrame({"gain": value, "loss": 1.1}, index=list(claim.EXTRA))

        monkeypatch.setattr(claim, "responses", response)
        monkeypatch.setattr(claim, "bound", lambda member: bound(member.config.scheme))
        return examine("input_noise", planted())

    @pytest.mark.parametrize(
        ("effect", "status"),
        [(by_skips, "REPRODUCED"), (opposite, "NOT REPRODUCED AT THIS SCALE")],
    )
    def test_responses_in_the_order_of_the_bound(self, monkeypatch, effect, status):
        found = self.examined(monkeypatch, effect, by_skips)
        assert set(statuses(found).values()) == {status}

    def test_what_does_not_react_is_no_comparison(self, monkeypatch):
        found = self.examined(monkeypatch, lambda s: float(s != "unscaled"), by_skips)
        ratios = {k: v for k, v in statuses(found).items() if "over unscaled" in k}
        assert set(ratios.values()) == {"INCONCLUSIVE"} and len(ratios) == 3

    def test_networks_without_skips_are_in_no_slope(self, monkeypatch):
        found = self.examined(
            monkeypatch, lambda s: 1e-9 if s == "uniform:0" else by_skips(s), by_skips
        )
        assert np.mean(found.questions[-1].values) == pytest.approx(1, abs=0.01)


class TestSurprises:
    @staticmethod
    def examined(monkeypatch, features, paths=(4.0, 1.0, 0.2)):
        claim = importlib.import_module("experiments.surprises.claim")
        outermost, others = "kappa:0.7071,1,1", "kappa:1,0.7071,0.7071"
        monkeypatch.setattr(claim, "OUTERMOST", outermost)
        monkeypatch.setattr(claim, "OTHERS", others)
        monkeypatch.setattr(claim, "sensitivity_table", lambda run: [{"paths": list(paths)}])
        schemes = ("unscaled", "inverse-sqrt2", "uniform:0", "cs:0.7", outermost, others)
        study = planted(lambda s: features(np.square(kappa_of(s))), schemes=schemes)
        return examine("surprises", study)

    def test_what_the_outermost_skip_carries(self, monkeypatch):
        found = self.examined(monkeypatch, lambda k: 0.01 + k @ [16, 1, 0.04])
        answers = list(statuses(found).values())
        assert answers[4:] == ["REPRODUCED"] * 4
        assert answers[0] == "NOT REPRODUCED AT THIS SCALE"  # κ = 0 is the calmest here

    def test_where_all_skips_carry_alike(self, monkeypatch):
        found = self.examined(monkeypatch, lambda k: 0.01 + k.sum())
        answers = list(statuses(found).values())
        assert answers[6] == answers[7] == "NOT REPRODUCED AT THIS SCALE"

    def test_growth_is_from_the_first_steps_to_the_last(self):
        claim = importlib.import_module("experiments.surprises.claim")
        (member,) = planted(schemes=("unscaled",), seeds=1).members
        frame = member.evidence.frame
        energy, last = (frame.metric == "energy") & (frame.site == "h"), frame.step.max()
        frame.loc[energy, "value"] = 10.0
        frame.loc[energy & (frame.step <= 3), "value"] = 2.0
        frame.loc[energy & (frame.step > 0.9 * last), "value"] = 30.0
        assert claim.energy_growth(member) == pytest.approx(15)
        frame.loc[(frame.metric == "param_energy"), "value"] = 1.0
        frame.loc[(frame.metric == "param_energy") & (frame.step == last), "value"] = 4.0
        assert claim.weight_growth(member) == pytest.approx(4)


class TestCost:
    @pytest.mark.parametrize(
        ("ratio", "status"), [(1.0, "REPRODUCED"), (1.1, "NOT REPRODUCED AT THIS SCALE")]
    )
    def test_ratios_are_held_against_what_is_little(self, ratio, status):
        claim = importlib.import_module("experiments.cost.claim")
        rows = [
            {"network": "n", "scheme": label(scheme), "ratio": ratio + wobble}
            for scheme in claim.LIMITS
            for wobble in (-0.002, 0.0, 0.002)
        ]
        found = claim.examination_of(pd.DataFrame(rows))
        assert list(statuses(found).values()) == [status] * 3
        assert [q.limit for q in found.questions] == [1.02, 1.05, 1.05]

    def test_the_scaled_twin_is_the_plain_one_with_scaled_skips(self):
        claim = importlib.import_module("experiments.cost.claim")
        _, workload = claim.WORKLOADS
        plain, scaled = workload.twin(), claim.scaled_twin(workload, "uniform:1")
        other = claim.scaled_twin(workload, "cs:0.7")
        x, t = claim.batch(workload.shape)
        with torch.no_grad():
            expected = plain.model(x, t)
            torch.testing.assert_close(scaled.model(x, t), expected)
            assert not torch.allclose(other.model(x, t), expected)


def test_a_scheme_has_the_same_colour_whatever_else_is_drawn():
    few, many = planted(schemes=("cs:0.7", "ls")), planted()
    assert scheme_colours([few])["ls"] == scheme_colours([many])["ls"]
    assert len(set(scheme_colours([many]).values())) == len(SCHEMES)


def test_schemes_have_names():
    assert label(OUTERMOST) == LABELS[OUTERMOST]
    assert label("cs:0.7") == "CS (κ = 0.7)"
    assert label(OTHERS) != label(OUTERMOST)


def test_tables_have_a_row_a_seed_and_a_column_a_scheme():
    table = planted().table(lambda member: member.config.seed)
    assert list(table.columns) == list(SCHEMES)
    assert table.index.tolist() == list(range(5))
    pd.testing.assert_series_equal(table["ls"], table["unscaled"], check_names=False)
