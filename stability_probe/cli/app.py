"""The commands: parse, call, print. Everything else is in the package's other folders.

Heavy imports are inside the commands, so that `--help` is quick.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stability_probe.cli import options
from stability_probe.errors import StabilityProbeError

app = typer.Typer(
    help="See, prove and fix the training stability of networks with long skip connections.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Steps = Annotated[int, typer.Option(help="Optimizer steps of each training run.")]
Runs = Annotated[list[Path], typer.Argument(help="Run folders, or folders with runs in them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _setting(default: str, text: str) -> Any:
    """An option for a setting that has its default elsewhere, to tell whether it was given."""
    return typer.Option(help=f"{text}  [default: {default}]", show_default=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs, figures and verdicts.")],
    steps: Steps = 300,
    seeds: Annotated[int, typer.Option(help="Seeds each scheme is trained with.")] = 1,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo in the folder.")] = False,
) -> None:
    """Train a U-ViT on digits under five scalings of its skips, verify the theorems, plot."""
    from stability_probe.cli.console import print_costs, print_verdicts
    from stability_probe.cli.demo import run_demo
    from stability_probe.runs import open_runs

    print_verdicts(run_demo(out, steps, seeds, overwrite))
    print_costs(open_runs([out / "runs"]))
    print(f"\nfigures: {out / 'figures'}\nverdicts: {out / 'verdicts.json'}\nruns: {out / 'runs'}")
    print(f"report: {out / 'report.html'}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Scaling: unscaled, inverse-sqrt2, uniform:C, cs:KAPPA, kappa:C,C,C, ls, "
            "ls-non-shared, freeu or sc-tuner. Needed unless a run is resumed."
        ),
    ] = None,
    steps: Annotated[int | None, _setting("300", "Optimizer steps.")] = None,
    seed: Annotated[int | None, _setting("0", "Seed of weights, data and noise.")] = None,
    data: Annotated[
        str | None, _setting("digits", "digits, faces, photos, photos-32, mnist or uniform.")
    ] = None,
    model: Annotated[str | None, _setting("uvit", "uvit, unet2d or theory-unet.")] = None,
    n_skips: Annotated[int | None, _setting("6", "Number N of long skips.")] = None,
    width: Annotated[int | None, _setting("64", "Token width or base channels.")] = None,
    batch_size: Annotated[
        int | None, _setting("64", "Samples a step, over all processes together.")
    ] = None,
    learning_rate: Annotated[
        float | None, _setting("0.001", "Of AdamW, after the warm-up.")
    ] = None,
    patch_size: Annotated[
        int | None, _setting("2 up to 16 pixels a side, 4 above", "Side of a U-ViT's patch.")
    ] = None,
    precision: Annotated[
        str | None, _setting("fp32", "Of the forward pass: fp32, or bf16 under autocast.")
    ] = None,
    every: Annotated[int | None, _setting("1", "Record each n-th step.")] = None,
    sensitivity_every: Annotated[
        int | None, _setting("100", "Steps between sensitivity measurements; 0 for none.")
    ] = None,
    probe_samples: Annotated[
        int | None, _setting("96", "Samples that energies and gradients are measured on then.")
    ] = None,
    paths: Annotated[
        bool | None,
        typer.Option("--paths", help="Measure the path through every skip with the sensitivity."),
    ] = None,
    save_every: Annotated[
        int | None,
        _setting("50", "Steps between savings of what --resume goes on from; 0 for none."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File for the trained weights, as `probe` reads them.")
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TRACKER",
            help="Draw curves while it trains, into the run folder: tensorboard or wandb. May be "
            "repeated.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in the folder, with its settings; start it if there is none.",
        ),
    ] = False,
) -> None:
    """Train one network with a probe attached."""
    from stability_probe.cli.train import TrainOptions, run_train

    settings = {
        "scheme": scheme, "steps": steps, "seed": seed, "data": data, "model": model,
        "n_skips": n_skips, "width": width, "batch_size": batch_size,
        "learning_rate": learning_rate, "patch_size": patch_size, "precision": precision,
        "every": every, "sensitivity_every": sensitivity_every, "save_every": save_every,
        "probe_samples": probe_samples, "paths": paths,
    }  # fmt: skip
    given = {name: value for name, value in settings.items() if value is not None}
    run_train(TrainOptions(out, given, resume, weights, track or ()))


@app.command()
def sweep(
    grid: Annotated[
        Path, typer.Argument(help="YAML file with the grid: base, grid, probing, weights.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the sweep; all machines have to see it.")],
    backend: Annotated[
        str, typer.Option(help="Who does the runs: local processes, ray or dask.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Of a cluster; else RAY_ADDRESS (Ray only), else one is started here."),
    ] = None,
    jobs: Annotated[int | None, _setting("as many as have room", "Runs at once.")] = None,
    threads: Annotated[
        int | None,
        _setting("an equal share of the cores; 1 on a cluster", "Threads of each run."),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Also do the runs again that have failed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and how they stand; do nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train every run of a grid, over many processes or machines; the same again goes on.

    Runs that are complete are skipped, those that have failed are listed. Exit code 1 if any has.
    """
    from stability_probe.cli.sweep import SweepOptions, as_dict, print_sweep, run_sweep

    asked = SweepOptions(grid, out, backend, address, jobs, threads, retry, dry_run)
    table = run_sweep(asked)
    if as_json:
        print(json.dumps(as_dict(table, out), indent=2, ensure_ascii=False))
    else:
        print_sweep(table, out, every=dry_run)
    if (table.state == "failed").any() and not dry_run:
        raise typer.Exit(1)


