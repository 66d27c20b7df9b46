"""A watched twin in a process of its own, for tools that change torch wherever they are used."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.paired import Step
from benchmarks.twins import Workload, limit_threads
from benchmarks.variants import VARIANTS


@contextmanager
def remote_step(workload: Workload, variant: str, folder: Path) -> Iterator[Step]:
    """A step of a twin that is watched in another process; one waits while the other works.

    Raises:
        RuntimeError: in a step, if the other process has ended.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy what this one has imported
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, workload, variant, folder))
    process.start()
    there.close()

    def step() -> float:
        try:
            here.send(True)
            return float(here.recv())
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(f"{variant}: its process has ended; it printed why above") from error

    try:
        yield step
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, workload: Workload, variant: str, folder: Path) -> None:
    """Take a step whenever one is asked for, until the other end is closed."""
    limit_threads()
    twin = workload.twin()
    (watch,) = (v for v in VARIANTS if v.name == variant)
    with watch.attach(twin, folder):
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            connection.send(twin.step())
