"""Who does the runs of a sweep: joblib's local processes, or those of Ray or Dask.

All of them go through `joblib.Parallel`, and differ in what they do when a process dies. The local
ones and Ray's end the round of work, with an error; `sweep` starts another with what is left. Dask
gives the work to another process, and says nothing.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, filterwarnings

import joblib
import torch
from joblib.externals.loky.process_executor import BrokenProcessPool

from stability_probe.errors import StabilityProbeError

BACKENDS = ("local", "ray", "dask")
"""What `hire` knows."""
PATIENCE = 90.0
"""Seconds that a cluster is given to have room."""
KNOCK = 10.0
"""Seconds that the head of a Ray cluster is given to answer."""

Calls = Iterable[Any]
"""Calls as `joblib.delayed` makes them."""


@dataclass(frozen=True)
class Request:
    """Which workers are wanted.

    Attributes:
        backend: one of `BACKENDS`.
        address: of a cluster that is there; without it, one is started on this machine, unless
            the environment variable RAY_ADDRESS has that of a Ray cluster.
        jobs: how many runs at once; as many as there is room for if not given.
        threads: of each run; if not given, an equal share of the cores for local ones, but no more
            than torch has here (as of OMP_NUM_THREADS), and 1 on a cluster.

    Raises:
        StabilityProbeError: if a number is below 1, or the backend unknown or without addresses.
    """

    backend: str = "local"
    address: str | None = None
    jobs: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("jobs", "threads"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise StabilityProbeError(
                    f"sweep: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.backend not in BACKENDS:
            raise StabilityProbeError(
                f"sweep: unknown backend {self.backend!r}; choose from {', '.join(BACKENDS)}"
            )
        if self.address is not None and self.backend == "local":
            raise StabilityProbeError(
                f"sweep: the address {self.address} is of no use to local processes; choose the "
                "backend ray or dask"
            )

    def most(self, room: int, runs: int) -> int:
        """How many jobs there are to be, at least 1."""
        return max(1, min(room, runs, self.jobs or room))


@dataclass(frozen=True)
class Workers:
    """Processes that do runs.

    Attributes:
        threads: of each of them.
        do: does calls, each in one of the processes; raises what a call raises.
        broken: what it raises where a process has died.
    """

    threads: int
    do: Callable[[Calls], None]
    broken: tuple[type[BaseException], ...]


@contextmanager
def hire(request: Request, runs: int) -> Iterator[Workers]:
    """Processes for a number of runs, for as long as the context lasts.

    Raises:
        StabilityProbeError: if they cannot be had.
    """
    with {"local": _local, "ray": _ray, "dask": _dask}[request.backend](request, runs) as workers:
        yield workers


@contextmanager
def _local(request: Request, runs: int) -> Iterator[Workers]:
    cores = joblib.cpu_count()
    jobs = request.jobs or request.most(cores // (request.threads or 1), runs)
    threads = request.threads or max(1, min(cores // jobs, torch.get_num_threads()))

    def do(calls: Calls) -> None:
        with joblib.parallel_config("loky", inner_max_num_threads=threads), catch_warnings():
            # Of a process that has grown by 300 MB since its first run and is replaced: no loss.
            filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
            # n_jobs=1 would be done in this process, which a run could take with it
            joblib.Parallel(max(2, jobs), pre_dispatch=jobs, batch_size=1)(calls)

    yield Workers(threads, do, (BrokenProcessPool,))


@contextmanager
def _ray(request: Request, runs: int) -> Iterator[Workers]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise _missing("Ray", "ray") from error

    register_ray()
    threads = request.threads or 1
    ours = not ray.is_initialized()
    if ours:
        _join_ray(request, threads, runs)
    try:
        yield Workers(threads, lambda calls: _do_by_ray(calls, request, runs), _ray_errors())
    finally:
        if ours:
            ray.shutdown()


def _join_ray(request: Request, threads: int, runs: int) -> None:
    """Connect to a Ray cluster, or start one on this machine."""
    import ray

    address = request.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if not address:
            cores = joblib.cpu_count()
            cpus = request.jobs * threads if request.jobs else max(cores, threads)
            ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            _knock(address)
            ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise _unreachable("Ray", address, error) from error


def _knock(address: str) -> None:
    """See whether anything listens at HOST:PORT; Ray would go on trying for many minutes.

    Raises:
        OSError: if nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()


