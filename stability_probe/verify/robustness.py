"""Theorem 3.4: measured sensitivity ≤ σ_max(J) ≤ the bound, at every probed point."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from stability_probe.theory import blockwise_bound, max_block_gain, pathwise_bound, robustness_bound
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import share_interval
from stability_probe.verify.verdict import Status, Verdict

TOLERANCE = 1e-2
"""Relative error allowed to σ_max(J), and to secants of a finite step, in every comparison."""
GAP = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Share of J that rounding may make of paths that do add up to it, with a margin of 10 or more."""


@dataclass(frozen=True)
class Chain:
    """The quantities of Theorem 3.4 at every probed point, each (steps, samples).

    Attributes:
        secant: largest ‖Δoutput‖/ε_δ over random directions, at the smallest ε_δ.
        exact: σ_max(J), estimated from below.
        residual: residual norm of that estimate.
        blockwise: the bound with each block's own Lipschitz constant at the point.
        paper: the bound with M_0 and L_0 at the point.
        paths: κ_i‖P_i‖ of every skip (levels, steps, samples); `None` if paths were not measured.
        middle: ‖P_mid‖ likewise (steps, samples).
        around: norm of the paths around all skips and the middle, which Eq. 4 has not; it is a part
            of the three bounds. 0 if it was not measured.
        gap: the share of J that all paths together leave out.
    """

    secant: np.ndarray
    exact: np.ndarray
    residual: np.ndarray
    blockwise: np.ndarray
    paper: np.ndarray
    paths: np.ndarray | None
    middle: np.ndarray
    around: np.ndarray
    gap: np.ndarray

    @property
    def pathwise(self) -> np.ndarray | None:
        """Σκ_i‖P_i‖ + ‖P_mid‖; `None` if paths were not measured."""
        if self.paths is None:
            return None
        return np.asarray(pathwise_bound(self.paths, self.middle) + self.around)

    @property
    def sound(self) -> np.ndarray:
        """Where every quantity is finite and there is some sensitivity."""
        every = [self.secant, self.exact, self.residual, self.blockwise, self.paper]
        every += [] if self.pathwise is None else [self.pathwise, self.gap]
        return np.asarray(np.isfinite(np.stack(every)).all(axis=0) & (self.exact > 0))

    @property
    def ordered(self) -> np.ndarray:
        """Where each is no larger than the next, as far as σ_max(J) is known."""
        above = 1 + TOLERANCE
        ordered = np.asarray(self.secant <= (self.exact + self.residual) * above)
        bounds = [] if self.pathwise is None else [self.pathwise]
        for low, high in pairwise([self.exact, *bounds, self.blockwise, self.paper]):
            ordered = ordered & (low <= high * above)
        return ordered


def robustness_chain(run: Evidence) -> Chain:
    """Assemble the chain from recorded secants, norms and gains; empty if none were recorded."""
    exact = run.samples("sigma_max", "J")
    if not exact.size:
        nothing = np.empty((0, 0))
        return Chain(nothing, nothing, nothing, nothing, nothing, None, nothing, nothing, nothing)
    secants = run.frame[run.frame.metric == "secant"].site.unique()
    smallest = min(secants, key=lambda site: float(site.removeprefix("eps=")))
    kappa = np.moveaxis(_skip_gains(run, exact.shape[2]), 1, 0)  # levels first
    lip_a = np.moveaxis(run.samples("lipschitz", "a"), 1, 0)
    lip_b = np.moveaxis(run.samples("lipschitz", "b"), 1, 0)
    l0 = run.samples("lipschitz", "mid")[:, 0]
    paths = run.samples("path", "skip")
    other = {site: run.samples("path", site) for site in ("mid", "around")}
    around = other["around"][:, 0] if paths.size else np.zeros_like(l0)
    return Chain(
        secant=run.samples("secant", smallest)[:, 0],
        exact=exact[:, 0],
        residual=run.samples("sigma_max_residual", "J")[:, 0],
        blockwise=blockwise_bound(kappa, lip_a, lip_b, l0) + around,
        paper=robustness_bound(kappa, max_block_gain(lip_a, lip_b), l0) + around,
        paths=np.moveaxis(paths, 1, 0) if paths.size else None,
        middle=other["mid"][:, 0] if paths.size else np.zeros_like(l0),
        around=around,
        gap=run.samples("path_gap", "J")[:, 0] if paths.size else np.zeros_like(l0),
    )


def _skip_gains(run: Evidence, samples: int) -> np.ndarray:
    """κ_i on the leading samples (steps, levels, samples).

    Where more is done to u_i than multiplying it by a constant, the norm of all that is done, how
    it changes with the input included.
    """
    whole = run.samples("lipschitz", "skip")
    if whole.size and (run.input_dependent or None in run.own_kappa):
        return whole
    return run.sampled_kappa()[:, :, :samples]


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
    if (chain.gap > GAP[run.info.get("dtype", "float32")]).any():
        advice = (
            f"the paths leave {chain.gap.max():.1%} of J out: two of them share a way (a skip's "
            "gate looks at the decoder), so that their norms bound nothing"
        )
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
    if chain.pathwise is not None:
        pathwise = float(np.median(chain.pathwise / chain.exact))
        level = int(chain.paths.mean(axis=(1, 2)).argmax()) + 1 if chain.paths is not None else 0
        note += f"; path by path {pathwise:.3g} (median), most of it through skip {level}"
    unsettled = int((chain.residual > TOLERANCE * chain.exact).sum())
    if unsettled:
        note += f"; σ_max(J) did not settle at {unsettled} points: raise max_products"
    status: Status = "INCONCLUSIVE" if unsettled else "HOLDS"
    if run.input_dependent:
        note += (
            "; κ is the norm of the whole skip, how it changes with the input included"
            if run.samples("lipschitz", "skip").size
            else "; κ is the measured gain: the theorem leaves out how gates change with the input"
        )
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


def sensitivity_table(run: Evidence) -> list[dict[str, Any]]:
    """The hierarchy of Theorem 3.4 at every measured step or noise level, means over samples.

    Returns:
        For each of them `measured` (the largest of some random secants), `exact` (σ_max(J)),
        `pathwise`, `blockwise`, `paper`, `paths` (κ_i‖P_i‖, one number a level), `middle`
        (‖P_mid‖), `around` (norm of paths that Eq. 4 has not) and `gap` (share of J that all paths
        together leave out). Where paths were not measured those of them are `None`.
    """
    chain = robustness_chain(run)
    rows = []
    for step in range(len(chain.exact)):
        row: dict[str, Any] = {
            "measured": chain.secant[step].mean(),
            "exact": chain.exact[step].mean(),
            "pathwise": None if chain.pathwise is None else chain.pathwise[step].mean(),
            "blockwise": chain.blockwise[step].mean(),
            "paper": chain.paper[step].mean(),
        }
        paths = None if chain.paths is None else chain.paths[:, step].mean(axis=1)
        row |= {
            "paths": None if paths is None else [float(path) for path in paths],
            "middle": chain.middle[step].mean(),
            "around": chain.around[step].mean(),
            "gap": chain.gap[step].max(),
        }
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    return rows
