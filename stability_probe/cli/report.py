"""`stability-probe report`: run folders in, one HTML file out."""

from collections.abc import Sequence
from pathlib import Path

from stability_probe.cli.console import progress
from stability_probe.errors import StabilityProbeError
from stability_probe.report import write_report
from stability_probe.runs import Run, open_runs
from stability_probe.runs.run import STATE_FILE

OWN = ("run.json", "verdicts.json", STATE_FILE)
"""Files that a run has in its folder."""


def run_report(paths: Sequence[Path], out: Path) -> None:
    """Write the report of runs.

    Args:
        paths: run folders, or folders with runs in them.
        out: the file to write; an earlier report is replaced.

    Raises:
        StabilityProbeError: if a run cannot be read, or the file cannot be written or is a run's.
    """
    runs = open_runs(paths)
    refuse_run_file(out, runs)
    with progress() as display:
        task = display.add_task("verdicts and figures", total=1)
        write_report(runs, out)
        display.advance(task)


def refuse_run_file(out: Path, runs: Sequence[Run]) -> None:
    """Check that a file is none of a run's own.

    Raises:
        StabilityProbeError: if it is.
    """
    folders = {run.path.resolve() / part for run in runs for part in ("records", "figures")}
    if out.name in OWN or out.resolve().parent in folders:
        raise StabilityProbeError(
            f"{out}: the report would be among a run's own files; choose another, as in "
            "-o report.html"
        )
