"""The nearest κ, by closed forms, optimality conditions, and brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import nnls

from stability_probe.theory.kappa_budget import BudgetModel, cs_multipliers, nearest_multipliers

laws = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 5))


@st.composite
def problems(draw, power=None):
    n, points = draw(sizes)
    power = power or draw(st.sampled_from([1, 2]))
    kappa = draw(arrays(float, n, elements=st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.0])))
    terms = draw(arrays(float, (n, points), elements=st.sampled_from([0.0, 1e-3, 0.2, 1.0, 3.0])))
    terms[kappa == 0] = 0
    rest = draw(arrays(float, points, elements=st.sampled_from([0.0, 0.1, 1.0])))
    model = BudgetModel(kappa, terms, rest, power)
    share = draw(arrays(float, points, elements=st.floats(0.02, 1.2)))
    return model, rest + share * (model.value(np.ones(n)) - rest)


def cost(model, m):
    return ((model.kappa * (1 - m)) ** 2).sum()


@laws
@given(problems())
def test_the_budget_is_met_at_every_point(problem):
    model, budget = problem
    m = nearest_multipliers(model, budget)
    assert ((m >= 0) & (m <= 1)).all()
    assert (model.value(m) <= budget + 1e-12 * (1 + budget)).all()


@laws
@given(problems())
def test_optimality_conditions_hold(problem):
    """−∇cost is a non-negative combination of the gradients of active constraints and bounds.

    The problem is convex, so that is also enough.
    """
    model, budget = problem
    m = nearest_multipliers(model, budget)
    kappa, p = model.kappa, model.power
    used = (kappa > 0) & (model.terms > 0).any(axis=1)
    assert (m[~used] == 1).all()
    if not used.any():
        return
    descent = (2 * kappa**2 * (1 - m))[used]
    active = model.value(m) >= budget - 1e-5 * (1 + budget)
    slopes = (p * model.terms * m[:, None] ** (p - 1))[used][:, active]
    low = np.eye(used.sum())[:, m[used] <= 1e-6]
    normals = np.hstack([slopes, -low])
    left = np.linalg.norm(descent) if not normals.size else nnls(normals, descent)[1]
    assert left <= 2e-3 * (1 + np.linalg.norm(descent))


@laws
@given(problems(power=1), st.integers(0, 999))
def test_no_other_feasible_choice_is_nearer(problem, seed):
    model, budget = problem
    m = nearest_multipliers(model, budget)
    scales = np.repeat([0.01, 0.1, 1.0], 100)[:, None]
    steps = scales * np.random.default_rng(seed).normal(size=(300, len(m)))
    others = (m + steps).clip(0, 1)
    costs = (model.kappa**2 * (1 - others) ** 2).sum(axis=1)
    feasible = (others @ model.terms + model.rest <= budget).all(axis=1)
    assert (costs[feasible] >= cost(model, m) - 1e-9).all()


def test_one_linear_constraint_is_a_projection_on_a_half_space():
    kappa, paths, rest = np.array([1.0, 0.8, 0.5]), np.array([[0.9], [0.4], [0.1]]), 0.2
    model = BudgetModel(kappa, paths, np.array([rest]), 1)
    slope = paths[:, 0] / kappa
    expected = kappa - slope * (1.6 - 1.3) / (slope @ slope)
    m = nearest_multipliers(model, np.array([1.3]))
    np.testing.assert_allclose(kappa * m, expected, rtol=1e-9)


def test_a_bound_that_is_reached_by_hand():
    """κ_1 would become negative; it is 0, and the others carry the rest."""
    model = BudgetModel(np.array([0.1, 1.0]), np.array([[1.0], [1.0]]), np.zeros(1), 1)
    m = nearest_multipliers(model, np.array([0.5]))  # slopes 10 and 1
    np.testing.assert_allclose(m, [0.0, 0.5], atol=1e-9)


def test_one_quadratic_constraint_by_its_multiplier():
    """κ_i = κ_i⁰ / (1 + λ e_i / κ_i⁰²), with λ where the constraint is active."""
    kappa, e = np.array([1.0, 0.5, 2.0]), np.array([3.0, 1.0, 0.2])
    model = BudgetModel(kappa, e[:, None], np.array([0.5]), 2)
    lam = 0.7
    expected = 1 / (1 + lam * e / kappa**2)
    m = nearest_multipliers(model, model.value(expected))
    np.testing.assert_allclose(m, expected, rtol=1e-5)


def test_what_is_met_already_is_left_alone():
    model = BudgetModel(np.ones(2), np.array([[3.0], [4.0]]), np.array([1.0]), 1)
    assert nearest_multipliers(model, np.array([8.0])).tolist() == [1, 1]
    assert cs_multipliers(model, np.array([8.0])).tolist() == [1, 1]


@pytest.mark.parametrize("power", [1, 2])
def test_what_cannot_be_met_gives_none(power):
    model = BudgetModel(np.ones(2), np.array([[3.0], [4.0]]), np.array([1.0]), power)
    assert nearest_multipliers(model, np.array([0.99])) is None
    assert nearest_multipliers(model, np.array([1.0])) == pytest.approx(np.zeros(2), abs=1e-6)
    assert cs_multipliers(model, np.array([3.99])) is None
    assert cs_multipliers(model, np.array([4.0])).tolist() == [1, 0]


@laws
@given(problems())
def test_cs_is_the_largest_base_that_meets_the_budget(problem):
    model, budget = problem
    m, levels = cs_multipliers(model, budget), np.arange(len(model.kappa))
    if m is None:
        assert (model.value((levels == 0).astype(float)) > budget).any()
        return
    assert (model.value(m) <= budget).all()
    base = m[1] if len(m) > 1 else 1.0
    np.testing.assert_allclose(m, base**levels)
    larger = model.value(min(1.0, base + 1e-4) ** levels)
    assert base > 1 - 1e-4 or (larger > budget).any()


@laws
@given(problems())
def test_cs_is_never_nearer_than_the_nearest(problem):
    model, budget = problem
    cs = cs_multipliers(model, budget)
    if cs is not None:
        assert cost(model, nearest_multipliers(model, budget)) <= cost(model, cs) + 1e-6


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"terms": np.ones((3, 1))}, r"terms must be \(skips, points\) = \(2, 1\), got \(3, 1\)"),
        ({"kappa": np.array([1.0, -1.0])}, "kappa must be finite and not negative"),
        ({"terms": np.full((2, 1), np.nan)}, "terms must be finite and not negative"),
        ({"rest": np.array([-0.1])}, "rest must be finite and not negative"),
    ],
)
def test_models_that_are_none(about, message):
    good = {"kappa": np.ones(2), "terms": np.ones((2, 1)), "rest": np.ones(1), "power": 1}
    with pytest.raises(ValueError, match=message):
        BudgetModel(**{**good, **about})
