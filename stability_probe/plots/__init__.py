"""Figures of what was recorded beside what the theorems say."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from stability_probe.plots import tables
from stability_probe.plots.checkpoint import (
    plot_blame,
    plot_counterfactual,
    plot_energies,
    plot_hierarchy,
    plot_paths,
)
from stability_probe.plots.figures import (
    plot_coefficients,
    plot_feature_traces,
    plot_gradients,
    plot_law,
    plot_losses,
    plot_oscillation,
    plot_sensitivity,
)
from stability_probe.plots.points import (
    plot_gradient_law,
    plot_gradient_order,
    plot_law_band,
    plot_tradeoff,
)
from stability_probe.verify import Evidence
from stability_probe.verify.oscillation import oscillation_table

__all__ = [
    "all_figures",
    "checkpoint_figures",
    "plot_blame",
    "plot_coefficients",
    "plot_counterfactual",
    "plot_energies",
    "plot_feature_traces",
    "plot_gradient_law",
    "plot_gradient_order",
    "plot_gradients",
    "plot_hierarchy",
    "plot_law",
    "plot_law_band",
    "plot_losses",
    "plot_oscillation",
    "plot_paths",
    "plot_sensitivity",
    "plot_tradeoff",
    "tables",
]


def all_figures(evidence: Sequence[Evidence]) -> dict[str, Figure]:
    """Every figure that the evidence has the records for, by file name.

    Where a scheme was trained with several seeds, figures with one panel a scheme show the first.
    """
    training = [run for run in evidence if run.kind == "training" and run.n_skips]
    ensembles = [run for run in evidence if run.kind == "ensemble" and len(run.input_energies)]
    first: dict[str, Evidence] = {}
    for run in training:
        first.setdefault(tables.scheme_label(run), run)
    probed = [run for run in first.values() if run.samples("sigma_max", "J").size]
    figures: dict[str, Figure] = {}
    if first:
        labels = {run.name: tables.scheme_label(run) for run in training}
        ranges = oscillation_table(training)
        figures["features"] = plot_feature_traces(tables.feature_traces(list(first.values())))
        figures["oscillation"] = plot_oscillation(ranges.assign(scheme=ranges.run.map(labels)))
        figures["coefficients"] = plot_coefficients(tables.coefficients(training))
    gradients = tables.gradient_energies(list(first.values()))
    if len(gradients):
        figures["gradients"] = plot_gradients(gradients)
    if probed:
        figures["sensitivity"] = plot_sensitivity(tables.sensitivities(probed))
    losses = tables.losses(training)
    if len(losses):
        figures["loss"] = plot_losses(losses)
    for run in (run for run in evidence if run.kind == "checkpoint" and len(run.sampled_steps)):
        for name, figure in checkpoint_figures(run).items():
            figures[f"{name}-{run.name}" if name in figures else name] = figure
    if ensembles:
        figures["law"] = plot_law(tables.law(ensembles))
    return figures


def checkpoint_figures(run: Evidence) -> dict[str, Figure]:
    """Every figure of one checkpoint that it has the records for, by file name."""
    figures = {"energies": plot_energies(tables.energies(run))}
    paths, counterfactual = tables.paths(run), tables.counterfactual(run)
    if run.samples("sigma_max", "J").size:
        figures["hierarchy"] = plot_hierarchy(tables.hierarchy(run))
    if len(paths):
        figures["paths"] = plot_paths(paths)
    blame = tables.blame(run)
    if len(blame):
        figures["blame"] = plot_blame(blame)
    if len(counterfactual):
        figures["counterfactual"] = plot_counterfactual(counterfactual)
    gradients = tables.gradient_energies(tables.by_noise_level(run))
    if len(gradients):
        figures["gradients"] = plot_gradients(gradients, "by noise level")
    return figures
