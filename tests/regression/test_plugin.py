"""The pytest plugin, as a project that uses it sees it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stability_probe import TheoryUNet
from stability_probe.errors import StabilityProbeError
from stability_probe.regression.plugin import StabilityCheck

ROOT = Path(__file__).parents[2]
TEST = """
import pytest, torch
from stability_probe import TheoryUNet

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
SCALE = {scale}


class Net(TheoryUNet):
    def __init__(self, m, n_skips, **more):
        seed = torch.randint(2**31, ()).item()
        super().__init__(m, n_skips, generator=torch.Generator().manual_seed(seed), **more)

    def forward(self, x):
        return SCALE * super().forward(x)


@pytest.mark.parametrize("skips", [2, 3])
def test_training_is_stable(stability_check, skips):
    stability_check(lambda: Net(8, skips, unit_gain=True), X, train_steps=4, seeds=3,
                    sensitivity=False)


def test_two_of_them(stability_check):
    for name in ("first", "second"):
        stability_check(lambda: Net(8, 2), X, train_steps=2, seeds=2, sensitivity=False, name=name)
"""


@pytest.fixture
def project(tmp_path):
    """A project with a test; returns what runs its tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*options, scale=1.0, test=TEST):
        (tmp_path / "tests" / "test_net.py").write_text(test.replace("{scale}", str(scale)))
        plugin = ["-p", "stability_probe.regression.plugin"]
        command = [sys.executable, "-m", "pytest", "-p", "no:stability_probe", *plugin]
        return subprocess.run(
            [*command, "-p", "no:cacheprovider", "-q", "--tb=short", *options],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.mark.slow
def test_from_a_baseline_to_a_regression(project, tmp_path):
    folder = tmp_path / "tests" / "stability_baselines"
    written = project("--stability-update", "-n", "2")
    assert written.returncode == 0, written.stdout
    assert "3 passed" in written.stdout
    assert sorted(file.name for file in folder.iterdir()) == [
        "test_net-test_training_is_stable-2.json",
        "test_net-test_training_is_stable-3.json",
        "test_net-test_two_of_them-first.json",
        "test_net-test_two_of_them-second.json",
    ]
    kept = {file: file.read_bytes() for file in folder.iterdir()}

    worse = project("-k", "is_stable", scale=30.0)
    assert worse.returncode == 1
    assert "training has become less stable than in" in worse.stdout
    assert "| `loss` |" in worse.stdout and "Likely cause:" in worse.stdout
    assert {file: file.read_bytes() for file in folder.iterdir()} == kept


def net():
    generator = torch.Generator().manual_seed(torch.randint(2**31, ()).item())
    return TheoryUNet(8, 2, generator=generator)


QUICK = {"train_steps": 2, "seeds": 2, "sensitivity": False}
X = torch.ones(4, 8)


def test_without_a_baseline_it_fails_and_says_what_to_do(tmp_path):
    check = StabilityCheck(tmp_path / "test_net.py", "test_a[b]")
    file = tmp_path / "stability_baselines" / "test_net-test_a-b.json"
    with pytest.raises(pytest.fail.Exception, match=f"no baseline at {file}; .*--stability-update"):
        check(net, X, **QUICK)
    assert not file.exists()


def test_one_name_twice_is_refused(tmp_path):
    check = StabilityCheck(tmp_path / "test_net.py", "test_a", update=True)
    check(net, X, **QUICK)
    with pytest.raises(pytest.fail.Exception, match="called twice with name=''; give each its own"):
        check(net, X, **QUICK)
    check(net, X, **QUICK, name="other")


def test_a_broken_baseline_is_one_line(tmp_path):
    StabilityCheck(tmp_path / "test_net.py", "test_a", update=True)(net, X, **QUICK)
    check = StabilityCheck(tmp_path / "test_net.py", "test_a")
    check.file().write_text(check.file().read_text()[:50])
    with pytest.raises(StabilityProbeError, match=r"is no JSON .*perhaps cut off"):
        check(net, X, **QUICK)


def test_pytest_starts_without_torch():
    """Whoever has the package installed does not pay for the plugin where it is not used."""
    code = "import sys, stability_probe.regression.plugin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_it_is_an_entry_point_of_pytest():
    from importlib.metadata import entry_points

    (found,) = (e for e in entry_points(group="pytest11") if e.name == "stability_probe")
    assert found.value == "stability_probe.regression.plugin"


def test_no_two_tests_share_a_file(tmp_path):
    names = ("test_a", "A::test_a", "B::test_a", "test_a[x]", "test_a[a/b]", "test_a[a b]")
    files = {StabilityCheck(tmp_path / "test_net.py", name).file() for name in names}
    assert len(files) == len(names)
    assert all(re.fullmatch(r"[\w.=-]+", file.name) for file in files)
