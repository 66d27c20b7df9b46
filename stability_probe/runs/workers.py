"""Who does the runs of a sweep: joblib's local processes, or those of Ray or Dask."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import joblib
from joblib.externals.loky.process_executor import BrokenProcessPool

from stability_probe.errors import StabilityProbeError

BACKENDS = ("local", "ray", "dask")
"""What `hire` knows."""


@dataclass(frozen=True)
class Workers:
    """Processes that do runs.

    Attributes:
        jobs: how many runs at once.
        threads: of each of them.
        config: joblib's settings for a round of work, for as long as it lasts.
        broken: what is raised where one of the processes has died.
    """

    jobs: int
    threads: int
    config: Callable[[], AbstractContextManager[Any]]
    broken: tuple[type[BaseException], ...]

    def do(self, calls: Iterable[Any]) -> None:
        """Do delayed calls, each in one of the processes.

        Raises:
            BaseException: what a call raises; one of `broken` if a process has died.
        """
        with self.config():
            # joblib does the work of n_jobs=1 in this process, where it could take all with it.
            joblib.Parallel(n_jobs=max(2, self.jobs), pre_dispatch=self.jobs, batch_size=1)(calls)


@contextmanager
def hire(
    backend: str, address: str | None, jobs: int | None, threads: int | None, runs: int
) -> Iterator[Workers]:
    """Processes for a number of runs, for as long as the context lasts.

    Args:
        backend: one of `BACKENDS`.
        address: of a cluster that is there.
        jobs: how many runs at once; as many as there is room for if not given.
        threads: of each; an equal share of the cores if not given.
        runs: how many there are to do.

    Raises:
        StabilityProbeError: if they cannot be had.
    """
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and value < 1:
            raise StabilityProbeError(f"sweep: {name} must be at least 1, got {value}")
    if backend not in BACKENDS:
        raise StabilityProbeError(
            f"sweep: unknown backend {backend!r}; choose from {', '.join(BACKENDS)}"
        )
    with _local(jobs, threads, runs) as workers:
        yield workers


@contextmanager
def _local(jobs: int | None, threads: int | None, runs: int) -> Iterator[Workers]:
    cores = joblib.cpu_count()
    jobs = jobs or max(1, min(runs, cores // (threads or 1)))
    threads = threads or max(1, cores // jobs)
    config = joblib.parallel_config(backend="loky", inner_max_num_threads=threads)
    yield Workers(jobs, threads, lambda: config, (BrokenProcessPool,))
