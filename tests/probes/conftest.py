"""The small networks that the probe tests share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stability_probe import SkipConnection, TheoryUNet, find_skips
from tests.oracles.zoo import unet2d, uvit

SCHEMES = ("unscaled", "inverse-sqrt2", "uniform:0", "cs:0.7", "ls", "ls-non-shared")


@dataclass(frozen=True)
class Case:
    """A network with inputs that fit it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def net(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        net = self.build()
        return net.double() if dtype == torch.float64 else net

    def data(
        self, n: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t spread over the noise levels, and a target."""
        generator = torch.Generator().manual_seed(seed)
        x, target = (
            torch.randn(n, *self.shape, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        t = torch.randint(1000, (n,), generator=generator)
        return x.to(dtype), t, target.to(dtype)

    def skips(self, net: nn.Module) -> list[SkipConnection]:
        return find_skips(net, *self.data(1, dtype=next(net.parameters()).dtype)[:2])


CASES = {
    case.name: case
    for case in (
        Case("add", lambda: TheoryUNet(16, 3), (16,)),
        Case("concat", lambda: TheoryUNet(16, 3, merge="concat"), (16,)),
        Case("uvit", uvit, (1, 8, 8)),
        Case("unet2d", lambda: unet2d(dropout=0.2), (1, 8, 8)),
    )
}


HERE = Path(__file__).parent
SEEN_LESS_OFTEN = ("concat", "unet2d")
"""Networks on which the ways to train are tried by `make test-all` only: they take the longest."""
SEEN_EVERYWHERE = ("unscaled", "ls")
"""Schemes with which `make test` tries every network; with the others it tries one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(
            item, "callspec"
        ) else {}  # fmt: skip
        network, scheme = params.get("case"), params.get("scheme", SEEN_EVERYWHERE[0])
        if item.path.name.startswith("test_training_") and network in SEEN_LESS_OFTEN:
            item.add_marker(pytest.mark.slow)
        if network not in (None, "add") and scheme not in SEEN_EVERYWHERE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny tensors are faster on one thread, and bitwise comparisons need one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each network in turn."""
    return CASES[request.param]


@pytest.fixture
def cases() -> dict[str, Case]:
    """All networks by name."""
    return CASES


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    """Each scaling scheme in turn."""
    return request.param
