"""Theorem 3.4: measured sensitivity ≤ σ_max(J) ≤ the bound, at every probed point."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stability_probe.theory import blockwise_bound, max_block_gain, pathwise_bound, robustness_bound
from stability_probe.verify.advice import nothing_measured
from stability_probe.verify.evidence import Evidence
from stability_probe.verify.statistics import share_interval
from stability_probe.verify.verdict import Status, Verdict

TOLERANCE = 1e-2
"""Relative error allowed to secants of a finite step, and width of σ_max(J) that is settled."""
ROUNDING = {"float32": 1e-4, "float64": 1e-6, "bfloat16": 0.05, "float16": 0.05}
"""Relative error of rounding allowed in every comparison of norms."""
GAP = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Share of J that rounding may make of paths that do add up to it, with a margin of 10 or more."""


@dataclass(frozen=True)
class Norms:
    """The norms of Theorem 3.4 at every probed point, each (steps, samples), from one side.

    Attributes:
        exact: σ_max(J).
        blockwise: the bound with each block's own Lipschitz constant at the point.
        paper: the bound with M_0 and L_0 at the point.
        paths: κ_i‖P_i‖ of every skip (levels, steps, samples); `None` if paths were not measured.
        middle: ‖P_mid‖ likewise (steps, samples).
        around: norm of the paths around all skips and the middle, which Eq. 4 has not; it is a part
            of the three bounds. 0 if it was not measured.
    """

    exact: np.ndarray
    blockwise: np.ndarray
    paper: np.ndarray
    paths: np.ndarray | None
    middle: np.ndarray
    around: np.ndarray

    @classmethod
    def of(cls, run: Evidence, upper: bool) -> "Norms":
        """From recorded norms and gains: estimates from below, or certified upper bounds.

        Records without upper bounds have the estimates in their place.
        """

        def norms(metric: str, site: str) -> np.ndarray:
            """(levels, steps, samples)."""
            found = run.samples(f"{metric}_upper", site) if upper else np.empty(0)
            return np.moveaxis(found if found.size else run.samples(metric, site), 1, 0)

        exact = norms("sigma_max", "J")[0]
        kappa = _skip_gains(run, norms("lipschitz", "skip"), exact.shape[1])
        lip_a, lip_b = norms("lipschitz", "a"), norms("lipschitz", "b")
        l0, paths = norms("lipschitz", "mid")[0], norms("path", "skip")
        around = norms("path", "around")[0] if paths.size else np.zeros_like(l0)
        return cls(
            exact=exact,
            blockwise=blockwise_bound(kappa, lip_a, lip_b, l0) + around,
            paper=robustness_bound(kappa, max_block_gain(lip_a, lip_b), l0) + around,
            paths=paths if paths.size else None,
            middle=norms("path", "mid")[0] if paths.size else np.zeros_like(l0),
            around=around,
        )

    @property
    def pathwise(self) -> np.ndarray | None:
        """Σκ_i‖P_i‖ + ‖P_mid‖ and what goes around; `None` if paths were not measured."""
        if self.paths is None:
            return None
        return np.asarray(pathwise_bound(self.paths, self.middle) + self.around)

    @property
    def rising(self) -> list[np.ndarray]:
        """σ_max(J) and its bounds, each no larger than the next if the theorem is right."""
        bounds = [] if self.pathwise is None else [self.pathwise]
        return [self.exact, *bounds, self.blockwise, self.paper]


