"""The project's own training against a baseline that is committed with it.

To renew it: `stability-probe check RUNS --baseline tests/regression/own-baseline.json --update`,
with runs of the options below.
"""

from pathlib import Path

import pytest

BASELINE = Path(__file__).parent / "own-baseline.json"
OPTIONS = (
    "--scheme", "cs:0.7", "--steps", 24, "--n-skips", 2, "--width", 16, "--batch-size", 16,
    "--sensitivity-every", 24,
)  # fmt: skip


def trained(cli, folder, *options, seeds=range(3)):
    for seed in seeds:
        out = folder / str(seed)
        result = cli("train", "--out", out, "--seed", seed, *OPTIONS, *options)
        assert result.code == 0, result.err
    return folder


def test_training_is_as_stable_as_it_was(cli, tmp_path):
    result = cli("check", trained(cli, tmp_path), "--baseline", BASELINE)
    assert result.code == 0, result.out


@pytest.mark.slow
def test_and_it_would_be_noticed_if_it_were_not(cli, tmp_path):
    folder = trained(cli, tmp_path, "--learning-rate", 0.01)
    result = cli("check", folder, "--baseline", BASELINE, "--anyway")
    assert result.code == 1
    assert "worse" in result.out
    assert "config.learning_rate is 0.001 and 0.01, there and here" in result.err


@pytest.mark.slow
def test_with_other_seeds(cli, tmp_path):
    folder = trained(cli, tmp_path, seeds=range(20, 25))
    assert cli("check", folder, "--baseline", BASELINE).code == 0
