"""The command line in this process."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@dataclass(frozen=True)
class Result:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """Lines on stderr but those of progress displays."""
        return [line for line in self.err.splitlines() if line.strip() and " left " not in line]


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """Run the command line in this process."""

    def call(*args: object) -> Result:
        from stability_probe.cli import main  # not before its shapes are checked

        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["stability-probe", *map(str, args)])
            with pytest.raises(SystemExit) as ended:
                main()
        return Result(ended.value.code or 0, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def refused(cli: Callable[..., Result]) -> Callable[..., str]:
    """Run a command line that is bad input; its one line on stderr."""

    def call(*args: object) -> str:
        result = cli(*args)
        assert result.code == 2, result
        assert len(result.complaints) == 1, result.err
        (line,) = result.complaints
        assert line.startswith("error: ") and "Traceback" not in result.err
        assert result.out == ""
        return line.removeprefix("error: ")

    return call


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, with its bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick_verdicts(monkeypatch):
    """Every run is found to meet two claims, without looking."""
    from stability_probe.regression import groups
    from stability_probe.verify import Verdict

    found = [Verdict(theorem, "run", "a claim", "HOLDS") for theorem in ("3.3", "3.4")]
    monkeypatch.setattr(groups, "verify", lambda run: found)