@dataclass(frozen=True)
class Chain:
    """Theorem 3.4 at every probed point, each array (steps, samples).

    Attributes:
        secant: largest ‖Δoutput‖/ε_δ at the smallest ε_δ, over random directions and the worst.
        random: the same over random directions alone.
        lower: norms estimated from below.
        upper: norms bounded from above.
        gap: the share of J that all paths together leave out.
        rounding: relative error allowed in comparisons of norms.
    """

    secant: np.ndarray
    random: np.ndarray
    lower: Norms
    upper: Norms
    gap: np.ndarray
    rounding: float

    @property
    def exact(self) -> np.ndarray:
        """σ_max(J), from below."""
        return self.lower.exact

    @property
    def sound(self) -> np.ndarray:
        """Where every quantity is finite and there is some sensitivity."""
        every = [self.secant, self.random, self.gap, *self.lower.rising, *self.upper.rising]
        return np.asarray(np.isfinite(np.stack(every)).all(axis=0) & (self.exact > 0))

    @property
    def exceeding(self) -> np.ndarray:
        """Where a secant is above σ_max(J), which bounds only its limit.

        The network bends there, or ε_δ is so small that rounding shows. This refutes nothing:
        ‖Δout‖ ≤ σ_max(J)‖δ‖ + what is of higher order in δ.
        """
        allowed = (1 + TOLERANCE) * (1 + self.rounding)
        return np.asarray(self.secant > self.upper.exact * allowed)

    @property
    def unsettled(self) -> np.ndarray:
        """Where σ_max(J) is not known as closely as `TOLERANCE`."""
        allowed = (1 + TOLERANCE) * (1 + self.rounding)
        return np.asarray(self.upper.exact > self.exact * allowed)

    @property
    def ordered(self) -> np.ndarray:
        """Where no lower bound of a norm is above the upper bound of a larger one."""
        ordered = np.ones(self.exact.shape, bool)
        for k, low in enumerate(self.lower.rising):
            for high in self.upper.rising[k + 1 :]:
                ordered &= low <= high * (1 + self.rounding)
        return ordered


def robustness_chain(run: Evidence) -> Chain | None:
    """Assemble the chain from recorded secants, norms and gains; `None` if none were recorded."""
    if not run.samples("sigma_max", "J").size:
        return None
    sites = run.frame[run.frame.metric == "secant"].site.unique()
    smallest = min(sites, key=lambda site: float(site.removeprefix("eps=")))
    random, worst = (run.samples(metric, smallest) for metric in ("secant", "secant_worst"))
    lower, gap = Norms.of(run, upper=False), run.samples("path_gap", "J")
    return Chain(
        secant=(np.maximum(random, worst) if worst.size else random)[:, 0],
        random=random[:, 0],
        lower=lower,
        upper=Norms.of(run, upper=True),
        gap=gap[:, 0] if gap.size else np.zeros_like(lower.exact),
        rounding=ROUNDING[run.info.get("dtype", "float32")],
    )


def _skip_gains(run: Evidence, whole: np.ndarray, samples: int) -> np.ndarray:
    """κ_i on the leading samples (levels, steps, samples).

    Where more is done to u_i than multiplying it by a constant, the norm of all that is done, how
    it changes with the input included.
    """
    if whole.size and (run.input_dependent or None in run.own_kappa):
        return whole
    return np.moveaxis(run.sampled_kappa()[:, :, :samples], 1, 0)


