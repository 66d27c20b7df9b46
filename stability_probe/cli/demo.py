"""The demo: five scalings of a U-ViT's skips on digits, from training to verdicts and report."""

import shutil
from pathlib import Path

from stability_probe.cli.console import progress
from stability_probe.cli.figures import save_figures
from stability_probe.errors import StabilityProbeError, TrainingDiverged
from stability_probe.report import write_report
from stability_probe.runs import (
    EnsembleConfig,
    RecordConfig,
    Run,
    TrainConfig,
    record_ensemble,
    record_training,
)
from stability_probe.runs.run import write_json
from stability_probe.verify import Verdict, verify

SCHEMES = ("unscaled", "inverse-sqrt2", "cs:0.7", "ls", "uniform:0")
"""What the demo compares; `uniform:0` removes every skip."""
PARTS = ("runs", "ensemble", "figures", "verdicts.json", "report.html")
"""What a demo leaves in its folder."""


def run_demo(out: Path, steps: int, seeds: int, overwrite: bool) -> list[Verdict]:
    """Train, probe, verify and plot; everything is written below `out`.

    Raises:
        StabilityProbeError: if the settings or the folder cannot be used.
    """
    if seeds < 1:
        raise StabilityProbeError(f"demo: seeds must be at least 1, got {seeds}")
    configs = [
        TrainConfig(scheme=scheme, steps=steps, seed=seed)
        for seed in range(seeds)
        for scheme in SCHEMES
    ]
    _make_room(out, overwrite)
    ensemble = EnsembleConfig()
    runs: list[Run] = []
    with progress() as display:
        task = display.add_task("random networks", total=ensemble.networks)
        runs += record_ensemble(ensemble, SCHEMES, out / "ensemble", lambda: display.advance(task))
        task = display.add_task("training", total=steps * len(configs))
        for config in configs:
            display.update(task, description=f"training {config.scheme}")
            path = out / "runs" / f"{config.scheme.replace(':', '-')}-seed{config.seed}"
            probing = RecordConfig(sensitivity_every=max(1, steps // 3))
            try:
                record_training(config, path, probing, lambda _: display.advance(task))
            except TrainingDiverged as problem:  # a finding, not the end of the demo
                display.console.print(f"{path}: {problem}")
            runs.append(Run.open(path))
        display.update(task, description="training")
        task = display.add_task("verdicts, figures, report", total=3)
        verdicts = verify(runs)
        write_json(out / "verdicts.json", [v.as_dict() for v in verdicts])
        display.advance(task)
        save_figures(runs, out / "figures")
        display.advance(task)
        write_report(runs, out / "report.html", verdicts)
        display.advance(task)
    return verdicts


def _make_room(out: Path, overwrite: bool) -> None:
    """Make the folder, and clear an earlier demo out of it if that is wanted."""
    earlier = [out / part for part in PARTS if (out / part).exists()]
    if earlier and not overwrite:
        raise StabilityProbeError(
            f"{out}: holds an earlier demo; choose another folder or pass --overwrite"
        )
    try:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        out.mkdir(parents=True, exist_ok=True)
        (out / "runs").mkdir()
    except OSError as problem:
        raise StabilityProbeError(
            f"{out}: cannot be written ({problem.strerror}); choose another folder"
        ) from problem
