"""Theorem 3.1's probability statement: does its band fail as rarely as the theorem says?

`decays` fits how failures die out with the width; these are the verdicts on the fits.
"""

from typing import Any

import numpy as np

from stability_probe.verify.decays import NARROWEST, Decays
from stability_probe.verify.statistics import ALPHA, at_most_status
from stability_probe.verify.verdict import Status, Verdict

SLOWEST = 0.75
"""Least exponent of m that counts as exponential: halfway to exp(−√m); finite widths move a true 1
by up to about 0.15."""
FREE = 0.1
"""|log–log slope| of c on N below which c counts as free of N."""


def concentration_verdict(decays: Decays, run: str, alpha: float = ALPHA) -> Verdict:
    """Is failure of the band exponentially rare in mρ², for every number of skips?

    The worst N decides, over the ρ of the table: rare large deviations, as of heavy-tailed weights,
    show at large ρ first. HOLDS if the slope is surely positive and the exponent of m surely at
    least `SLOWEST` for all N; VIOLATED if either surely is not, for some N, which by chance it is
    with probability α at most over both and all N together: the intervals, at both ends, are of
    confidence 1 − α/k for k numbers of skips, and need 2k/α resamples.
    """
    claim = "failures of the band are exponentially rare in mρ², N fixed"
    known = np.isfinite(decays.exponent[0]) if decays.n_skips else np.zeros(0, bool)
    if not known.any():
        advice = (
            f"no N has two widths m ≥ {NARROWEST}(N+1) and a ρ at which some, but less than half, "
            "of the networks fail; add networks, widths or values of ρ"
        )
        return Verdict.undecided("3.1", run, claim, advice, n=sum(decays.networks))
    tested = int(known.sum())
    confidence, needed = 1 - alpha / tested, int(np.ceil(2 * tested / alpha))
    if decays.resamples < needed:
        advice = f"{decays.resamples} resamples cannot show an interval of {confidence:.1%}; "
        advice += f"{needed} can"
        return Verdict.undecided("3.1", run, claim, advice, n=sum(decays.networks))
    statuses = [_decay_status(row) for row in decays.frame(confidence)[known].itertuples()]
    order: list[Status] = ["VIOLATED", "INCONCLUSIVE", "HOLDS"]
    status = min(statuses, key=order.index)
    exponents = np.where(known, decays.exponent[0], np.inf)
    worst = int(exponents.argmin())
    meaning = {
        "HOLDS": "a wider network is exponentially surer",
        "VIOLATED": "width does not buy what the theorem says: heavy-tailed or dependent weights",
        "INCONCLUSIVE": "too few networks or widths to tell it from slower decay; add some",
    }[status]
    return Verdict(
        "3.1",
        run,
        claim,
        status,
        statistic=f"exponent of m, at N = {decays.n_skips[worst]}",
        estimate=float(decays.exponent[0, worst]),
        interval=decays.interval(decays.exponent[:, worst], confidence),
        n=sum(decays.networks),
        confidence=confidence,
        advice=f"{meaning}; c = {_slopes(decays)}{_depth(decays)}",
    )


def _decay_status(row: Any) -> Status:
    """The status of one N: that of its slope and its exponent, whichever is worse."""
    exponent = at_most_status((-row.exponent_high, -row.exponent_low), -SLOWEST)
    if exponent == "VIOLATED" or row.slope_high <= 0:
        return "VIOLATED"
    return "HOLDS" if exponent == "HOLDS" and row.slope_low > 0 else "INCONCLUSIVE"


def depth_verdict(decays: Decays, run: str) -> Verdict:
    """Is the constant in Ω(mρ²) free of the number of skips, as the theorem prints it?

    HOLDS if the log–log slope of c on N surely lies within ±`FREE`, VIOLATED if surely outside.
    """
    claim = "the constant c of exp(−c mρ²) does not depend on N"
    slopes = decays.depth_slope()
    low, high = decays.interval(slopes)
    if not np.isfinite([slopes[0], low, high]).all():
        advice = "fewer than three numbers of skips have a positive slope; add some"
        return Verdict.undecided("3.1", run, claim, advice, n=sum(decays.networks))
    inside, outside = low >= -FREE and high <= FREE, high < -FREE or low > FREE
    status: Status = "HOLDS" if inside else "VIOLATED" if outside else "INCONCLUSIVE"
    meaning = {
        "HOLDS": "the same width serves any depth",
        "VIOLATED": "the width for the same certainty changes with depth: Ω(·) holds for fixed N",
        "INCONCLUSIVE": "too few networks or depths to tell; add some",
    }[status]
    return Verdict(
        "3.1",
        run,
        claim,
        status,
        statistic="log–log slope of c on N",
        estimate=float(slopes[0]),
        interval=(low, high),
        n=sum(decays.networks),
        confidence=0.95,
        advice=f"{meaning}; c = {_slopes(decays)}",
    )


def _slopes(decays: Decays) -> str:
    """c for every N, and the least over single ρ, in words."""
    fits = zip(decays.n_skips, decays.slope[0], decays.least, strict=True)
    return ", ".join(f"{c:.3g} (N = {n}, at the worst ρ {least:.3g})" for n, c, least in fits)


def _depth(decays: Decays) -> str:
    """How c depends on N, in words, where that is known."""
    slopes = decays.depth_slope()
    low, high = decays.interval(slopes)
    if not np.isfinite([slopes[0], low, high]).all():
        return ""
    return f"; c goes as N^{slopes[0]:.2f} [{low:.2f}, {high:.2f}] (95 %)"
