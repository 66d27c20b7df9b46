"""`stability-probe report`: run folders in, one HTML file out."""

from collections.abc import Sequence
from pathlib import Path

from stability_probe.cli.console import progress
from stability_probe.report import write_report
from stability_probe.runs import open_runs
from stability_probe.runs.own_files import refuse_run_file


def run_report(paths: Sequence[Path], out: Path) -> None:
    """Write the report of runs.

    Args:
        paths: run folders, or folders with runs in them.
        out: the file to write; an earlier report is replaced.

    Raises:
        StabilityProbeError: if a run cannot be read, or the file cannot be written or is a run's.
    """
    runs = open_runs(paths)
    refuse_run_file(out, "the report")
    with progress() as display:
        task = display.add_task("verdicts and figures", total=1)
        write_report(runs, out)
        display.advance(task)
