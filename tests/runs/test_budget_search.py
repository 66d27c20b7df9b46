"""The search for κ by itself, on curves in the place of networks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe.runs.budget_search import (
    HALVINGS,
    ROUNDS,
    Candidate,
    Measured,
    Search,
    cs_family,
    nearest,
)
from stability_probe.theory.kappa_budget import BudgetModel


class TestSearch:
    """A stub in the place of the network: values as a function of the multipliers."""

    def search(self, limit, curve, n=3):
        kappa = np.ones(n)
        terms = np.outer(np.linspace(1, 0.2, n), [1.0, 0.5])
        model = BudgetModel(kappa, terms, np.array([0.05, 0.05]), 1)
        self.calls = []

        def measure(m):
            self.calls.append(m)
            values = curve(model.value(m))
            return Measured(values, {"sigma_max": float(values.max())})

        now = measure(np.ones(n))
        self.calls.clear()
        return Search(model, now, limit * now.largest, measure, kappa)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.floats(0.3, 2.0), st.floats(0.3, 0.95), st.sampled_from([nearest, cs_family]))
    def test_power_laws_are_met_closely(self, power, share, solve):
        """What is measured follows the model's value to some power, and so is monotone."""
        search = self.search(share, lambda v: v**power)
        least = np.zeros(3) if solve is nearest else np.eye(3)[0]
        reachable = search.measure(least).largest <= search.limit * 0.97
        self.calls.clear()
        found = search.run(solve, least)
        assert len(self.calls) == found.rounds <= ROUNDS + 1
        if reachable:
            assert found.met
            assert found.measured["sigma_max"] <= search.limit
            assert found.measured["sigma_max"] >= 0.9 * search.limit

    def test_the_nearest_of_those_that_meet_it_is_returned(self):
        search = self.search(0.7, lambda v: v**0.5)
        found = search.run(nearest, np.zeros(3))
        met = [m for m in list(self.calls) if search.measure(m).largest <= search.limit]
        changes = [np.linalg.norm(1 - m) for m in met]
        assert np.linalg.norm(1 - np.array(found.multipliers)) == min(changes)

    def test_a_value_that_no_multiplier_changes_is_not_met_and_says_so(self):
        search = self.search(0.9, lambda v: np.ones(2) * 3)
        found = search.run(nearest, np.zeros(3))
        assert not found.met and found.measured["sigma_max"] == 3
        assert found.rounds <= ROUNDS + 1

    def test_a_value_that_grows_first_is_told(self):
        """As in front of a normalisation: steeper and steeper, and gone at κ = 0."""
        search = self.search(0.8, lambda v: np.where(v > 0.06, 1 / v, 0.1))
        found = search.run(nearest, np.zeros(3))
        assert found.met and sum(found.multipliers) < 0.1
        assert found.highest > search.now.largest

    def test_multipliers_have_four_decimals(self):
        found = self.search(0.7, lambda v: v).run(nearest, np.zeros(3))
        assert [round(m, 4) for m in found.multipliers] == found.multipliers
        cs = self.search(0.7, lambda v: v).run(cs_family, np.eye(3)[0])
        assert round(cs.multipliers[1], 4) == cs.multipliers[1]
        assert cs.multipliers[2] == pytest.approx(cs.multipliers[1] ** 2)


class TestTowards:
    """Bisection between the κ as found and κ that are known to meet the budget."""

    def known(self, search, multipliers):
        m = np.array(multipliers)
        found = search.measure(m)
        largest = found.largest
        return Candidate(m.tolist(), m.tolist(), 0.0, found.report, 1, largest, largest, True)

    def test_the_least_change_that_meets_it_is_found_within_a_halving(self):
        search = TestSearch().search(0.7, lambda v: v)
        known = self.known(search, [1.0, 0.0, 0.0])
        found = search.towards(known)
        falls = (search.fixed.terms[1:].sum(axis=0))[0]  # at the point with the largest value
        exact = 1 - (search.now.largest - search.limit) / falls
        assert found.met and found.measured["sigma_max"] <= search.limit
        assert found.multipliers[0] == 1.0
        assert exact - 2**-HALVINGS <= found.multipliers[1] <= exact
        assert found.multipliers[1] == found.multipliers[2]
        assert found.rounds == 1 + HALVINGS
        assert search.change(found.multipliers) < search.change(known.multipliers)

    @pytest.mark.parametrize(("room", "searched"), [(0.9, True), (0.99, False)])
    def test_the_line_is_searched_where_there_is_room(self, room, searched):
        search = TestSearch().search(0.7, lambda v: v)
        whole, unmet = self.known(search, [0.3] * 3), self.known(search, [1.0] * 3)
        near = replace(whole, largest=room * search.limit, rounds=4, highest=9.0)
        found = search.nearer(near, replace(unmet, met=False))
        assert (search.change(found.multipliers) < search.change([0.3] * 3)) == searched
        assert found.rounds == 4 + searched * HALVINGS and found.highest == 9.0

    def test_cs_is_taken_where_it_needs_the_smaller_change(self):
        search = TestSearch().search(0.9, lambda v: v)
        best, cs = self.known(search, [0.0] * 3), self.known(search, [1.0, 0.5, 0.25])
        full = replace(best, largest=search.limit, rounds=2, highest=7.0)
        found = search.nearer(full, cs)
        assert found.met and found.multipliers[0] == 1.0 and min(found.multipliers[1:]) > 0.25
        assert found.rounds == 2 + HALVINGS and found.highest == 7.0

    def test_where_nothing_nearer_meets_it_what_is_known_stays(self):
        search = TestSearch().search(0.5, lambda v: v)
        known = self.known(search, [0.05, 0.05, 0.05])
        least = search.fixed.value(np.array(known.multipliers)).max() * (1 + 1e-9)
        search = TestSearch().search(0.5, lambda v: np.where(v <= least, 0.1, 2.0))
        found = search.towards(known)
        assert found.multipliers == known.multipliers
        assert found.highest == 2.0

    def test_kappa_zero_is_measured_before_giving_up(self):
        """A value that falls at the very end: the model alone would never get there."""
        search = TestSearch().search(0.3, lambda v: np.where(v > 0.0500001, 1.0 + v, 0.2))
        found = search.run(nearest, np.zeros(3))
        assert found.met
        assert found.multipliers == [0.0, 0.0, 0.0]
