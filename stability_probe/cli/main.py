"""The command line as a program: its errors and its exit codes.

0 done, 1 a training run or a check failed, 2 bad input (one line says which), 130 interrupted.
"""

import sys
import warnings
from typing import Any

import typer

from stability_probe.cli.app import app
from stability_probe.errors import StabilityProbeError, TrainingDiverged

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

# Newer versions of typer carry a copy of click and older ones import it: take the one in use.
UsageProblem: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def error(message: str) -> None:
    """Print one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _warn(message: Warning | str, *about: Any, **more: Any) -> None:
    """Print a warning as one line on stderr."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def main() -> None:
    """Run the command line; every error that a user can cause becomes one line and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        for category in (DeprecationWarning, FutureWarning):  # the libraries' own affairs
            warnings.simplefilter("ignore", category)
        code = _run()
    sys.exit(code)


def _command(problem: Any) -> str:
    """The command that a problem is with."""
    context = getattr(problem, "ctx", None)
    if context is None or context.parent is None:
        return "stability-probe"
    return f"stability-probe {context.info_name}"


def _run() -> Any:
    """Run the command line; the exit code."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer has caught the interrupt itself
            raise KeyboardInterrupt
    except UsageProblem as problem:
        error(f"{problem.format_message()} See `{_command(problem)} --help`.")
        return 2
    except StabilityProbeError as problem:
        error(str(problem))
        return 2
    except TrainingDiverged as problem:
        error(f"{problem}; what was recorded until then is kept")
        return 1
    except (typer.Abort, KeyboardInterrupt):
        error("interrupted; what was recorded is kept")
        return INTERRUPTED
    return code
