"""Where a regression probably comes from, in words: read off what changed and what did not."""

import math
from collections.abc import Sequence

import numpy as np

from stability_probe.regression.compare import Comparison
from stability_probe.regression.groups import Group

CLEARER = 1.25
"""How much more one noise level has risen than the middle one if it is to be named."""


def likely_cause(then: Group, now: Group, compared: Sequence[Comparison]) -> str:
    """What to look at first, if anything is worse; empty if nothing is."""
    worse = [c for c in compared if c.change == "worse"]
    if not worse:
        return ""
    diverged = [
        seed
        for i, seed in enumerate(now.seeds)
        if not all(math.isfinite(values[i]) for values in now.tested.values())
    ]
    if diverged:
        return f"training diverged with seed {', '.join(diverged)}: see its loss"
    found = _gains(worse, then) or _levels(worse, _innermost(then)) or _rest(worse, compared)
    where = _noise_level(then, now)
    return f"{found}; {where}" if where else found


def _gains(worse: Sequence[Comparison], then: Group) -> str:
    """Skips that pass more than they did, with the modules that they lead from and to."""
    risen = sorted((c for c in worse if c.name.startswith("gain.")), key=lambda c: c.name)
    if not risen:
        return ""
    texts = [f"{_skip(c.name, then)}: {c.is_now:.3g} (was {c.was:.3g})" for c in risen]
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return f"skips pass more of their features: measured gain of {', '.join(texts[:3])}{more}"


def _skip(name: str, group: Group) -> str:
    """A skip by its level, and by its modules if they are known."""
    level = int(name.rpartition("_")[2])
    modules = group.about.get("skips", [])
    if level > len(modules):
        return f"skip {level}"
    return f"skip {level} ({modules[level - 1].rpartition(' (')[0]})"


def _levels(worse: Sequence[Comparison], n_skips: int) -> str:
    """The innermost feature that has grown, and the block that makes it."""
    levels = sorted(
        int(c.name.rpartition("_")[2]) for c in worse if c.name.startswith(("energy.h_", "oscil"))
    )
    if not levels:
        return ""
    inner, outer = levels[-1], levels[0]
    block = "the middle or the encoder" if inner >= n_skips else f"decoder block b_{inner + 1}"
    through = f"from h_{inner} to h_{outer}" if inner > outer else f"at h_{inner}"
    return (
        f"features are larger {through}, with the skips' gains as they were: look at {block}, "
        "and at the learning rate"
    )


def _innermost(group: Group) -> int:
    """N, from the features that were recorded."""
    names = [name for name in group.tested if name.startswith("energy.h_")]
    return max((int(name.rpartition("_")[2]) for name in names), default=0)


def _rest(worse: Sequence[Comparison], compared: Sequence[Comparison]) -> str:
    smaller = [c.name for c in compared if c.change == "better" and c.name.startswith("energy.")]
    if smaller:
        levels = ", ".join(name.removeprefix("energy.") for name in sorted(smaller))
        return (
            f"features are smaller at {levels}, so that the network itself is another: look at "
            "its normalisations, its initialisation and its last layers"
        )
    kinds = {c.name.partition(".")[0] for c in worse}
    if kinds <= {"sensitivity", "path"}:
        return "the Jacobian has grown and features have not: look at the layers on the worst path"
    if kinds <= {"gradient", "loss"}:
        return "features are as they were: look at the loss, the data and the learning rate"
    return "features are as they were"


def _noise_level(then: Group, now: Group) -> str:
    """The noise level at which one of the hints has risen most, if it stands out."""
    best = (CLEARER, "")
    for quantity in ("energy.h_0", "loss", "sensitivity.exact"):
        prefix = f"{quantity}.t"
        ratios = {
            name.removeprefix(prefix): _mean(now.hints[name]) / _mean(before)
            for name, before in then.hints.items()
            if name.startswith(prefix) and name in now.hints and _mean(before) > 0
        }
        finite = {level: r for level, r in ratios.items() if math.isfinite(r)}
        if len(finite) < 2:
            continue
        level, ratio = max(finite.items(), key=lambda pair: pair[1])
        excess = ratio / float(np.median(list(finite.values())))
        if excess > best[0]:
            place = f"t {level}" if level.startswith("=") else f"noise-level bin t{level}"
            best = (excess, f"most at {place}, where {quantity} is ×{ratio:.3g}")
    return best[1]


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else math.nan
