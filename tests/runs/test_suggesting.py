"""The κ that meets a budget: on a linear network in one round, and the search by itself."""

import json

import pytest
import torch
from torch import nn

from stability_probe import (
    ConstantScaling,
    LearnableScaling,
    StabilityProbeError,
    Uniform,
    find_skips,
    scale_skips,
)
from stability_probe.probes import ProbeBatch, SensitivityConfig
from stability_probe.runs.budget_search import CLOSE, ROUNDS
from stability_probe.runs.suggesting import Budget, suggest_kappa
from stability_probe.skips import FixedScaling
from tests.oracles.zoo import hook_count

SHARP = SensitivityConfig(rtol=1e-5, block_rtol=1e-5, max_products=100)


class LinearUNet(nn.Module):
    """Two skips that add, all maps multiples of the identity: every path is known by hand."""

    def __init__(self, a=(1.0, 0.5), b=(1.0, 2.0), middle=0.25):
        super().__init__()

        def times(c):
            layer = nn.Linear(4, 4, bias=False)
            layer.weight.data = c * torch.eye(4)
            return layer

        self.a1, self.a2 = map(times, a)
        self.b1, self.b2 = map(times, b)
        self.middle = times(middle)
        self.double()

    def forward(self, x):
        u1 = self.a1(x)
        u2 = self.a2(u1)
        return self.b1(self.b2(self.middle(u2) + u2) + u1)


PATHS, MIDDLE = [1.0, 1.0], 0.25
"""‖P_1‖ = b1 a1 and ‖P_2‖ = b1 b2 a2 a1; b1 b2 · middle · a2 a1."""
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
POINTS = [ProbeBatch((X[:3],), sensitive=1), ProbeBatch((X[3:],), sensitive=2)]


def suggest(budget, net=None, points=POINTS[:1], **about):
    net = net or LinearUNet()
    return suggest_kappa(net, find_skips(net, X[:2]), points, budget, config=SHARP, **about)


