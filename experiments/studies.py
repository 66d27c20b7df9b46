"""The runs that experiments rest on: grids of trainings, done once and shared by the claims."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError
from stability_probe.plots.tables import scheme_label
from stability_probe.regression.measures import run_numbers
from stability_probe.runs import Run, TrainConfig, build_model, load_images
from stability_probe.runs.grid import Grid
from stability_probe.runs.recording import seeded_scaling
from stability_probe.runs.resuming import diverged
from stability_probe.runs.sweep import OnDone, sweep
from stability_probe.runs.training import probe_batch
from stability_probe.skips import find_skips, scale_skips
from stability_probe.verify import Evidence

GRIDS = Path(__file__).parent / "grids"
SCALES = ("cpu", "gpu")
UNSCALED = "unscaled"
OUTERMOST, OTHERS = "kappa:0.7071,1,1,1,1,1", "kappa:1,0.7071,0.7071,0.7071,0.7071,0.7071"
"""Of six skips the outermost alone, or all the others, scaled by 1/√2."""
LABELS = {OUTERMOST: "1/√2 at skip 1 alone", OTHERS: "1/√2 at all but skip 1"}


@dataclass(frozen=True)
class Member:
    """A finished run of a grid.

    Attributes:
        config: its settings.
        run: its folder.
        diverged: whether its loss stopped being finite, which ended it early.
        numbers: those of its row in the sweep's table: what a check would compare, made when the
            run ended. Empty where it diverged.
    """

    config: TrainConfig
    run: Run
    diverged: bool
    numbers: Mapping[str, float] = field(compare=False, repr=False)

    @cached_property
    def evidence(self) -> Evidence:
        """Its records."""
        return Evidence.of(self.run)

    def network(self) -> nn.Module:
        """The trained network, its skips scaled as they were."""
        images = load_images(self.config.data)
        model = build_model(self.config, images.shape[1:])
        batch = probe_batch(self.config, images, 1, 1)
        skips = find_skips(model, *batch.args)
        scale_skips(model, skips, seeded_scaling(self.config.scheme, self.config.seed))
        model.load_state_dict(torch.load(self.run.path / "weights.pth", weights_only=True))
        return model.eval()

    @property
    def images(self) -> Tensor:
        """What it was trained on."""
        return load_images(self.config.data)


@dataclass(frozen=True)
class Study:
    """The runs of a grid.

    Attributes:
        grid: its name.
        members: the runs that have ended.
    """

    grid: str
    members: Sequence[Member]

    def where(self, **settings: Any) -> "Study":
        """The runs with some settings."""
        kept = [
            m for m in self.members if all(getattr(m.config, k) == v for k, v in settings.items())
        ]
        return Study(self.grid, kept)

    @property
    def schemes(self) -> list[str]:
        """Names of the schemes, in the grid's order."""
        return list(dict.fromkeys(member.config.scheme for member in self.members))

    def table(self, measure: Callable[[Member], float]) -> pd.DataFrame:
        """A number of every run: one row a seed, one column a scheme.

        Args:
            measure: of one run.
        """
        rows = [(m.config.scheme, m.config.seed, measure(m)) for m in self.members]
        frame = pd.DataFrame(rows, columns=["scheme", "seed", "value"])
        return frame.pivot(index="seed", columns="scheme", values="value")[self.schemes]


def label(scheme: str) -> str:
    """What tables and figures call a scheme."""
    if scheme in LABELS:
        return LABELS[scheme]
    columns = ["step", "metric", "site", "level", "stat", "value"]
    return scheme_label(Evidence(scheme, pd.DataFrame(columns=columns), {"scheme": scheme}))


def grid_file(name: str, scale: str) -> Path:
    """The file of a grid.

    Raises:
        StabilityProbeError: if there is none of that name.
    """
    file = GRIDS / scale / f"{name}.yaml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in (GRIDS / scale).glob("*.yaml")))
        raise StabilityProbeError(f"{file}: no such grid; choose from {known}")
    return file


def conduct(
    name: str, scale: str, out: Path, jobs: int | None = None, on_done: OnDone | None = None
) -> Study:
    """The runs of a grid; those that are missing in `out` are made, each in one thread.

    Raises:
        StabilityProbeError: if the grid or the folder cannot be used, or a run fails otherwise
            than by diverging.
    """
    grid = Grid.from_yaml(grid_file(name, scale))
    folder = out / scale / name
    done = sweep(grid, folder, jobs=jobs, threads=1, measure=run_numbers, on_done=on_done)
    rows = done.to_dict("records")
    broken = [row for row in rows if row["state"] != "complete" and not diverged(row)]
    if broken:
        raise StabilityProbeError(
            f"{folder}: {len(broken)} of {len(rows)} runs have not ended, such as "
            f"{broken[0]['run']} ({broken[0]['reason']}); do them again with "
            f"stability-probe sweep {grid_file(name, scale)} --out {folder} --retry"
        )
    cells = zip(rows, grid.cells(), strict=True)
    return Study(name, [_member(folder, row, config) for row, (_, config) in cells])


def _member(folder: Path, row: Mapping[str, Any], config: TrainConfig) -> Member:
    """A run by its row in the sweep's table."""
    failed = diverged(row)
    numbers = {} if failed else {k: v for k, v in row.items() if isinstance(v, float)}
    return Member(config, Run.open(folder / "runs" / row["run"]), failed, numbers)
