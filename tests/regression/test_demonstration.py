"""A repository that guards its training, from the first baseline to a pull request that fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODEL = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Net(nn.Module):
    """Three levels that are joined by sums."""

    def __init__(self, width=12):
        super().__init__()
        self.down = nn.ModuleList(Block(width) for _ in range(3))
        self.mid = Block(width)
        self.up = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x):
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        x = self.mid(x)
        for block, skip in zip(self.up, reversed(kept)):
            x = block(x + 0.7 * skip)
        return x
'''
TRAIN = """
import sys

import torch
from model import Net
from stability_probe import Run, StabilityProbe, find_skips


def train(seed):
    torch.manual_seed(seed)
    net = Net()
    data = torch.randn(256, 12)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    skips = find_skips(net, data[:1])
    run = Run(f"runs/{seed}", {"seed": seed, "steps": 30})
    with StabilityProbe(net, skips, every=1, sensitivity_every=0, run=run) as probe:
        for step in range(30):
            x = data[torch.randint(256, (64,))]
            loss = (net(x + 0.1 * torch.randn_like(x)) - x).square().mean(1)
            loss.mean().backward()
            probe.step(loss=loss)
            optimizer.step()
            optimizer.zero_grad()


for seed in sys.argv[1:]:
    train(int(seed))
"""
COMMAND = str(Path(sys.executable).parent / "stability-probe")


class Repository:
    """The files, and what a developer types."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.put("model.py", MODEL)
        self.put("train.py", TRAIN)
        if shutil.which("git"):
            self.call("git", "init", "-q")

    def put(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def call(self, *command: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("GITHUB_STEP_SUMMARY", None)
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )

    def train(self, seeds=range(5)) -> None:
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        done = self.call(sys.executable, "train.py", *map(str, seeds))
        assert done.returncode == 0, done.stderr

    def check(self) -> subprocess.CompletedProcess:
        return self.call(COMMAND, "check", "runs", "--baseline", "stability-baseline.json")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    made = Repository(tmp_path_factory.mktemp("repository"))
    made.train()
    done = made.call(COMMAND, "baseline", "runs", "-o", "stability-baseline.json")
    assert done.returncode == 0, done.stderr
    return made


def test_a_harmless_change_passes(repository):
    """Other names, another way to write the same sum, and other seeds."""
    harmless = MODEL.replace("x + 0.7 * skip", "torch.add(x, skip, alpha=0.7)")
    assert harmless != MODEL
    repository.put("model.py", harmless.replace("kept", "features"))
    repository.train(range(5, 10))
    checked = repository.check()
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.splitlines()[-1] == "stability check: passed"


def test_a_harmful_change_fails_and_its_level_is_named(repository):
    """The innermost skip, which enters the first block on the way up, counts four times."""
    harmful = MODEL.replace(
        "            x = block(x + 0.7 * skip)\n",
        "            x = block(x + (2.8 if block is self.up[0] else 0.7) * skip)\n",
    )
    assert harmful != MODEL
    repository.put("model.py", harmful)
    repository.train(range(5, 10))
    checked = repository.check()
    assert checked.returncode == 1
    assert checked.stdout.splitlines()[-1] == "stability check: FAILED"
    lines = checked.stdout.splitlines()
    worse = [line.split()[0] for line in lines if line.rstrip().endswith("worse")]
    assert "gain.skip_3" in worse
    assert not {"gain.skip_1", "gain.skip_2", "energy.h_3"} & set(worse)
    (cause,) = [line for line in lines if line.startswith("likely cause")]
    assert "skip 3 (down.2 -> up.0): 2.8 (was 0.7)" in cause
