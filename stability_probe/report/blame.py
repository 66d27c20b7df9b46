"""Which skip carries how much: the ways from input to output, one by one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stability_probe.report.texts import percent
from stability_probe.verify import Evidence
from stability_probe.verify.robustness import sensitivity_table


@dataclass(frozen=True)
class Way:
    """One way through the network, at one step or noise level.

    Attributes:
        when: the step or noise level.
        name: which way.
        place: where the skip starts and ends.
        kappa: κ_i; `None` for what is no skip.
        norm: κ_i‖P_i‖, the most that it can carry.
        bound: its share of the pathwise bound Σκ_i‖P_i‖ + ‖P_mid‖.
        worst: its share of the worst case that occurs; `None` if it was not measured.
        energy: share of the skip in the energy that its merge reads; `None` if there is none.
    """

    when: str
    name: str
    place: str
    kappa: float | None
    norm: float
    bound: float
    worst: float | None
    energy: float | None


@dataclass(frozen=True)
class Blame:
    """The ways of one run.

    Attributes:
        run: its name.
        sentence: what carries most.
        ways: those of the last measurement of a training, or of every noise level of a checkpoint.
    """

    run: str
    sentence: str
    ways: list[Way]


def blame_of(evidence: Sequence[Evidence]) -> list[Blame]:
    """The ways of every run that they were measured in."""
    return [found for run in evidence if (found := _blame(run)) is not None]


def _blame(run: Evidence) -> Blame | None:
    rows = [
        (when, row)
        for when, row in zip(_moments(run), sensitivity_table(run), strict=True)
        if row["paths"] is not None
    ]
    if run.kind == "training":
        rows = rows[-1:]
    ways = [way for when, row in rows for way in _ways(run, when, row)]
    if not ways:
        return None
    most = max(ways, key=lambda way: way.norm)
    at = f" ({most.place})" if most.place else ""
    sentence = (
        f"At {most.when} most goes through {most.name}{at}: {percent(most.bound, 2)} of the bound."
    )
    return Blame(run.name, sentence, ways)


def _moments(run: Evidence) -> list[str]:
    """What the steps are called at which sensitivity was measured."""
    steps = sorted(run.frame[run.frame.metric == "sigma_max"].step.unique())
    levels = run.info.get("noise_levels")
    if run.kind == "training":
        return [f"step {step:,}" for step in steps]
    return [f"t = {levels[step - 1]:g}" if levels else "any noise level" for step in steps]


def _ways(run: Evidence, when: str, row: dict[str, Any]) -> list[Way]:
    skips, n = run.info.get("skips") or [], len(row["paths"])
    worst = row["shares"] or [None] * (n + 2)
    energy = row["energy_shares"] or [None] * n
    total = row["pathwise"]
    ways = [
        Way(when, f"skip {i + 1}", _place(skips, i), run.kappa[i], norm, norm / total, worst[i],
            energy[i])
        for i, norm in enumerate(row["paths"])
    ]  # fmt: skip
    rest = {"the middle": row["middle"], "around all skips": row["around"]}
    ways += [
        Way(when, name, "", None, norm, norm / total, share, None)
        for (name, norm), share in zip(rest.items(), worst[n:], strict=True)
        if norm
    ]
    return ways


def _place(skips: Sequence[dict[str, Any]], index: int) -> str:
    """Where a skip starts and ends, if the run says."""
    if index >= len(skips):
        return ""
    return f"{skips[index].get('source') or 'input'} → {skips[index].get('sink') or 'output'}"