@app.command()
def verify(
    runs: Runs,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for the verdicts as JSON.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 1 if a claim is VIOLATED.")] = False,
) -> None:
    """Hold recorded runs against Theorems 3.1, 3.3, 3.4 and Lemma 3.2.

    With one folder given, its verdicts.json is written as well.
    """
    from stability_probe.cli.console import print_costs, print_verdicts
    from stability_probe.runs import open_runs
    from stability_probe.runs.own_files import VERDICTS, refuse_run_file
    from stability_probe.runs.run import finite, write_json
    from stability_probe.verify import verify as verify_runs

    opened = open_runs(runs)
    verdicts = verify_runs(opened)
    rows = [v.as_dict() for v in verdicts]
    file = out or (runs[0] / VERDICTS if len(runs) == 1 else None)
    if file is not None:
        refuse_run_file(file, "verdicts", may_be=VERDICTS)
        write_json(file, rows)
    if as_json:
        print(json.dumps(finite(rows), indent=2, ensure_ascii=False))
    else:
        print_verdicts(verdicts)
        print_costs(opened)
    if strict and any(v.status == "VIOLATED" for v in verdicts):
        raise typer.Exit(1)


@app.command()
def plot(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the figures; with one run, its own."),
    ] = None,
) -> None:
    """Draw every figure that the recorded runs have the records for."""
    from stability_probe.cli.figures import save_figures
    from stability_probe.runs import open_runs

    if out is None and len(runs) > 1:
        raise StabilityProbeError("plot: several folders were given; say where to draw with --out")
    for file in save_figures(open_runs(runs), out or runs[0] / "figures"):
        print(file)


@app.command()
def report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one HTML file of verdicts, figures, runs side by side and how to make them again.

    It needs nothing else: it can be sent to others and opened without a network.
    """
    from stability_probe.cli.report import run_report

    run_report(runs, out)
    print(f"report: {out}")


@app.command()
def baseline(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    as_json: AsJson = False,
) -> None:
    """Keep what runs are like over their seeds, for later checks."""
    from stability_probe.cli.check import ENOUGH_SEEDS, run_baseline
    from stability_probe.cli.console import note

    written = run_baseline(runs, out)
    if as_json:
        print(out.read_text(), end="")
        return
    for group in written.groups:
        n = len(group.seeds)
        print(f"{group.name}: {n} seed{'s' * (n > 1)}, {len(group.tested)} numbers")
        if len(group.seeds) < ENOUGH_SEEDS:
            note(f"{group.name}: with {ENOUGH_SEEDS} seeds, smaller changes would be seen")
    print(f"baseline: {out}")


@app.command()
def check(
    runs: Runs,
    baseline: Annotated[
        Path | None, typer.Option(help="File of the baseline to compare with.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME<VALUE",
            help='A threshold, such as "sensitivity.exact<20" or "theorem_3_1=HOLDS". May be '
            "repeated.",
        ),
    ] = None,
    margin: Annotated[float, typer.Option(help="Relative rise that is no regression.")] = 0.1,
    alpha: Annotated[float, typer.Option(help="Rate of false alarms over all numbers.")] = 0.05,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare though the configurations differ.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Print the difference, and put the runs in the baseline."),
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="File for JUnit's XML.")] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="File for Markdown; $GITHUB_STEP_SUMMARY is added to where it is set."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every number.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs with a baseline, as samples over seeds; exit with 1 if any got worse."""
    from stability_probe.cli.check import CheckOptions, print_check, run_check
    from stability_probe.runs.run import finite

    asked = CheckOptions(
        runs, baseline, require or [], margin, alpha, anyway, update, junit, markdown
    )
    found = run_check(asked)
    if as_json:
        print(json.dumps(finite(found.as_dict()), indent=2, ensure_ascii=False))
    else:
        print_check(found, every, baseline if update else None)
    if not (all(r.met for r in found.requirements) if update else found.passed):
        raise typer.Exit(1)


