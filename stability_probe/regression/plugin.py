"""The pytest plugin: the fixture `stability_check`, and `--stability-update`.

It is loaded by every pytest of the environment, so nothing heavy is imported before it is used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "stability_baselines"
"""Where baselines are kept, beside the tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--stability-update`."""
    parser.getgroup("stability_probe").addoption(
        "--stability-update",
        action="store_true",
        help="write the baselines of stability_check anew instead of comparing with them",
    )


@pytest.fixture
def stability_check(request: pytest.FixtureRequest) -> StabilityCheck:
    """Compare a network's training with the baseline beside the test; see `StabilityCheck`."""
    return StabilityCheck(
        Path(request.path),
        request.node.nodeid.partition("::")[2],
        update=bool(request.config.getoption("--stability-update")),
    )


class StabilityCheck:
    """Trains a network briefly over several seeds, and compares it with the stored baseline.

    Baselines are in `stability_baselines/` beside the test, a file for each check, which only its
    own test reads and writes; so tests may run in parallel.

    Args:
        test: the test's file.
        name: the test's name.
        update: write the baseline instead of comparing with it.
    """

    def __init__(self, test: Path, name: str, update: bool = False) -> None:
        self._test, self._name, self._update = test, name, update
        self._used: set[str] = set()

    def __call__(
        self,
        model_factory: Callable[[], nn.Module],
        *inputs: Any,
        train_steps: int = 30,
        seeds: Sequence[int] | int = 5,
        loss: Callable[..., Tensor] | None = None,
        learning_rate: float = 1e-3,
        sensitivity: bool = True,
        margin: float = 0.1,
        name: str = "",
    ) -> None:
        """Fail the test if training has become less stable.

        Args:
            model_factory: makes the network; it is called once a seed, with torch's global
                generator set to that.
            inputs: what the network is called with; tensors are batches.
            train_steps: optimizer steps of AdamW; 0 measures the fresh network alone.
            seeds: the seeds, or how many.
            loss: of (output, *inputs), the loss of every sample; by default the mean squared
                difference of the output and the first input, or the output's mean square where
                they have not the same shape.
            learning_rate: of AdamW.
            sensitivity: whether Jacobians are measured after the last step.
            margin: the relative rise that is no regression.
            name: tells several checks of one test apart.

        Raises:
            StabilityProbeError: if the network has no long skips or the baseline cannot be used.
        """
        __tracebackhide__ = True
        from stability_probe.regression import brief

        if name in self._used:
            pytest.fail(f"stability_check: called twice with name={name!r}; give each its own")
        self._used.add(name)
        chosen = range(seeds) if isinstance(seeds, int) else seeds
        training = brief.BriefTraining(train_steps, loss, learning_rate, sensitivity)
        group = brief.brief_group(model_factory, inputs, list(chosen), training)
        file = self.file(name)
        if self._update:
            brief.held_against(file, group, margin, update=True)
            return
        if not file.exists():
            pytest.fail(
                f"stability_check: no baseline at {file}; write it with pytest --stability-update "
                "and commit it"
            )
        check = brief.held_against(file, group, margin)
        if not check.passed:
            pytest.fail(brief.failure_text(check, file), pytrace=False)

    def file(self, name: str = "") -> Path:
        """The baseline's file."""
        words = "-".join(filter(None, [self._test.stem, self._name.replace("::", "-"), name]))
        plain = re.sub(r"[^\w.=-]+", "_", words.replace("[", "-").replace("]", ""))
        if re.search(r"[^\w.=:\[\]-]", words):  # what differs only there would be one file
            plain += "-" + hashlib.sha256(words.encode()).hexdigest()[:6]
        return self._test.parent / FOLDER / f"{plain}.json"
