r"""The least change of κ that meets a budget (derived).

What is to be kept small is, as a function of multipliers $m_i \in [0, 1]$ of the $\kappa_i^0$ that
a network has, at every probed point s

$$v_s(m) = \sum_i m_i^p\,t_{is} + r_s,$$

* **sensitivity**, p = 1: $t_{is} = \kappa_i^0\|P_i\|$ and $r_s = \|P_{mid}\|$, the pathwise bound
  of Theorem 3.4 with the paths held fixed (`huang2023_robustness`);
* **feature energy**, p = 2: $t_{is}$ is what skip i adds to $\|h_0\|^2/\|x_t\|^2$, as in
  Theorem 3.1.

Both models are only that: a network's paths change with its κ. Whoever uses them measures
afterwards and solves again with what was observed.

The nearest κ, $\min\sum_i(\kappa_i - \kappa_i^0)^2$ over $v_s(m) \le b_s$, $\kappa_i =
\kappa_i^0 m_i$, is a convex problem. For p = 1 it is a least-distance problem, which one
non-negative least-squares problem solves (Lawson & Hanson, *Solving Least Squares Problems*, 1974,
ch. 23): a finite method. For p = 2 sequential quadratic programming does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq, minimize, nnls


@dataclass(frozen=True)
class BudgetModel:
    r"""$v_s(m) = \sum_i m_i^p t_{is} + r_s$.

    Attributes:
        kappa: $\kappa_i^0 \ge 0$, shape (N,).
        terms: $t_{is} \ge 0$, shape (N, points).
        rest: $r_s \ge 0$, shape (points,).
        power: p.

    Raises:
        ValueError: if shapes do not fit, or a number is negative or not finite.

    >>> model = BudgetModel(np.array([1.0, 1.0]), np.array([[3.0], [4.0]]), np.array([1.0]), 1)
    >>> model.value(np.array([1.0, 0.5])).tolist()
    [6.0]
    """

    kappa: np.ndarray
    terms: np.ndarray
    rest: np.ndarray
    power: Literal[1, 2]

    def __post_init__(self) -> None:
        if self.terms.shape != (len(self.kappa), len(self.rest)):
            raise ValueError(
                f"BudgetModel: terms must be (skips, points) = {(len(self.kappa), len(self.rest))}"
                f", got {self.terms.shape}"
            )
        for name in ("kappa", "terms", "rest"):
            values = getattr(self, name)
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"BudgetModel: {name} must be finite and not negative")

    def value(self, m: np.ndarray) -> np.ndarray:
        """v_s(m), shape (points,)."""
        return np.asarray(m**self.power @ self.terms + self.rest)


def nearest_multipliers(model: BudgetModel, budget: np.ndarray) -> np.ndarray | None:
    r"""The multipliers m of the κ nearest to $\kappa^0$ with $v_s(m) \le b_s$ at every point.

    With one point, p = 1 and no bound of m reached, κ is the projection on a half-space:

    >>> model = BudgetModel(np.array([1.0, 1.0]), np.array([[3.0], [4.0]]), np.array([1.0]), 1)
    >>> nearest_multipliers(model, np.array([5.5])).round(4).tolist()  # 1 - 2.5 * (3, 4) / 25
    [0.7, 0.6]

    Args:
        model: the model.
        budget: $b_s$, shape (points,).

    Returns:
        m, or `None` if not even m = 0 meets the budget.
    """
    left = budget - model.rest
    if (left < 0).any():
        return None
    m = np.ones(len(model.kappa))
    tight = model.value(m) > budget  # the other points stay below it whatever m is
    if not tight.any():
        return m
    terms, left = model.terms[:, tight], left[tight]
    solve = _least_distance if model.power == 1 else _quadratic
    used = (model.kappa > 0) & (terms > 0).any(axis=1)  # the other skips cost nothing
    found = solve(model.kappa[used], terms[used], left)
    m[used] = _pulled_in(found, model.power, terms[used], left)
    return m


def cs_multipliers(model: BudgetModel, budget: np.ndarray) -> np.ndarray | None:
    r"""Multipliers $\kappa^{i-1}$ with the largest base κ in [0, 1] that meets the budget.

    Returns:
        m, or `None` if no base meets it: skip 1 keeps the multiplier 1.

    >>> model = BudgetModel(np.ones(2), np.array([[3.0], [4.0]]), np.array([1.0]), 1)
    >>> cs_multipliers(model, np.array([6.0])).tolist()
    [1.0, 0.5]
    >>> cs_multipliers(model, np.array([3.9])) is None
    True
    """
    levels = np.arange(len(model.kappa))
    tight = model.value(np.ones(len(levels))) > budget

    def excess(base: float) -> float:
        return float((model.value(base**levels) - budget)[tight].max())

    if not tight.any():
        return np.ones(len(levels))
    if excess(0.0) > 0:
        return None
    base = _from_below(excess, brentq(excess, 0.0, 1.0, xtol=1e-12))
    return np.asarray(base**levels)


def _from_below(excess: Callable[[float], float], root: float) -> float:
    """A number not above a root, and near it, at which an increasing function is not positive."""
    step = 1e-12
    while root > 0 and excess(root) > 0:
        root, step = max(0.0, root - step), 2 * step
    return root


def _least_distance(kappa: np.ndarray, terms: np.ndarray, left: np.ndarray) -> np.ndarray:
    """P = 1. With d = κ⁰ − κ: min ‖d‖² over A d ≥ A κ⁰ − left, 0 ≤ d ≤ κ⁰, A = (terms / κ⁰)ᵀ.

    If u ≥ 0 is nearest to solving [Gᵀ; hᵀ] u = (0, 1), with the residual r, then
    d = −r_1..N / r_N+1 is the least vector with G d ≥ h.
    """
    n = len(kappa)
    slopes = (terms / kappa[:, None]).T
    rows = np.vstack([slopes, np.eye(n), -np.eye(n)])
    least = np.concatenate([slopes @ kappa - left, np.zeros(n), -kappa])
    size = np.linalg.norm(rows, axis=1)
    rows, least = rows[size > 0] / size[size > 0, None], least[size > 0] / size[size > 0]
    scale = np.abs(least).max()  # so that the system is well scaled
    system = np.vstack([rows.T, least / scale])
    goal = np.append(np.zeros(n), 1.0)
    u, _ = nnls(system, goal, maxiter=100 * system.shape[1])
    residual = system @ u - goal
    return np.asarray(1 + scale * residual[:n] / residual[n] / kappa)


def _quadratic(kappa: np.ndarray, terms: np.ndarray, left: np.ndarray) -> np.ndarray:
    """P = 2, from the largest common multiplier that meets the budget."""
    total = terms.sum(axis=0)  # above `left`, or the point would not count
    common = np.sqrt((left / total).min())
    solve: Any = minimize  # its types have no overload for a constraint with a Jacobian
    found = solve(
        lambda m: ((kappa * (1 - m)) ** 2).sum(),
        np.full(len(kappa), common),
        jac=lambda m: -2 * kappa**2 * (1 - m),
        bounds=[(0.0, 1.0)] * len(kappa),
        constraints={
            "type": "ineq",
            "fun": lambda m: (left - m**2 @ terms) / total,
            "jac": lambda m: -2 * (terms * m[:, None] / total).T,
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return np.asarray(found.x)


def _pulled_in(m: np.ndarray, power: int, terms: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Multipliers within their bounds that meet the budget exactly, not but for rounding."""
    m = m.clip(0.0, 1.0)
    used = m**power @ terms
    over = used > left
    if over.any():
        m = m * ((left[over] / used[over]).min() * (1 - 1e-15)) ** (1 / power)
    return m
