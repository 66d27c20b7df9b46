"""What a run has in its folder, so that nothing else is written over it."""

from pathlib import Path

from stability_probe.errors import StabilityProbeError
from stability_probe.runs.cells import ATTEMPTS, LOCK, OUTCOME, WEIGHTS
from stability_probe.runs.run import STATE_FILE

VERDICTS = "verdicts.json"
OWN = ("run.json", VERDICTS, STATE_FILE, WEIGHTS, OUTCOME, ATTEMPTS, LOCK)
"""Files in a run's folder."""
FOLDERS = ("records", "figures", "tensorboard", "wandb")
"""Folders in it; all that is in them is the run's."""


def refuse_run_file(file: Path, what: str, may_be: str = "") -> None:
    """Check that a file to write is none of a run's own; it may lie beside them.

    Args:
        file: the file.
        what: what is to be written: `the report`.
        may_be: the name of one of a run's files that it may replace.

    Raises:
        StabilityProbeError: if it is.
    """
    where = file.resolve()
    run = next((folder for folder in where.parents if (folder / "run.json").exists()), None)
    inside = where.relative_to(run).parts if run else ()
    own = inside[:1] in {(name,) for name in FOLDERS} or inside in {(name,) for name in OWN}
    if file.name == "run.json" or (own and inside != (may_be,)):
        raise StabilityProbeError(
            f"{file}: {what} would be among a run's own files; choose another name or folder"
        )
