"""Runs that differ by their seed alone, as one group, with their numbers side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stability_probe.errors import StabilityProbeError
from stability_probe.regression.measures import Measures, measures_of
from stability_probe.runs import Run
from stability_probe.runs.commands import train_command
from stability_probe.runs.run import short_names
from stability_probe.verify import Evidence, verify

SEED_OF_NONE = "none"
"""Stands for the seed of a run that does not say one."""
UNNAMED = "runs"
"""The name of a group whose runs say no scheme."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration over seeds.

    Attributes:
        name: of the scaling scheme, or of the configuration.
        about: what the runs have in common, and others need to have to be compared with them.
        context: what may differ, and is told if it does: versions, device, number of parameters.
        command: what makes one of the runs again.
        seeds: one a run.
        tested: the numbers that are compared, by name, one a run.
        hints: numbers that tell where a change comes from, likewise.
        verdicts: statuses of the theorems' claims, likewise.
    """

    name: str
    about: dict[str, Any]
    context: dict[str, Any]
    command: str
    seeds: list[str]
    tested: dict[str, list[float]]
    hints: dict[str, list[float]] = field(default_factory=dict)
    verdicts: dict[str, list[str]] = field(default_factory=dict)


def group_runs(runs: Sequence[Run], *, failed: bool = True) -> list[Group]:
    """Runs by their scheme, in the order of its name.

    Args:
        runs: at least one.
        failed: whether a run that failed, by diverging say, is let in; its numbers are not finite.

    Raises:
        StabilityProbeError: if there is none, if one is not complete, was recorded without numbers
            to compare, or if those of one scheme differ by more than their seed.
    """
    if not runs:
        raise StabilityProbeError("at least one run is needed, got none")
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        _refuse_unfinished(run, failed)
        by_name.setdefault(_name(run.info), []).append(run)
    return [_group(name, by_name[name]) for name in sorted(by_name)]


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, in words.

    >>> differences({"config": {"width": 8}}, {"config": {"width": 4}})
    ['config.width is 8 and 4']
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = sorted({*one, *other})
        inside = (
            differences(one.get(n), other.get(n), f"{path}.{n}" if path else n) for n in names
        )
        return [text for found in inside for text in found]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True), start=1)
        return [text for i, pair in pairs for text in differences(*pair, f"{path} {i}")]
    return [] if one == other else [f"{path} is {_short(one)} and {_short(other)}"]


def side_by_side(
    name: str, numbers: Sequence[Mapping[str, float]], must: bool = True
) -> dict[str, list[float]]:
    """Numbers that all of several runs have, by name, one a run; in the order of the first run.

    Raises:
        StabilityProbeError: if there are none and there have to be.

    >>> side_by_side("cs", [{"loss": 1.0, "energy.h_0": 2.0}, {"loss": 3.0}])
    {'loss': [1.0, 3.0]}
    """
    shared = [key for key in numbers[0] if all(key in of_run for of_run in numbers)]
    if must and not shared:
        raise StabilityProbeError(f"{runs_of(name)}: have no records in common to compare")
    return {key: [of_run[key] for of_run in numbers] for key in shared}


def runs_of(name: str) -> str:
    """What to call the runs of a group.

    >>> runs_of("cs:0.7"), runs_of("runs")
    ('runs of cs:0.7', 'the runs')
    """
    return "the runs" if name == UNNAMED else f"runs of {name}"


def _short(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list | Mapping):
        return f"{len(value)} entries"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _refuse_unfinished(run: Run, failed: bool) -> None:
    state, reason = run.info.get("state"), run.info.get("reason")
    diverged = str(reason).startswith("TrainingDiverged")
    if state == "complete" or (failed and state == "failed" and diverged):
        return
    why = f" ({reason})" if reason else ""
    raise StabilityProbeError(
        f"{run.path}: is {state}{why}; only complete runs can be compared, so record it again"
    )


def _name(info: Mapping[str, Any]) -> str:
    return str(info.get("scheme") or info.get("config", {}).get("scheme") or UNNAMED)


def _group(name: str, runs: Sequence[Run]) -> Group:
    first, abouts = runs[0], [_about(run.info) for run in runs]
    for run, about in zip(runs, abouts, strict=True):
        found = differences(abouts[0], about)
        if found:
            which = " and ".join(short_names([first.path, run.path]))
            raise StabilityProbeError(
                f"{runs_of(name)} have to differ by their seed alone: {found[0]} in "
                f"{which}; give those of one configuration"
            )
    seeds = [_seed(run.info) for run in runs]
    _refuse_dependent(name, runs, seeds)
    order = sorted(range(len(runs)), key=lambda i: (len(seeds[i]), seeds[i]))
    evidence = [Evidence.of(runs[i]) for i in order]
    measures = _measures(evidence)
    return Group(
        name=name,
        about=abouts[0],
        context=_context(first.info),
        command=_command(first.info),
        seeds=[seeds[i] for i in order],
        tested=side_by_side(name, [m.tested for m in measures]),
        hints=side_by_side(name, [m.hints for m in measures], must=False),
        verdicts=_verdicts([runs[i] for i in order]),
    )


def _refuse_dependent(name: str, runs: Sequence[Run], seeds: Sequence[str]) -> None:
    """Check that every run has a seed of its own, so that none is another once more."""
    doubled = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if doubled is None:
        return
    paths = [run.path for run, seed in zip(runs, seeds, strict=True) if seed == doubled]
    which = " and ".join(short_names(paths))
    if doubled == SEED_OF_NONE:
        raise StabilityProbeError(
            f"{runs_of(name)}: {which} say no seed, so that they may be one run twice; record it "
            'with them, as in Run(path, {"seed": 0})'
        )
    raise StabilityProbeError(
        f"{runs_of(name)}: {which} have the seed {doubled}, and are no independent runs; give one "
        "of each seed"
    )


def _measures(runs: Sequence[Evidence]) -> list[Measures]:
    """The numbers of runs; of one that failed none is finite, whatever it recorded before."""
    found = [measures_of(run) for run in runs]
    whole = next((m for m, run in zip(found, runs, strict=True) if not run.failed), found[0])
    lost = Measures(dict.fromkeys(whole.tested, math.inf), whole.hints)
    return [lost if run.failed else m for m, run in zip(found, runs, strict=True)]


def _seed(info: Mapping[str, Any]) -> str:
    return str(info.get("seed", info.get("config", {}).get("seed", SEED_OF_NONE)))


def _about(info: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same: what was asked for, and the skips that were found."""
    config = {k: v for k, v in info.get("config", {}).items() if k not in ("seed", "scheme")}
    kappa = info.get("kappa")
    probing = info.get("probing") or info.get("probe_settings") or {}
    schedule = {k: probing[k] for k in SCHEDULE if k in probing}
    skips = ["{} -> {} ({})".format(*(s.get(k) for k in ("source", "sink", "merge")))
             for s in info.get("skips", [])]  # fmt: skip
    return {
        "kind": info.get("kind", "training"),
        "config": config,
        "kappa": kappa and [float(f"{k:.6g}") for k in kappa],
        "noise_levels": info.get("noise_levels"),
        "schedule": schedule,
        "skips": skips,
    }


def _context(info: Mapping[str, Any]) -> dict[str, Any]:
    versions = info.get("versions", {})
    return {
        **{
            name: versions[name]
            for name in ("python", "stability_probe", "torch")
            if name in versions
        },
        **{name: info[name] for name in ("device", "parameters") if name in info},
    }


def _command(info: Mapping[str, Any]) -> str:
    """What makes one of the runs again, as far as `run.json` tells."""
    known = info.get("kind") == "training" and train_command(info, "SEED", "RUN")
    return known or "the program that recorded the runs, with other seeds"


SCHEDULE = (
    "every", "sensitivity_every", "paths", "details_every", "noise_bins", "noise_levels",
    "sensitivity", "probe_samples", "sensitive_samples", "probe",
)  # fmt: skip
"""Settings of a probe on which its numbers depend."""


def _verdicts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The status of every claim about one run, run by run."""
    found = [{f"{v.theorem}: {v.claim}": v.status for v in verify(run)} for run in runs]
    shared = [claim for claim in found[0] if all(claim in of_run for of_run in found)]
    return {claim: [str(of_run[claim]) for of_run in found] for claim in shared}