def robustness_verdict(run: Evidence) -> Verdict:
    """Whether the chain holds at every probed point, with the slack at the typical one.

    The units are samples: the same ones are probed at every scheduled step.
    """
    claim = "‖Δout‖/ε ≤ σ_max(J) ≤ Σκ_i M₀ⁱ + M₀ᴺL₀ at every point"
    chain = robustness_chain(run)
    if chain is None:
        return Verdict.undecided("3.4", run.name, claim, nothing_measured(run))
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
    slack = chain.upper.paper / chain.exact
    typical = int(np.argsort(slack.ravel())[slack.size // 2])
    doubtful = chain.unsettled.any() or chain.exceeding.any()
    status: Status = "INCONCLUSIVE" if doubtful else "HOLDS"
    return Verdict(
        "3.4",
        run.name,
        claim,
        status if ordered.all() else "VIOLATED",
        measured=float(chain.exact.ravel()[typical]),
        bound=float(chain.upper.paper.ravel()[typical]),
        statistic="share of points",
        estimate=share,
        interval=share_interval(share, n),
        confidence=0.95,
        n=n,
        advice="; ".join([*_tightness(chain), *_doubts(chain), *_gates(run)]),
    )


def _tightness(chain: Chain) -> list[str]:
    """How far the bounds are above σ_max(J), in words."""
    slack, blockwise, secant = (
        above / below
        for above, below in (
            (chain.upper.paper, chain.exact),
            (chain.upper.blockwise, chain.exact),
            (chain.exact, chain.random),
        )
    )
    said = [
        f"slack {slack.min():.3g} at the tightest point, {np.median(blockwise):.3g} block by block "
        "(median)",
        f"σ_max(J) is {np.median(secant):.2g} times the largest random secant",
    ]
    if chain.upper.pathwise is not None and chain.upper.paths is not None:
        pathwise = np.median(chain.upper.pathwise / chain.exact)
        level = int(chain.upper.paths.mean(axis=(1, 2)).argmax()) + 1
        said.append(f"path by path {pathwise:.3g} (median), most of it through skip {level}")
    return said


def _doubts(chain: Chain) -> list[str]:
    """Where nothing can be said, in words."""
    said, unsettled, above = [], int(chain.unsettled.sum()), int(chain.exceeding.sum())
    if unsettled:
        said.append(f"σ_max(J) did not settle at {unsettled} points: raise max_products")
    if above:
        said.append(
            f"at {above} points a secant of the smallest ε_δ is above σ_max(J): the network bends "
            "within ε_δ, or rounding is as large as what ε_δ changes; try another ε"
        )
    return said


def _gates(run: Evidence) -> list[str]:
    """What gates that look at the input do to κ, in words."""
    said = []
    if run.input_dependent:
        said.append(
            "κ is the norm of the whole skip, how it changes with the input included"
            if run.samples("lipschitz", "skip").size
            else "κ is the measured gain: the theorem leaves out how gates change with the input"
        )
    term, bound = run.samples("gate_term_upper", "skip"), run.samples("gate_bound", "skip")
    if term.size:
        level = int(term.max(axis=(0, 2)).argmax()) + 1
        said.append(
            f"gates change with the input by ‖u∂κ/∂x‖ ≤ {term.max():.3g} (skip {level}), "
            f"‖u‖‖∂κ/∂x‖ ≤ {bound.max():.3g}, which the theorem leaves out"
        )
    return said


def sensitivity_table(run: Evidence) -> list[dict[str, Any]]:
    """The hierarchy of Theorem 3.4 at every measured step or noise level, means over samples.

    Returns:
        For each of them `measured` (the largest of some random secants), `worst` (the same, the
        worst direction included), `exact` (σ_max(J), from below), `exact_upper` (certified), and
        certified upper bounds `pathwise`, `blockwise`, `paper`, `paths` (κ_i‖P_i‖, one number a
        level), `middle` (‖P_mid‖) and `around` (norm of paths that Eq. 4 has not); of every path
        its `shares` of the worst case and its `alignment` with it, skips first, then the middle and
        around; `energy_shares`, ‖κ_iu_i‖² as a share of ‖κ_iu_i‖² + ‖z_i‖²; and `gap`, the share of
        J that all paths together leave out. What was not measured is `None`.
    """
    chain = robustness_chain(run)
    if chain is None:
        return []
    upper = chain.upper
    single = {
        "measured": chain.random, "worst": chain.secant, "exact": chain.exact,
        "exact_upper": upper.exact, "pathwise": upper.pathwise, "blockwise": upper.blockwise,
        "paper": upper.paper, "middle": upper.middle, "around": upper.around,
    }  # fmt: skip
    several = {
        "paths": None if upper.paths is None else np.moveaxis(upper.paths, 0, 1),
        "shares": _of_paths(run, "path_share"),
        "alignment": _of_paths(run, "path_alignment"),
        "energy_shares": _energy_shares(run),
    }
    rows = []
    for step in range(len(chain.exact)):
        row: dict[str, Any] = {
            name: None if v is None else float(v[step].mean()) for name, v in single.items()
        }
        row |= {
            name: None if v is None else v[step].mean(axis=1).tolist()
            for name, v in several.items()
        }
        rows.append(row | {"gap": float(chain.gap[step].max())})
    return rows


def global_bound(run: Evidence) -> float | None:
    """Theorem 3.4 with the blocks' certified global constants; `None` if there are none.

    It holds between any two inputs, not at a point alone.
    """
    found = run.info.get("global_constants", {"refused": ""})
    if "refused" in found:
        return None
    m0 = max_block_gain(np.array(found["lip_a"]), np.array(found["lip_b"]))
    return float(robustness_bound(found["kappa"], m0, found["l0"]))


def _of_paths(run: Evidence, metric: str) -> np.ndarray | None:
    """A quantity of skips, middle and around: (steps, levels + 2, samples)."""
    found = [run.samples(metric, site) for site in ("skip", "mid", "around")]
    if not found[0].size:
        return None
    if not found[2].size:  # nothing goes around
        found[2] = np.zeros_like(found[1])
    return np.concatenate(found, axis=1)


def _energy_shares(run: Evidence) -> np.ndarray | None:
    """‖κ_iu_i‖² / (‖κ_iu_i‖² + ‖z_i‖²): (steps, levels, samples)."""
    ku, z = run.samples("sample_energy", "ku"), run.samples("sample_energy", "z")
    return ku / (ku + z) if ku.size else None
