"""`stability-probe train`: from its options to a recorded run, in one sitting or several."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from stability_probe.cli.console import note, progress
from stability_probe.errors import StabilityProbeError
from stability_probe.runs import RecordConfig, Run, TrainConfig, TrainStep, record_training
from stability_probe.runs.processes import from_main, is_main, join, leave
from stability_probe.runs.recording import recorded_settings
from stability_probe.runs.resuming import refuse_contradiction

PROBING = ("every", "sensitivity_every", "save_every", "probe_samples", "paths")
"""Options that are settings of the probe; the others are of the training."""


@dataclass(frozen=True)
class TrainOptions:
    """What a user said of a training.

    Attributes:
        out: the run folder.
        given: settings of the training and of the probe, by name; the others are as they are by
            default, or as they are in the run that is gone on with.
        resume: whether to go on with the run that is in the folder.
        weights: a file for the trained weights.
        track: names of trackers.
    """

    out: Path
    given: Mapping[str, Any]
    resume: bool = False
    weights: Path | None = None
    track: Sequence[str] = ()


def run_train(options: TrainOptions) -> None:
    """Train, or go on training, and print where the run is.

    Raises:
        StabilityProbeError: if the options cannot be used.
        TrainingDiverged: if the loss stops being finite.
    """
    join()
    try:
        config, probing, finished = from_main(lambda: _settings(options))
        with ExitStack() as stack:
            shown = is_main() and not finished
            on_step = _progress(config, stack) if shown else None
            run = record_training(
                config,
                options.out,
                probing,
                on_step,
                options.weights,
                options.resume,
                options.track,
            )
        if is_main():
            _report(run, finished)
            if "tensorboard" in options.track:
                print(f"curves: tensorboard --logdir {shlex.quote(str(run.path / 'tensorboard'))}")
    finally:
        leave()


def _settings(options: TrainOptions) -> tuple[TrainConfig, RecordConfig, bool]:
    """What is to be done, from the options or from the folder, and whether that is done already."""
    if options.resume and (options.out / "run.json").exists():
        run = Run.open(options.out)
        config, probing = recorded_settings(run)
        there = {**config.as_dict(), **probing.as_dict()}
        refuse_contradiction(options.out, there, options.given)
        finished = run.info["state"] == "complete"
        if finished and options.weights is not None:
            raise StabilityProbeError(
                f"{options.out}: is complete, and its weights were not kept; to have them, train "
                "it again with --weights in another folder"
            )
        return config, probing, finished
    if "scheme" not in options.given:
        raise StabilityProbeError(
            f"{options.out}: holds no run to resume; start one with --scheme"
            if options.resume
            else "train: a new run needs --scheme, got none; give one, such as --scheme cs:0.7"
        )
    probe = {name: value for name, value in options.given.items() if name in PROBING}
    training = {name: value for name, value in options.given.items() if name not in PROBING}
    return TrainConfig(**training), RecordConfig(**probe), False


def _progress(config: TrainConfig, stack: ExitStack) -> Callable[[TrainStep], None]:
    """What moves a progress display, which is shown until the stack is closed."""
    display = stack.enter_context(progress())
    task = display.add_task(config.scheme, total=config.steps)
    return lambda step: display.update(task, completed=step.step)


def _report(run: Run, finished: bool) -> None:
    print(f"run: {run.path}")
    if finished:
        print("the run was complete, and nothing was done")
        return
    info = run.info
    if "resumed" in info:
        print(f"resumed after step {info['resumed'][-1]} of {run.config['steps']}")
    if "probe" in info:
        print(f"probe overhead: {info['probe']['overhead']:.1%} of a bare step")
    if info["state"] != "complete":
        reason = info["reason"] or "its run.json could not be written"
        note(f"{run.path}: not complete ({reason}); `train --resume` may complete it")
        raise typer.Exit(1)