class TestOnALinearNetwork:
    @pytest.mark.parametrize("of", ["sensitivity", "pathwise"])
    def test_the_projection_is_found_in_one_round(self, of):
        found = suggest(Budget(1.5), points=POINTS, of=of)
        assert found.before["sigma_max"] == pytest.approx(2.25, rel=1e-3)
        assert found.before["pathwise"] == pytest.approx(2.25, rel=1e-3)
        assert found.best.met and found.best.rounds == 1
        cut = (2.25 - 0.99 * 1.5) / 2  # along (1, 1)
        assert found.best.kappa == pytest.approx([1 - cut] * 2, abs=2e-4)
        for name in ("sigma_max", "pathwise"):
            assert CLOSE * 1.5 <= found.best.measured[name] <= 1.5
        assert found.best.predicted == pytest.approx(found.best.measured[of_name(of)], rel=1e-3)

    def test_cs_leaves_the_first_skip_alone(self):
        found = suggest(Budget(1.5))
        assert found.cs.met and found.cs.kappa == pytest.approx([1, 0.99 * 1.5 - 1.25], abs=2e-4)
        gone = suggest(Budget(1.1))
        assert not gone.cs.met and gone.best.met
        assert gone.cs.kappa == [1, 0]
        assert gone.cs.measured["sigma_max"] == pytest.approx(1.25, rel=1e-3)

    def test_what_was_suggested_is_what_is_measured_with_it(self):
        net = LinearUNet()
        found = suggest(Budget(1.5), net)
        with scale_skips(net, find_skips(net, X[:2]), FixedScaling(found.best.kappa)):
            jacobian = torch.autograd.functional.jacobian(net, X[0])
        sigma = torch.linalg.matrix_norm(jacobian, ord=2).item()
        assert sigma == pytest.approx(found.best.measured["sigma_max"], rel=1e-3)
        assert sigma <= 1.5

    def test_energy_is_of_the_square(self):
        """E = (κ_1 + κ_2 + .25)²: not a sum of squares, so that it takes several rounds."""
        found = suggest(Budget(0.5, relative=True), of="energy")
        assert found.before == {"energy": pytest.approx(2.25**2)}
        assert found.budget == pytest.approx(2.25**2 / 2)
        assert found.best.met and 1 < found.best.rounds <= ROUNDS
        energy = (sum(found.best.kappa) + 0.25) ** 2
        assert found.best.measured["energy"] == pytest.approx(energy)
        assert CLOSE * found.budget <= energy <= found.budget
        assert found.best.kappa[0] == pytest.approx(found.best.kappa[1], abs=1e-3)

    def test_a_skip_that_cancels_is_noted(self):
        found = suggest(Budget(0.9, relative=True), LinearUNet(b=(1.0, -0.5)), of="energy")
        assert found.notes == ["the energy grows without skip 2: what they add is taken as 0 there"]
        assert found.best.met and found.best.kappa[1] == 1

    def test_percentages_are_of_the_largest_value_now(self):
        assert suggest(Budget(0.5, True)).budget == pytest.approx(1.125, rel=1e-3)

    def test_what_is_met_already_changes_nothing(self):
        found = suggest(Budget(3.0))
        assert found.best.kappa == found.cs.kappa == [1, 1]
        assert found.best.met and found.best.rounds == 0
        assert suggest(Budget(1.0, True)).best.kappa == [1, 1]

    def test_a_budget_that_even_no_skips_exceed(self):
        found = suggest(Budget(0.2))
        assert not found.best.met and found.best.kappa == [0, 0]
        assert found.best.largest == pytest.approx(0.25, rel=1e-3)

    def test_kappa_as_found_is_that_of_the_code_times_the_scheme(self):
        class Halved(LinearUNet):
            def forward(self, x):
                u1 = self.a1(x)
                u2 = self.a2(u1)
                return self.b1(self.b2(self.middle(u2) + u2) + 0.5 * u1)

        found = suggest(Budget(0.9, True), Halved(), scheme=ConstantScaling(0.5))
        assert found.kappa == [0.5, 0.5]
        assert found.before["sigma_max"] == pytest.approx(0.5 + 0.5 + 0.25, rel=1e-3)
        assert found.notes == []
        # slopes are ‖P_i‖ = 1 for both: both κ fall by the same
        fall = [k - b for k, b in zip(found.kappa, found.best.kappa, strict=True)]
        assert fall == pytest.approx([(1 - 0.99 * 0.9) * 1.25 / 2] * 2, abs=3e-4)

    def test_skips_that_are_off_stay_off(self):
        found = suggest(Budget(5.0), scheme=Uniform(0.0))
        assert found.kappa == found.best.kappa == [0, 0]

    def test_gates_are_multiplied(self):
        found = suggest(Budget(0.9, True), scheme=LearnableScaling(reduction=2))
        assert found.kappa == [1, 1]
        assert found.notes[0].startswith("the scaling is no constant: what is suggested are")
        assert found.best.met

    def test_the_network_is_left_as_it_was(self):
        net = LinearUNet()
        hooks, out = hook_count(net), net(X)
        suggest(Budget(1.5), net, scheme=LearnableScaling(reduction=2))
        assert hook_count(net) == hooks and torch.equal(net(X), out)
        assert not hasattr(net, "se")

    def test_all_of_it_is_ready_for_json(self):
        found = json.loads(json.dumps(suggest(Budget(1.5)).as_dict()))
        assert found["of"] == "sensitivity" and found["best"]["met"] is True
        assert set(found) == {"of", "budget", "kappa", "before", "best", "cs", "notes"}

    def test_measurements_are_told(self):
        calls = []
        found = suggest(Budget(1.5), on_measured=lambda: calls.append(1))
        assert len(calls) == 1 + found.best.rounds + found.cs.rounds

    def test_nothing_to_scale_or_to_measure(self):
        net = LinearUNet()
        with pytest.raises(StabilityProbeError, match="needs long skips and samples, got 0 and 2"):
            suggest_kappa(net, [], POINTS, Budget(1.0))
        with pytest.raises(StabilityProbeError, match="needs long skips and samples, got 2 and 0"):
            suggest_kappa(net, find_skips(net, X), [], Budget(1.0))


def of_name(of):
    return "sigma_max" if of == "sensitivity" else of


@pytest.mark.parametrize(
    ("value", "relative"), [(0.0, False), (-1.0, False), (float("nan"), False), (1.01, True)]
)
def test_budgets_that_are_none(value, relative):
    with pytest.raises(StabilityProbeError, match=r"budget: must be a positive number such as 1.2"):
        Budget(value, relative)
