"""Theorem 3.4: measured sensitivity ≤ σ_max(J) ≤ the bound, at every probed point."""

from dataclasses import dataclass

import numpy as np

from stability_probe.theory import blockwise_bound, max_block_gain, robustness_bound
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import share_interval
from stability_probe.verify.verdict import Status, Verdict

TOLERANCE = 1e-2
"""Relative error allowed to σ_max(J), and to secants of a finite step, in every comparison."""


@dataclass(frozen=True)
class Chain:
    """The quantities of Theorem 3.4 at every probed point, each (steps, samples).

    Attributes:
        secant: largest ‖Δoutput‖/ε_δ over random directions, at the smallest ε_δ.
        exact: σ_max(J), estimated from below.
        residual: residual norm of that estimate.
        blockwise: the bound with each block's own Lipschitz constant at the point.
        paper: the bound with M_0 and L_0 at the point.
    """

    secant: np.ndarray
    exact: np.ndarray
    residual: np.ndarray
    blockwise: np.ndarray
    paper: np.ndarray

    @property
    def sound(self) -> np.ndarray:
        """Where every quantity is finite and there is some sensitivity."""
        every = (self.secant, self.exact, self.residual, self.blockwise, self.paper)
        return np.asarray(np.isfinite(np.stack(every)).all(axis=0) & (self.exact > 0))

    @property
    def ordered(self) -> np.ndarray:
        """Where each is no larger than the next, as far as σ_max(J) is known."""
        above = 1 + TOLERANCE
        return np.asarray(
            (self.secant <= (self.exact + self.residual) * above)
            & (self.exact <= self.blockwise * above)
            & (self.blockwise <= self.paper * (1 + 1e-6))
        )


def robustness_chain(run: Evidence) -> Chain:
    """Assemble the chain from recorded secants, norms and gains; empty if none were recorded."""
    exact = run.samples("sigma_max", "J")
    if not exact.size:
        nothing = np.empty((0, 0))
        return Chain(nothing, nothing, nothing, nothing, nothing)
    secants = run.frame[run.frame.metric == "secant"].site.unique()
    smallest = min(secants, key=lambda site: float(site.removeprefix("eps=")))
    few = exact.shape[2]
    kappa = np.moveaxis(run.sampled_kappa()[:, :, :few], 1, 0)  # levels first
    lip_a = np.moveaxis(run.samples("lipschitz", "a"), 1, 0)
    lip_b = np.moveaxis(run.samples("lipschitz", "b"), 1, 0)
    l0 = run.samples("lipschitz", "mid")[:, 0]
    return Chain(
        secant=run.samples("secant", smallest)[:, 0],
        exact=exact[:, 0],
        residual=run.samples("sigma_max_residual", "J")[:, 0],
        blockwise=blockwise_bound(kappa, lip_a, lip_b, l0),
        paper=robustness_bound(kappa, max_block_gain(lip_a, lip_b), l0),
    )


def robustness_verdict(run: Evidence) -> Verdict:
    """Whether the chain holds at every probed point, with the slack at the typical one.

    The units are samples: the same ones are probed at every scheduled step.
    """
    claim = "‖Δout‖/ε ≤ σ_max(J) ≤ Σκ_i M₀ⁱ + M₀ᴺL₀ at every point"
    chain = robustness_chain(run)
    if not chain.exact.size:
        advice = "no sensitivity was measured; set sensitivity_every above 0"
        return Verdict.undecided("3.4", run.name, claim, advice)
    ordered, n = chain.ordered, chain.exact.shape[1]
    broken = int((~chain.sound).sum())
    if broken:
        advice = f"a norm or secant is 0 or not finite at {broken} of {ordered.size} points"
        return Verdict.undecided("3.4", run.name, claim, advice, n=n, unmet=True)
    share = float(ordered.mean())
    slack = chain.paper / chain.exact
    typical = int(np.argsort(slack.ravel())[slack.size // 2])
    blockwise = float(np.median(chain.blockwise / chain.exact))
    secant = float(np.median(chain.exact / chain.secant))
    note = (
        f"slack {slack.min():.3g} at the tightest point, {blockwise:.3g} block by block (median); "
        f"σ_max(J) is {secant:.2g} times the largest random secant"
    )
    unsettled = int((chain.residual > TOLERANCE * chain.exact).sum())
    if unsettled:
        note += f"; σ_max(J) did not settle at {unsettled} points: raise max_products"
    status: Status = "INCONCLUSIVE" if unsettled else "HOLDS"
    if run.input_dependent:
        note += "; κ is the measured gain: the theorem leaves out how gates change with the input"
    return Verdict(
        "3.4",
        run.name,
        claim,
        status if ordered.all() else "VIOLATED",
        measured=float(chain.exact.ravel()[typical]),
        bound=float(chain.paper.ravel()[typical]),
        statistic="share of points",
        estimate=share,
        interval=share_interval(share, n),
        n=n,
        advice=note,
    )
