"""Runs side by side: what differs in their settings, what came of them, what they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stability_probe.report.texts import NONE, flat, number, percent, shown
from stability_probe.verify import Evidence
from stability_probe.verify.oscillation import oscillation_table
from stability_probe.verify.robustness import sensitivity_table

KNOWN = ("scheme", "seed")
"""What `run.json` says beside the configuration, and what stands first."""


@dataclass(frozen=True)
class Row:
    """A property of every run.

    Attributes:
        name: what it is.
        cells: one a run.
        about: what it means, where that is not plain.
    """

    name: str
    cells: list[str]
    about: str = ""


@dataclass(frozen=True)
class Sides:
    """Rows of a table with a column a run.

    Attributes:
        kind: what kind of runs they are, in words.
        runs: names.
        differing: settings that are not the same in all runs.
        results: what came of them.
        common: settings that are.
    """

    kind: str
    runs: list[str]
    differing: list[Row]
    results: list[Row]
    common: list[Row]


def side_by_side(evidence: Sequence[Evidence]) -> list[Sides]:
    """What runs are, next to each other; each kind for itself, as they share few settings."""
    kinds = dict.fromkeys(run.kind for run in evidence)
    return [_sides([run for run in evidence if run.kind == kind]) for kind in kinds]


def _sides(runs: Sequence[Evidence]) -> Sides:
    settings = [settings_of(run) for run in runs]
    names = list(dict.fromkeys(name for of_run in settings for name in of_run))
    rows = [Row(name, [of_run.get(name, NONE) for of_run in settings]) for name in names]
    return Sides(
        kind=kind_of(runs[0]),
        runs=[run.name for run in runs],
        differing=[row for row in rows if len({*row.cells}) > 1],
        results=results(runs),
        common=[row for row in rows if len({*row.cells}) == 1],
    )


def kind_of(run: Evidence) -> str:
    """What kind of run it is, in words."""
    return {"checkpoint": "checkpoint", "ensemble": "random networks"}.get(run.kind, "training")


def settings_of(run: Evidence) -> dict[str, str]:
    """The settings of a run by name, those first that say most."""
    info = run.info
    about: dict[str, Any] = {name: info[name] for name in KNOWN if name in info}
    if run.n_skips:
        about["long skips N"], about["κ"] = run.n_skips, kappa_text(run)
    if isinstance(info.get("parameters"), int):
        about["parameters"] = f"{info['parameters']:,}"
    config = flat({k: v for k, v in _mapping(info.get("config")).items() if k not in about})
    rest: dict[str, Any] = {
        name: info[name] for name in ("noise_levels", "device", "dtype") if name in info
    }
    probing = flat(_mapping(info.get("probing") or info.get("probe_settings")), "probing.")
    about |= config | rest | probing
    return {name: shown(value) for name, value in about.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def kappa_text(run: Evidence) -> str:
    """κ of every skip, the outermost first; what is learned or depends on the input, as measured.

    >>> import pandas as pd
    >>> from stability_probe.probes.records import COLUMNS
    >>> nothing = pd.DataFrame(columns=list(COLUMNS))
    >>> kappa_text(Evidence("cs", nothing, {"kappa": [1.0, 0.7]}))
    '1, 0.7'
    """
    kappa = ", ".join(number(k) for k in run.kappa)
    return f"depends on the input, mean {kappa}" if run.input_dependent else kappa or NONE


def results(evidence: Sequence[Evidence]) -> list[Row]:
    """What came of every run; what none of them has is left out."""
    rows = [
        Row("state", [state(run) for run in evidence]),
        Row(
            "records up to",
            [last_step(run) for run in evidence],
            "Optimizer steps of a training, noise levels of a checkpoint, random networks.",
        ),
        Row(
            "final loss",
            [number(run.final_loss, 4) for run in evidence],
            "Mean over the last tenth of the recorded steps.",
        ),
        Row(
            "swing of ‖h₀‖²",
            [number(swing(run)) for run in evidence],
            "Largest less smallest energy of the last decoder feature during training, after the "
            "first sixth of it: the oscillation that Theorem 3.1 is about.",
        ),
        *_sensitivities(evidence),
        Row(
            "overhead of the probe",
            [overhead(run) for run in evidence],
            "Of a step without it; scheduled measurements are apart, below.",
        ),
    ]
    return [row for row in rows if {*row.cells} != {NONE}]


def state(run: Evidence) -> str:
    """How the run ended, with the reason if it failed."""
    found = str(run.info.get("state", NONE))
    reason = run.info.get("reason")
    if found == "running":
        return "running, or killed"
    return f"{found}: {reason}" if reason else found


def last_step(run: Evidence) -> str:
    """The last recorded step, noise level or network."""
    unit = {"checkpoint": "noise level", "ensemble": "network"}.get(run.kind, "step")
    return NONE if run.frame.empty else f"{unit} {int(run.frame.step.max()):,}"


def swing(run: Evidence) -> float | None:
    """Range over training of the batch-mean ‖h_0‖²; `None` if it was not recorded."""
    if run.kind != "training" or not run.n_skips:
        return None
    table = oscillation_table([run])
    found = table[table.level == 0]["range"]
    return float(found.iloc[0]) if len(found) else None


def _sensitivities(evidence: Sequence[Evidence]) -> list[Row]:
    """σ_max(J) and the bound of Theorem 3.4 at the last measurement, or over noise levels."""
    tables = [sensitivity_table(run) for run in evidence]
    shown_of = [
        table[-1:] if run.kind == "training" else table
        for table, run in zip(tables, evidence, strict=True)
    ]
    about = {
        "exact": (
            "sensitivity σ_max(J)",
            "Largest output change over input change, mean over samples: the last measurement of a "
            "training, every noise level of a checkpoint.",
        ),
        "paper": ("bound of it", "By Theorem 3.4, from the norms of the blocks."),
    }
    return [
        Row(name, [", ".join(number(row[key]) for row in rows) or NONE for rows in shown_of], text)
        for key, (name, text) in about.items()
    ]


def overhead(run: Evidence) -> str:
    """What the probe took of a step."""
    cost = _mapping(run.info.get("probe"))
    return percent(cost["overhead"]) if "overhead" in cost else NONE
