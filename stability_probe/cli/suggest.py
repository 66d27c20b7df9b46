"""`suggest`: the κ that meets a budget of sensitivity or feature energy at the least change."""

import shlex
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from stability_probe.cli.console import number, out, plain_table, progress
from stability_probe.cli.options import SubjectOptions
from stability_probe.cli.points import PointOptions, measurable, prepare
from stability_probe.cli.subject import Subject
from stability_probe.errors import StabilityProbeError
from stability_probe.runs.budget_search import Candidate
from stability_probe.runs.run import finite
from stability_probe.runs.suggesting import QUANTITIES, Budget, Suggestion, suggest_kappa
from stability_probe.skips import FixedScaling, Scaling

_NAMES = {"sigma_max": "σmax(J)", "pathwise": "path by path", "energy": "‖h₀‖²/‖x‖²"}


@dataclass(frozen=True)
class Suggested:
    """What came of it.

    Attributes:
        subject: the network.
        options: what the user said of it.
        scheme: the scaling that it was measured with; `None` for none.
        found: the suggestion.
        noise_levels: where it was measured; `None` if the network takes none.
        notes: what was assumed.
    """

    subject: Subject
    options: SubjectOptions
    scheme: Scaling | None
    found: Suggestion
    noise_levels: list[float] | None
    notes: list[str]

    def name_of(self, candidate: Candidate) -> str | None:
        """The scheme to pass with `--scheme`; `None` where it goes on top of another one."""
        n = len(self.subject.skips)
        given = self.scheme.coefficients(n) if self.scheme else [1.0] * n
        if given is None:
            return None
        return FixedScaling([k * m for k, m in zip(given, candidate.multipliers, strict=True)]).name

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        found = self.found
        rows = zip(self.subject.skips, found.kappa, found.best.kappa, found.cs.kappa, strict=True)
        everything: Any = finite(
            {
                **found.as_dict(),
                "checkpoint": self.subject.checkpoint.description,
                "notes": self.notes,
                "noise_levels": self.noise_levels,
                "levels": [
                    {"level": s.level, "source": s.source, "kappa": k, "suggested": b, "cs": c}
                    for s, k, b, c in rows
                ],
                "scheme": self.name_of(found.best),
                "cs_scheme": self.name_of(found.cs),
            }
        )
        return dict(everything)


def parse_budget(text: str) -> Budget:
    """A budget from its text.

    Raises:
        StabilityProbeError: if it is neither a positive number nor a percentage up to 100 %.

    >>> parse_budget("1.2"), parse_budget("80%")
    (Budget(value=1.2, relative=False), Budget(value=0.8, relative=True))
    """
    number = text.strip().removesuffix("%")
    relative = text.strip().endswith("%")
    try:
        value = float(number)
        return Budget(value / 100 if relative else value, relative)
    except ValueError:
        raise StabilityProbeError(
            f"--budget {text!r}: must be a positive number such as 1.2, or a percentage up to 100% "
            "of what is measured now"
        ) from None


def run_suggest(what: SubjectOptions, how: PointOptions, budget: str, of: str) -> Suggested:
    """Load, measure, solve, measure again.

    Args:
        what: the network.
        how: where to measure it.
        budget: a number, or a percentage of what is measured now.
        of: `sensitivity`, `pathwise` or `energy`.

    Raises:
        StabilityProbeError: if one of these cannot be done.
    """
    limit = parse_budget(budget)
    quantity = next((q for q in QUANTITIES if q == of), None)
    if quantity is None:
        raise StabilityProbeError(f"--of {of!r}: must be one of {', '.join(QUANTITIES)}")
    ready = prepare(what, how)
    subject, batches = ready.subject, [point.batch for point in ready.points]
    with measurable(subject.model), progress() as display:
        task = display.add_task("measurements", total=None)
        found = suggest_kappa(
            subject.model, subject.skips, batches, limit, of=quantity, scheme=ready.scheme,
            seed=what.seed, on_measured=lambda: display.advance(task),
        )  # fmt: skip
    levels = [p.noise_level for p in ready.points if p.noise_level is not None]
    notes = [*ready.notes, *found.notes]
    return Suggested(subject, what, ready.scheme, found, levels or None, notes)


def print_suggestion(result: Suggested) -> None:
    """Print κ by level, the values before and after, and how to apply the suggestion."""
    found = result.found
    console = out()
    console.print(_kappa_table(result))
    print()
    console.print(_value_table(found))
    print()
    for line in found.notes:
        print(f"note: {line}")
    now = found.before[_held(found)]
    if not found.best.met:
        off = ", with every skip turned off" if not any(found.best.multipliers) else ""
        print(
            f"no κ was found that meets the budget of {found.budget:.4g}; shown are those with the "
            f"lowest value that was measured, {found.best.largest:.4g} ({now:.4g} as found){off}"
        )
    elif now <= found.budget:
        print("the budget is met as found; a percentage, such as 80%, asks for less than that")
        return
    if found.best.highest > now:
        print(
            f"on the way {found.best.highest:.4g} was measured, more than as found: in front of a "
            "normalisation a smaller κ makes the other paths steeper"
        )
    if not found.cs.met:
        print("no CS was found that meets the budget: it never scales skip 1")
    if found.best.met:
        print(
            "measured at the samples above and nowhere else: others may exceed the budget, and "
            "nearer κ that meet it may exist"
        )
        _print_use(result)


def _held(found: Suggestion) -> str:
    """Which of the measured values is kept below the budget."""
    return "sigma_max" if found.of == "sensitivity" else found.of


def _kappa_table(result: Suggested) -> Table:
    found = result.found
    names = ("level", "source", "κ as found", "κ suggested", "κ of CS")
    table = plain_table(names, left=("source",))
    cs = found.cs.kappa if found.cs.met else [None] * len(found.kappa)
    for s, *kappa in zip(result.subject.skips, found.kappa, found.best.kappa, cs, strict=True):
        table.add_row(str(s.level), s.source or "(input)", *(number(k, 4) for k in kappa))
    return table


def _value_table(found: Suggestion) -> Table:
    """The largest values over samples and noise levels; those of CS where it meets the budget."""
    names = ("largest", "as found", "suggested", "CS", "budget")
    table = plain_table(names, left=("largest",))
    held = _held(found)
    for key, before in found.before.items():
        cs = found.cs.measured[key] if found.cs.met else None
        budget = f"{found.budget:.4g}" if key == held else ""
        row = (before, found.best.measured[key], cs)
        table.add_row(_NAMES[key], *(number(v, 4) for v in row), budget)
    both = (found.best, found.cs)
    table.add_row("rounds", "", *(str(c.rounds) for c in both), "")
    table.add_row("budget met", "", *("yes" if c.met else "no" for c in both), "")
    return table


def _print_use(result: Suggested) -> None:
    """How to apply a suggestion."""
    name = result.name_of(result.found.best)
    if name is None:
        name = FixedScaling(result.found.best.multipliers).name
        print(
            "to use it, multiply what the scaling of the network gives (`probe --scheme` would "
            "replace that scaling):"
        )
    else:
        of = result.options
        print(
            f"to use it: stability-probe probe {shlex.quote(str(of.checkpoint))} --scheme {name} "
            f"--batch {of.batch} --seed {of.seed} ..., which prints means where this "
            "prints the largest value"
        )
    print("  from stability_probe.skips import find_skips, parse_scaling, scale_skips")
    print(f'  scale_skips(model, find_skips(model, x, t), parse_scaling("{name}"))')