@app.command()
def skips(
    checkpoint: options.Checkpoint,
    model: options.Model = None,
    model_args: options.ModelArgs = "{}",
    weights: options.Weights = "model",
    trust_pickle: options.TrustPickle = False,
    partial: options.Partial = False,
    chosen: options.Skips = None,
    input: options.Input = None,
    kwargs: options.Arguments = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Find the long skip connections of a network."""
    from stability_probe.cli.console import note, print_skips
    from stability_probe.cli.subject import open_subject

    what = options.SubjectOptions(
        checkpoint, model, model_args, weights, trust_pickle, partial, chosen or [], input,
        kwargs, device=device, dtype=dtype, seed=seed,
    )  # fmt: skip
    subject = open_subject(what)
    if as_json:
        print(json.dumps([s.as_dict() for s in subject.skips], indent=2))
    else:
        note(subject.checkpoint.description)
        print_skips(subject.skips)


@app.command()
def probe(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to make.")],
    model: options.Model = None,
    model_args: options.ModelArgs = "{}",
    weights: options.Weights = "model",
    trust_pickle: options.TrustPickle = False,
    partial: options.Partial = False,
    chosen: options.Skips = None,
    input: options.Input = None,
    kwargs: options.Arguments = None,
    noise_levels: options.NoiseLevels = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What the network predicts: epsilon, sample or v_prediction. Gradients are "
            "measured only if it is given."
        ),
    ] = None,
    scheme: options.Scheme = None,
    batch: options.Batch = 96,
    sensitive: options.Sensitive = 4,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Measure a trained network: features, sensitivity, gradients; hold them against theorems."""
    from stability_probe.cli.console import (
        print_global_bound,
        print_sensitivity,
        print_skips,
        print_verdicts,
    )
    from stability_probe.cli.points import PointOptions
    from stability_probe.cli.probe import run_probe

    what = options.SubjectOptions(
        checkpoint, model, model_args, weights, trust_pickle, partial, chosen or [], input,
        kwargs, batch, device, dtype, seed,
    )  # fmt: skip
    found = run_probe(what, PointOptions(noise_levels, target, scheme, sensitive), out)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return
    print_skips(found.subject.skips)
    print_sensitivity(found.sensitivity, found.run.info["noise_levels"])
    print_global_bound(found.global_bound, found.run.info["global_constants"].get("refused"))
    print_verdicts(found.verdicts)
    print(f"run: {found.run.path}")
    for file in found.figures:
        print(f"figure: {file}")


@app.command()
def suggest(
    checkpoint: options.Checkpoint,
    budget: Annotated[
        str,
        typer.Option(
            metavar="B|P%",
            help="What is not to be exceeded at any sample and noise level: a number, or a "
            "percentage of the largest value measured now.",
        ),
    ],
    of: Annotated[
        str,
        typer.Option(
            help="Of what: sensitivity (σ_max(J)), pathwise (its bound Σκ‖P‖ + ‖P_mid‖) or energy "
            "(mean ‖h_0‖²/‖x‖²)."
        ),
    ] = "sensitivity",
    model: options.Model = None,
    model_args: options.ModelArgs = "{}",
    weights: options.Weights = "model",
    trust_pickle: options.TrustPickle = False,
    partial: options.Partial = False,
    chosen: options.Skips = None,
    input: options.Input = None,
    kwargs: options.Arguments = None,
    noise_levels: options.NoiseLevels = None,
    scheme: options.Scheme = None,
    batch: options.Batch = 16,
    sensitive: options.Sensitive = 4,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Find the κ that meet a budget at the least change, prove it by measuring, and compare CS.

    Exit code 1 if no κ was found that meets it.
    """
    from stability_probe.cli.points import PointOptions
    from stability_probe.cli.suggest import print_suggestion, run_suggest

    what = options.SubjectOptions(
        checkpoint, model, model_args, weights, trust_pickle, partial, chosen or [], input,
        kwargs, batch, device, dtype, seed,
    )  # fmt: skip
    how = PointOptions(noise_levels, scheme=scheme, sensitive=sensitive)
    result = run_suggest(what, how, budget, of)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False))
    else:
        print_suggestion(result)
    if not result.found.best.met:
        raise typer.Exit(1)
