"""`suggest` on the command line: a checkpoint, a budget, and a proof by measuring."""

import json

import pytest
import torch

from stability_probe import TheoryUNet, find_skips, scale_skips
from stability_probe.cli import main
from stability_probe.cli.suggest import parse_budget
from stability_probe.probes import ProbeBatch, SensitivityConfig, SensitivityProbe
from stability_probe.skips import parse_scaling

MODEL = (
    "--model", "stability_probe.models:TheoryUNet",
    "--model-args", '{"m": 64, "n_skips": 3, "unit_gain": true}',
    "--input", "1,8,8", "--noise-levels", "500",
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random network of Eq. 4 with three skips, and its file."""
    net = TheoryUNet(64, 3, unit_gain=True)
    file = tmp_path_factory.mktemp("weights") / "net.pt"
    torch.save(net.state_dict(), file)
    return net, file


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["stability-probe", "suggest", *map(str, arguments), *MODEL])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_what_it_suggests_meets_the_budget_when_measured_again(monkeypatch, capsys, weights):
    net, file = weights
    code, out, _ = run(
        monkeypatch, capsys, file, "--budget", "85%", "--batch", 4, "--json"
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["best"]["met"]
    limit = found["budget"]
    assert limit == pytest.approx(0.85 * found["before"]["sigma_max"])
    assert found["best"]["measured"]["sigma_max"] <= limit
    assert len(found["levels"]) == 3
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(7))  # others than it saw
    batch = ProbeBatch((x, torch.full((64,), 500)))
    skips = find_skips(net, *batch.head(1).args)
    means = []
    for scheme in ("unscaled", found["scheme"]):
        with scale_skips(net, skips, parse_scaling(scheme)):
            probe = SensitivityProbe(net, skips, {}, batch, SensitivityConfig(epsilons=(1e-3,)))
            norms = probe.jacobian_norms(batch, torch.Generator().manual_seed(1))
        values = {key.metric: value for key, value in norms.items() if key.site == "J"}
        means.append(values["sigma_max"].mean().item())
    assert means[1] < 0.95 * means[0]


def test_the_table_and_how_to_use_it(monkeypatch, capsys, weights):
    _, file = weights
    code, out, _ = run(
        monkeypatch, capsys, file, "--budget", "85%", "--batch", 2
    )  # fmt: skip
    assert code == 0
    for text in ("κ suggested", "κ of CS", "σmax(J)", "budget met", "--scheme kappa:"):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "much"), "--budget 'much': must be a positive number such as 1.2"),
        (("--budget", "-1%"), "--budget '-1%': must be a positive number"),
        (("--budget", "120%"), "--budget '120%': must be a positive number such as 1.2, or a perc"),
        (("--budget", "1", "--of", "loss"), "--of 'loss': must be one of sensitivity"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, weights, arguments, message):
    code, out, err = run(monkeypatch, capsys, weights[1], *arguments, "--batch", 2)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_budget_that_no_kappa_meets(monkeypatch, capsys, weights):
    code, out, _ = run(monkeypatch, capsys, weights[1], "--budget", "1e-9", "--batch", 2)
    assert code == 1
    assert "no κ was found that meets the budget of 1e-09" in out
    assert "with every skip turned off" in out
    assert "to use it" not in out
    level, *_, cs = out.splitlines()[1].split()
    assert (level, cs) == ("1", "–")


def test_a_budget_that_is_met_as_found(monkeypatch, capsys, weights):
    code, out, _ = run(monkeypatch, capsys, weights[1], "--budget", "1e9", "--batch", 2)
    assert code == 0
    assert "the budget is met as found" in out
    assert "to use it" not in out


def test_a_network_that_cannot_be_measured_is_one_line(monkeypatch, capsys, weights):
    def broken(*args, **kwargs):
        raise RuntimeError("no derivative")

    monkeypatch.setattr("stability_probe.cli.suggest.suggest_kappa", broken)
    code, _, err = run(monkeypatch, capsys, weights[1], "--budget", "1", "--batch", 2)
    assert code == 2
    assert "error: TheoryUNet cannot be measured (RuntimeError: no derivative)" in err


def test_json_says_what_was_assumed(monkeypatch, capsys, weights):
    _, out, err = run(
        monkeypatch, capsys, weights[1], "--budget", "100%", "--batch", 2, "--json"
    )  # fmt: skip
    notes = json.loads(out)["notes"]
    assert any("Gaussian noise (2, 1, 8, 8)" in line for line in notes)
    assert all(f"note: {line}" in err for line in notes)


def test_a_budget_of_feature_energy(monkeypatch, capsys, weights):
    code, out, _ = run(
        monkeypatch, capsys, weights[1], "--budget", "90%", "--of", "energy", "--batch", 4, "--json"
    )  # fmt: skip
    found = json.loads(out)
    assert found["before"].keys() == {"energy"}
    assert code == 0
    assert found["best"]["met"]
    assert found["best"]["measured"]["energy"] <= found["budget"] < found["before"]["energy"]
    assert max(level["suggested"] for level in found["levels"]) <= 1


def test_budgets():
    assert parse_budget("1.5").resolve(10.0) == 1.5
    assert parse_budget(" 50% ").resolve(10.0) == 5
