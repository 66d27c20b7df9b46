"""Put the paper's claims to the test.

    python -m experiments [CLAIM ...] [--scale cpu|gpu] [--out DIR] [--jobs N]

Trains what a claim's grids say and DIR does not hold yet, examines the claim, and writes its table,
figure, verdict and page into its folder; at scale gpu into a folder `gpu` below it.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments import claims_table
from experiments.examination import write
from experiments.studies import SCALES, Study, conduct, grid_file
from stability_probe.cli.sweep import sweep_progress
from stability_probe.errors import StabilityProbeError
from stability_probe.regression import run_numbers
from stability_probe.runs import Grid, survey

HERE = Path(__file__).parent
OUT = Path("experiments-out")


def claims() -> list[str]:
    """The claims' folders, in the order of the paper's list."""
    order = yaml.safe_load((HERE / "claims.yaml").read_text(encoding="utf-8"))
    return list(order)


def configuration(claim: str) -> dict[str, Any]:
    """What a claim says, and the grids it rests on."""
    text = (HERE / claim / "config.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


@cache
def study_of(name: str, scale: str, out: Path, jobs: int | None) -> Study:
    """The runs of a grid; what is missing is trained."""
    before = survey(Grid.from_yaml(grid_file(name, scale)), out / scale / name, run_numbers)
    with sweep_progress(before, retry=False, what=name) as on_done:
        return conduct(name, scale, out, jobs, on_done)


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine claims, and print their verdicts."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(claims())}")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="sizes of networks and data")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the claims' folders")
    parser.add_argument("--jobs", type=int, help="runs at once; as many as there are cores")
    options = parser.parse_args(arguments)
    unknown = [claim for claim in options.claims if claim not in claims()]
    if unknown:
        parser.error(f"unknown claim {unknown[0]!r}; choose from {', '.join(claims())}")
    try:
        for claim in options.claims or claims():
            config = configuration(claim)
            studies = [
                study_of(name, options.scale, options.out, options.jobs)
                for name in config["grids"][options.scale]
            ]
            found = importlib.import_module(f"experiments.{claim}.claim").examine(studies)
            below = "" if options.scale == "cpu" else options.scale
            command = f"python -m experiments {claim}" + (f" --scale {below}" if below else "")
            print(f"{claim}: {write(found, options.into / claim / below, config, command)}")
    except StabilityProbeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.into == HERE:
        claims_table.update(HERE.parent / "README.md", HERE, claims())
    return 0


if __name__ == "__main__":
    sys.exit(main())
