import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from stability_probe.plots import all_figures
from stability_probe.verify import Evidence
from tests.oracles.evidence import (
    bare,
    checkpoint,
    complete,
    ensemble,
    relabelled,
    trace,
    training,
    without,
)

OF_A_RUN = {"features", "oscillation", "coefficients", "loss"}
SCHEDULED = {"gradients", "sensitivity"}
OF_A_CHECKPOINT = {"energies", "hierarchy", "paths", "counterfactual"}
NORMS = ("sigma_max", "sigma_max_upper", "secant", "lipschitz")


@pytest.mark.parametrize(
    ("evidence", "names"),
    [
        (lambda: [], set()),
        (lambda: [training()], set()),
        (lambda: [trace()], OF_A_RUN),
        (lambda: [without(trace(), "loss")], OF_A_RUN - {"loss"}),
        (lambda: [complete()], OF_A_RUN | SCHEDULED),
        (lambda: [bare(complete())], OF_A_RUN | SCHEDULED),
        (lambda: [without(complete(), "sample_grad_energy")], OF_A_RUN | {"sensitivity"}),
        (lambda: [ensemble()], {"law"}),
        (lambda: [checkpoint()], OF_A_CHECKPOINT),
        (lambda: [without(checkpoint(), "path", *NORMS)], {"energies", "counterfactual"}),
        (lambda: [checkpoint(), complete()], OF_A_CHECKPOINT | OF_A_RUN | SCHEDULED),
        (lambda: [ensemble(), complete(), trace(scheme="ls")], OF_A_RUN | SCHEDULED | {"law"}),
    ],
)
def test_what_has_no_records_is_left_out(evidence, names):
    found = all_figures(evidence())
    assert set(found) == names
    assert all(type(figure) is Figure for figure in found.values())
    assert plt.get_fignums() == []


def test_panels_are_for_schemes_and_points_for_runs():
    runs = [relabelled(complete(seed=seed), seed=seed) for seed in (0, 1)]
    named = [Evidence(f"cs:0.7 seed {i}", run.frame, run.info) for i, run in enumerate(runs)]
    found = all_figures([*named, complete("unscaled", (1.0,) * 3)])
    titles = [ax.get_title() for ax in found["sensitivity"].axes]
    assert titles == ["CS (κ = 0.7)", "unscaled"]
    ax = found["oscillation"].axes[0]
    assert sum(len(points.get_offsets()) for points in ax.collections) == 3


def test_norms_that_were_not_taken():
    assert "sensitivity" not in all_figures([without(complete(), *NORMS)])


def test_an_ensemble_with_nothing_recorded_yet():
    evidence = ensemble()
    assert all_figures([Evidence("e", evidence.frame.iloc[:0], evidence.info)]) == {}


def test_two_checkpoints_have_figures_of_their_own():
    named = [Evidence(name, checkpoint().frame, checkpoint().info) for name in ("a", "b")]
    assert set(all_figures(named)) == OF_A_CHECKPOINT | {f"{n}-b" for n in OF_A_CHECKPOINT}