def _ray_errors() -> tuple[type[BaseException], ...]:
    from ray.exceptions import RayError

    return (RayError,)


def _do_by_ray(calls: Calls, request: Request, runs: int) -> None:
    """A round of work by as many of Ray's actors as there is room for now.

    They get places that are reserved beforehand: Ray waits for ever for room that went with a
    machine. Should that go while they start, giving the reservation up ends the wait with an error.
    """
    import ray
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    threads = request.threads or 1
    places, jobs = _reserve(request, threads, runs)
    giving_up = threading.Timer(PATIENCE, remove_placement_group, [places])
    giving_up.start()
    where: dict[str, Any] = {
        "num_cpus": threads,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(places),
    }

    def started() -> Iterator[Any]:
        giving_up.cancel()
        yield from calls

    try:
        if jobs == 1:  # joblib would do it in this process
            run = ray.remote(_call).options(max_retries=0, **where)
            for call in started():
                _result(run.remote(call))
            return
        with joblib.parallel_config("ray", ray_remote_args=where):
            joblib.Parallel(jobs, pre_dispatch=2 * jobs, batch_size=1)(started())
    finally:
        giving_up.cancel()
        remove_placement_group(places)


def _call(call: Any) -> None:
    function, arguments, named = call
    function(*arguments, **named)


def _result(reference: Any) -> None:
    """Wait for a call, and raise what it raises as it was."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        ray.get(reference)
    except RayTaskError as error:  # a RayError too, though no process has died
        raise error.cause from None


def _reserve(request: Request, threads: int, runs: int) -> tuple[Any, int]:
    """A place of so many cores for every job, spread over the machines.

    A machine that has died is listed until Ray notices.

    Raises:
        StabilityProbeError: if there is no room for one in time.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        cores = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        room = sum(int(number) // threads for number in cores)
        if room:
            jobs = request.most(room, runs)
            places = placement_group([{"CPU": threads}] * jobs, strategy="SPREAD")
            if places.wait(timeout_seconds=10):
                return places, jobs
            remove_placement_group(places)
        time.sleep(1)
    raise StabilityProbeError(
        f"sweep: Ray has had no room for workers of {threads} threads for {PATIENCE:g} seconds; "
        "start more machines, or give fewer --jobs or --threads"
    )


@contextmanager
def _dask(request: Request, runs: int) -> Iterator[Workers]:
    try:
        import distributed
    except ImportError as error:
        raise _missing("Dask", "dask") from error

    threads = request.threads or 1
    with _dask_client(request, threads, runs) as client:
        many = [w["nthreads"] for w in client.scheduler_info(n_workers=-1)["workers"].values()]
        if max(many, default=1) > 1:
            raise StabilityProbeError(
                f"sweep: a Dask worker with {max(many)} threads would do as many runs in one "
                "process, where they cannot be apart; start workers with --nthreads 1"
            )

        def do(calls: Calls) -> None:
            jobs = request.jobs or max(1, len(client.ncores()))
            with joblib.parallel_config("dask", client=client, wait_for_workers_timeout=PATIENCE):
                joblib.Parallel(pre_dispatch=jobs, batch_size=1)(calls)

        yield Workers(threads, do, (distributed.KilledWorker,))


@contextmanager
def _dask_client(request: Request, threads: int, runs: int) -> Iterator[Any]:
    """A client of a Dask cluster, or of one that is started on this machine."""
    from distributed import Client, LocalCluster

    if request.address is None:
        jobs = request.jobs or request.most(joblib.cpu_count() // threads, runs)
        with (
            LocalCluster(
                n_workers=jobs, threads_per_worker=1, dashboard_address=None, silence_logs="ERROR"
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(request.address, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise _unreachable("Dask", request.address, error) from error
    with client:
        yield client


def _missing(name: str, extra: str) -> StabilityProbeError:
    return StabilityProbeError(
        f"sweep: --backend {extra} needs {name}, which is not installed; "
        f"install stability_probe[{extra}]"
    )


def _unreachable(name: str, address: str | None, error: BaseException) -> StabilityProbeError:
    said = " ".join(str(error).split())[:200]
    return StabilityProbeError(
        f"sweep: no {name} cluster at {address or 'this machine'} ({said}); start one, or give "
        "another --address"
    )
