"""The pytest plugin, as a project that uses it sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_from_no_baseline_to_a_regression(project, tmp_path):
    folder = tmp_path / "tests" / "stability_baselines"
    before = project()
    assert before.returncode == 1
    assert "no baseline at" in before.stdout and "--stability-update" in before.stdout
    assert not folder.exists()

    written = project("--stability-update")
    assert written.returncode == 0, written.stdout
    assert sorted(file.name for file in folder.iterdir()) == [
        "test_net-test_training_is_stable_2.json",
        "test_net-test_training_is_stable_3.json",
        "test_net-test_two_of_them-first.json",
        "test_net-test_two_of_them-second.json",
    ]
    kept = {file: file.read_bytes() for file in folder.iterdir()}

    parallel = project("-n", "2")
    assert parallel.returncode == 0, parallel.stdout
    assert "3 passed" in parallel.stdout

    worse = project(scale=30.0)
    assert worse.returncode == 1
    assert "training has become less stable than in" in worse.stdout
    assert "| `loss` |" in worse.stdout and "Likely cause:" in worse.stdout
    assert {file: file.read_bytes() for file in folder.iterdir()} == kept

    assert project("--stability-update", "-n", "2", scale=30.0).returncode == 0
    assert project(scale=30.0).returncode == 0


def test_one_name_twice_is_refused(project):
    test = TEST.replace("name=name)", ")")
    result = project("--stability-update", "-k", "two_of_them", test=test)
    assert result.returncode == 1
    assert "called twice with name=''; give each its own" in result.stdout


def test_a_broken_baseline_is_one_line(project, tmp_path):
    assert project("--stability-update", "-k", "is_stable").returncode == 0
    for file in (tmp_path / "tests" / "stability_baselines").iterdir():
        file.write_text(file.read_text()[:50])
    result = project("-k", "is_stable")
    assert result.returncode == 1
    assert "is no JSON" in result.stdout and "perhaps cut off" in result.stdout


def test_pytest_starts_without_torch():
    """Whoever has the package installed does not pay for the plugin where it is not used."""
    code = "import sys, stability_probe.regression.plugin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_it_is_an_entry_point_of_pytest():
    from importlib.metadata import entry_points

    (found,) = (e for e in entry_points(group="pytest11") if e.name == "stability_probe")
    assert found.value == "stability_probe.regression.plugin"
