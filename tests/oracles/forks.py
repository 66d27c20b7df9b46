"""Processes that start at once, as forks of one that has imported everything, and die when told to.

A function that runs in one is defined at the top of a test module, so that it has a name there.
"""

import base64
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVE = "from tests.oracles.forks import serve; serve()"
PATIENCE = 60.0
"""Seconds after which a process is taken to hang."""


@dataclass(frozen=True)
class Ended:
    """How processes ended.

    Attributes:
        codes: an exit code each; −9 is that of a kill.
        seconds: from the start of the first to the end of the last.
        told: what they wrote to stdout and stderr.
    """

    codes: tuple[int, ...]
    seconds: float
    told: str


class Forks:
    """A process whose forks call functions; used as a context manager."""

    def __enter__(self) -> "Forks":
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "CUDA_VISIBLE_DEVICES": "",  # what has been started cannot be used in a fork
            },
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def call(
        self,
        function: Callable[..., object],
        *args: object,
        kill_after: float | None = None,
        processes: int = 1,
    ) -> Ended:
        """Call a function in a fork.

        Args:
            function: what to call; what it returns is lost.
            args: its arguments.
            kill_after: seconds after which it is killed, if it has not ended.
            processes: in how many forks, which find in their environment what `torchrun` says to
                those that it starts; one alone finds nothing there.
        """
        order = pickle.dumps((function, args, kill_after, processes))
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(base64.b64encode(order) + b"\n")
        self._process.stdin.flush()
        ended: Ended = pickle.loads(base64.b64decode(self._process.stdout.readline()))
        return ended


def serve() -> None:
    """Fork for one order after another; what is printed meanwhile goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _import_all()
    for line in sys.stdin.buffer:
        function, args, kill_after, processes = pickle.loads(base64.b64decode(line))
        ended = _forked(function, args, kill_after, processes)
        answers.write(base64.b64encode(pickle.dumps(ended)) + b"\n")
        answers.flush()


def _import_all() -> None:
    """Import what a training imports, also where that is done at the first use: by training."""
    import torch

    from stability_probe.runs import RecordConfig, TrainConfig, record_training

    torch.set_num_threads(1)
    tiny = TrainConfig(model="theory-unet", n_skips=1, data="uniform", batch_size=1, steps=2)
    probing = RecordConfig(sensitivity_every=0, probe_samples=1, save_every=1)
    with tempfile.TemporaryDirectory() as folder:
        record_training(tiny, Path(folder) / "run", probing, resume=True).records()


def _forked(
    function: Callable[..., object], args: tuple[Any, ...], kill_after: float | None, processes: int
) -> Ended:
    deadline = time.monotonic() + (PATIENCE if kill_after is None else kill_after)
    started, port = time.monotonic(), _free_port()
    with tempfile.TemporaryFile() as told:
        children = []
        for rank in range(processes):
            place = _place(rank, processes, port) if processes > 1 else {}
            children.append(_fork(function, args, place, told.fileno()))
        codes: dict[int, int] = {}
        while alive := [child for child in children if child not in codes]:
            if time.monotonic() >= deadline:
                for child in alive:
                    os.kill(child, signal.SIGKILL)
            for child in alive:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
            time.sleep(0.0005)
        seconds = time.monotonic() - started
        told.seek(0)
        return Ended(tuple(codes[c] for c in children), seconds, told.read().decode())


def _fork(
    function: Callable[..., object], args: tuple[Any, ...], place: dict[str, str], told: int
) -> int:
    child = os.fork()
    if child:
        return child
    if place:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(place)
    os.dup2(told, 1)
    os.dup2(told, 2)
    code = 1
    try:
        function(*args)
        code = 0
    except BaseException:  # whatever it is, the parent's loop must not go on here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _place(rank: int, processes: int, port: int) -> dict[str, str]:
    """What `torchrun` puts into the environment of a process that it starts."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    named |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in named.items()}}


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
