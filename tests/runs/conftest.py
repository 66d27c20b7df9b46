"""Shared by the tests of runs."""

import pytest
import torch

from stability_probe import Run
from tests.oracles.forks import Forks


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny tensors are faster on one thread, and bitwise comparisons need one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def forks():
    """A process that has imported everything and calls functions in forks of itself."""
    with Forks() as started:
        yield started


@pytest.fixture
def run(tmp_path):
    """A run that has begun."""
    run = Run(tmp_path / "deep" / "run", {"scheme": "cs:0.7", "seed": 3})
    run.begin({"skips": [{"level": 1}]})
    return run
