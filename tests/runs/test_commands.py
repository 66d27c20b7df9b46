"""Commands that make runs again do."""

import shlex
from dataclasses import asdict, replace

import pytest

from stability_probe import Run
from stability_probe.probes import ProbeConfig
from stability_probe.runs import EnsembleConfig, RecordConfig, TrainConfig, record_ensemble
from stability_probe.runs.commands import command_of, ensemble_command, train_command

TINY = TrainConfig(scheme="cs:0.7", steps=2, n_skips=2, width=16, batch_size=4)


def about(config=TINY, probing=None, **info):
    """What `run.json` says of a training."""
    probing = probing or RecordConfig()
    known = {"kind": "training", "seed": config.seed, "scheme": config.scheme}
    return {**known, "config": config.as_dict(), "probing": probing.as_dict(), **info}


def test_a_training_is_made_again_by_its_command(cli, tmp_path):
    options = ("--steps", 2, "--n-skips", 2, "--width", 16, "--batch-size", 4, "--seed", 3,
               "--learning-rate", 0.002, "--sensitivity-every", 0, "--every", 2)  # fmt: skip
    assert cli("train", "--scheme", "unscaled", "--out", tmp_path / "a b", *options).code == 0
    run = Run.open(tmp_path / "a b")
    program, *words = shlex.split(command_of(run.info, str(tmp_path / "it's new")))
    assert program == "stability-probe" and words[0] == "train"
    assert cli(*words).code == 0
    again = Run.open(tmp_path / "it's new")
    assert again.info["config"] == run.info["config"]
    assert again.info["probing"] == run.info["probing"]
    assert again.records().equals(run.records())


def test_only_what_differs_is_said():
    assert train_command(about(TrainConfig()), "0", "new") == (
        "stability-probe train --scheme unscaled --seed 0 --out new"
    )
    probing = RecordConfig(sensitivity_every=30, probe_samples=5, paths=True, save_every=7)
    assert train_command(about(TrainConfig(), probing), "0", "new") == (
        "stability-probe train --scheme unscaled --sensitivity-every 30 --probe-samples 5 --paths "
        "--seed 0 --out new"
    )


@pytest.mark.parametrize("config", [
    replace(TINY, warmup=5), replace(TINY, weight_decay=0.1), replace(TINY, noise_levels=500),
])  # fmt: skip
def test_what_train_has_no_option_for_is_not_known(config):
    assert train_command(about(TINY), "0", "new") is not None
    assert train_command(about(config), "0", "new") is None


@pytest.mark.parametrize(
    "probing", [RecordConfig(sensitive_samples=5), RecordConfig(probe=ProbeConfig())]
)
def test_nor_is_another_probe(probing):
    assert train_command(about(TINY, probing), "0", "new") is None


@pytest.mark.parametrize("info", [
    {}, {"config": {"width": 8}}, {"kind": "training"}, {"kind": "training", "config": None},
    {"kind": "checkpoint", "config": {"checkpoint": "x"}}, {"kind": "ensemble", "config": {}},
    {"kind": "something else"}, {"config": TINY.as_dict()},
])  # fmt: skip
def test_what_somebody_else_recorded_is_not_known(info):
    assert command_of(info, "new") is None


def test_random_networks_are_made_again_by_their_line(tmp_path):
    config = EnsembleConfig(networks=2, m=8, n_skips=1, samples=2, gradients=False)
    (run,) = record_ensemble(config, ["cs:0.7"], tmp_path / "a")
    program, option, code = shlex.split(ensemble_command(run.info, str(tmp_path / 'the "new"')))
    assert (program, option) == ("python", "-c")
    exec(code, {})
    again = Run.open(tmp_path / 'the "new"' / "cs-0.7")
    assert again.info["config"] == asdict(config)
    assert again.records().equals(run.records())
