"""Records and what is known about the run they come from, in the shape that claims need."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stability_probe.errors import StabilityProbeError
from stability_probe.probes import COLUMNS
from stability_probe.runs import Run
from stability_probe.runs.run import short_names
from stability_probe.theory import input_energy

SAME_GAIN = 1e-4
"""Measured gains that differ by less, relatively, are those of one constant."""


@dataclass(frozen=True)
class Evidence:
    """The records of one run.

    Attributes:
        name: what to call the run.
        frame: its records.
        info: its `run.json` and the folder's `path`; empty for a bare frame.

    Raises:
        StabilityProbeError: if the frame has not the columns of records.
    """

    name: str
    frame: pd.DataFrame
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [name for name in COLUMNS if name not in self.frame.columns]
        if missing:
            raise StabilityProbeError(
                f"{self.name}: records need the columns {', '.join(COLUMNS)}; "
                f"missing: {', '.join(missing)}"
            )

    @classmethod
    def of(cls, run: Run) -> "Evidence":
        """The evidence in a run folder.

        Raises:
            StabilityProbeError: if it cannot be read, or a checkpoint was probed at more noise
                levels than `run.json` states.
        """
        info, frame = run.info, run.records()
        info["path"] = str(run.path)
        levels, probed = info.get("noise_levels"), 0 if frame.empty else int(frame.step.max())
        if levels and info.get("kind") == "checkpoint" and len(levels) < probed:
            raise StabilityProbeError(
                f"{run.path / 'run.json'}: `noise_levels`: the records are of {probed}, got "
                f"{len(levels)}"
            )
        return cls(str(info.get("scheme") or run.name), frame, info)

    @property
    def kind(self) -> str:
        """`training`, `ensemble` for random networks, or `checkpoint` for one network."""
        return str(self.info.get("kind", "training"))

    @property
    def failed(self) -> bool:
        """Whether the run ended early, with an error."""
        return self.info.get("state") == "failed"

    @cached_property
    def n_skips(self) -> int:
        """N, from the levels of the recorded gains."""
        levels = self._select("kappa", "skip").level
        return int(levels.max()) if len(levels) else 0

    @cached_property
    def own_kappa(self) -> list[float | None]:
        """The κ_i in the network's own code; `None` where it does something else to u_i.

        Records without a `run.json` are taken to be of a network that does nothing to u_i.
        """
        skips = self.info.get("skips") or [{}] * self.n_skips
        return [skip.get("kappa", 1.0) for skip in skips]

    @cached_property
    def kappa(self) -> list[float]:
        """κ_1..κ_N: the constants if the scheme has them, else the mean measured gains.

        Times what the network's own code multiplies u_i by. Where that does something else to it,
        u_i is what enters the merge.

        Raises:
            StabilityProbeError: if `run.json` states another number of them than there are skips,
                or no numbers.
        """
        stated = self.info.get("kappa")
        if stated:
            if self.n_skips not in (0, len(stated)):
                raise StabilityProbeError(
                    f"{self.name}: run.json has kappa for {len(stated)} skips and the records are "
                    f"of {self.n_skips}; correct `kappa` in run.json"
                )
            try:
                return self._with_own([float(k) for k in stated])
            except ValueError as error:
                raise StabilityProbeError(
                    f"{self.name}: `kappa` in run.json is no list of numbers ({error})"
                ) from error
        measured = self.series("kappa", "skip")
        levels = range(1, self.n_skips + 1)
        return self._with_own([float(measured[level].mean()) for level in levels])

    def _with_own(self, kappa: list[float]) -> list[float]:
        return [
            k * (1.0 if own is None else own)
            for k, own in zip_longest(kappa, self.own_kappa, fillvalue=1.0)
        ]

    @cached_property
    def input_dependent(self) -> bool:
        """Whether κ_i depends on the input, so that the theorems do not literally apply.

        Where `run.json` does not say, κ is a constant if its measured gains are, to float accuracy.
        """
        if "kappa" in self.info:
            return self.info["kappa"] is None
        least, largest = (self.series("kappa", "skip", stat) for stat in ("min", "max"))
        return bool((largest.max() - least.min() > SAME_GAIN * largest.max()).any())

    @cached_property
    def law_kappa(self) -> list[float]:
        """The κ that explicit laws of energies take.

        Where κ depends on the input, the energy-weighted gain E‖κu‖²/E‖u‖² takes the place of κ².
        """
        if not self.input_dependent:
            return self.kappa
        weighted = self.series("energy", "ku").mean() / self.series("energy", "u").mean()
        return [float(k) for k in np.sqrt(weighted)]

    @property
    def unmet_scheme(self) -> str | None:
        """Why the theorems do not literally apply to the run's scaling scheme; `None` if they do.

        They do not where no κ_i can be named: FreeU, SC-Tuner. Gates (LS) have measured κ_i.
        """
        reason = self.info.get("unmet")
        return str(reason) if reason else None

    def series(self, metric: str, site: str, stat: str = "mean") -> pd.DataFrame:
        """A quantity over time: one row a step, one column a level."""
        rows = self._select(metric, site)
        rows = rows[rows.stat == stat]
        return rows.pivot(index="step", columns="level", values="value")

    @cached_property
    def final_loss(self) -> float | None:
        """Mean loss over the last tenth of the recorded steps, rounded up; `None` if there is none.

        Nor is there a final one where nothing was trained.
        """
        loss = self.series("loss", "loss")
        if self.kind != "training" or 0 not in loss:
            return None
        return float(np.mean(loss[0].to_numpy()[-math.ceil(len(loss) / 10) :]))

    @cached_property
    def predicted_input_energy(self) -> float | None:
        """E‖x_t‖² by Lemma 3.2, or `None` if `run.json` does not describe the input.

        Raises:
            StabilityProbeError: if the description is not what `theory.input_energy` takes.
        """
        if not self.info.get("input"):
            return None
        try:
            return input_energy(**self.info["input"])
        except (TypeError, ValueError) as error:
            raise StabilityProbeError(f"{self.name}: `input` in run.json: {error}") from error

    @cached_property
    def input_energies(self) -> pd.Series:
        """Batch-mean ‖x_t‖² by step; empty if nothing was recorded."""
        table = self.series("energy", "x")
        return table[0] if 0 in table else pd.Series(dtype=float)

    def samples(self, metric: str, site: str, level: int | None = None) -> np.ndarray:
        """A scheduled measurement; empty if it was not taken.

        Args:
            metric: the quantity.
            site: where.
            level: for one level an array (steps, samples), otherwise (steps, levels, samples) with
                levels rising.
        """
        if level is not None:
            at_level = self.frame[self.frame.level == level]
            table = Evidence(self.name, at_level, self.info).samples(metric, site)
            return table[:, 0] if table.size else np.empty((0, 0))
        rows = self._select(metric, site)
        rows = rows[rows.stat.astype(str).str.fullmatch(r"s\d+")]
        if rows.empty:
            return np.empty((0, 0, 0))
        index = rows.stat.astype(str).str[1:].astype(int)
        steps, step = np.unique(rows.step, return_inverse=True)
        levels, row = np.unique(rows.level, return_inverse=True)
        table = np.full((len(steps), len(levels), int(index.max()) + 1), np.nan)
        table[step, row, index] = rows.value
        return table

    @cached_property
    def sampled_steps(self) -> np.ndarray:
        """The steps at which scheduled measurements were taken."""
        rows = self._select("sample_energy", "x")
        return np.unique(rows.step)

    def sampled_kappa(self) -> np.ndarray:
        """κ_i on the probe batch: (steps, levels, samples); constants where they are known."""
        measured = self.samples("sample_kappa", "skip")
        if self.input_dependent:
            return measured
        return np.broadcast_to(np.reshape(self.kappa, (1, -1, 1)), measured.shape)

    def _select(self, metric: str, site: str) -> pd.DataFrame:
        return self.frame[(self.frame.metric == metric) & (self.frame.site == site)]


def gather(source: pd.DataFrame | Run | Sequence[Run]) -> list[Evidence]:
    """The evidence in a frame of records, in a run, or in several runs, the largest Σκ² first.

    Raises:
        StabilityProbeError: if there is nothing.
    """
    if isinstance(source, pd.DataFrame):
        return [Evidence("records", source)]
    runs = [source] if isinstance(source, Run) else list(source)
    if not runs:
        raise StabilityProbeError("verify: at least one run is needed, got none")
    found = sorted(map(Evidence.of, runs), key=lambda e: -sum(k**2 for k in e.kappa))
    seeds = [f"{e.name} seed {e.info.get('seed')}" if "seed" in e.info else e.name for e in found]
    found = _named_apart(found, seeds)
    folders = [Path(e.info["path"]) for e in found]
    places = [
        short if e.name == folder.name else f"{e.name} in {short}"
        for e, folder, short in zip(found, folders, short_names(folders), strict=True)
    ]
    return _named_apart(found, places)


def _named_apart(found: Sequence[Evidence], names: Sequence[str]) -> list[Evidence]:
    """The same with other names for those of a kind that have one name."""
    taken = Counter((e.kind, e.name) for e in found)
    return [
        replace(e, name=name) if taken[e.kind, e.name] > 1 else e
        for e, name in zip(found, names, strict=True)
    ]
