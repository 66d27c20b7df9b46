"""Who does the runs of a sweep; what is refused. That they do them is in `test_sweep`."""

import os
import socket
import sys

import joblib
import pytest

from stability_probe import StabilityProbeError
from stability_probe.runs.workers import Request, hire


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"jobs": 0}, "sweep: jobs must be at least 1, got 0"),
        ({"jobs": -3}, "sweep: jobs must be at least 1, got -3"),
        ({"threads": 0}, "sweep: threads must be at least 1, got 0"),
        ({"backend": "mpi"}, "unknown backend 'mpi'; choose from local, ray, dask"),
        ({"address": "a:1"}, "the address a:1 is of no use to local processes; choose the back"),
    ],
)
def test_refused(request_, message):
    with pytest.raises(StabilityProbeError, match=message):
        Request(**request_)


@pytest.mark.parametrize(
    ("backend", "module", "message"),
    [
        ("ray", "ray", r"needs Ray, which is not installed; install stability_probe\[ray\]"),
        ("dask", "distributed", r"needs Dask, which is not .*; install stability_probe\[dask\]"),
    ],
)
def test_extras_that_are_missing(monkeypatch, backend, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StabilityProbeError, match=message), hire(Request(backend), 1):
        pass


@pytest.mark.parametrize(
    ("cores", "torch_has", "jobs", "threads", "runs", "expected"),
    [
        (8, 8, None, None, 100, 1),  # eight jobs of a thread
        (8, 8, None, None, 2, 4),  # two jobs, which share the cores
        (8, 1, None, None, 2, 1),  # with OMP_NUM_THREADS=1
        (8, 8, 3, None, 100, 2),
        (8, 1, None, 4, 100, 4),
        (2, 2, 5, None, 100, 1),  # as many as were asked for, and one thread at least
    ],
)
def test_cores_are_shared(monkeypatch, cores, torch_has, jobs, threads, runs, expected):
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: torch_has)
    with hire(Request(jobs=jobs, threads=threads), runs) as workers:
        assert workers.threads == expected


def test_runs_are_in_other_processes_though_there_is_one_job(tmp_path):
    with hire(Request(jobs=1), 1) as workers:
        workers.do([joblib.delayed(os.system)(f"echo $PPID > {tmp_path}/process")])
    assert int((tmp_path / "process").read_text()) != os.getpid()


def test_runs_are_handed_out_as_others_end(tmp_path):
    ahead = []

    def calls():
        for index in range(12):
            ahead.append(index + 1 - len(list(tmp_path.iterdir())))
            yield joblib.delayed(os.system)(f"sleep 0.1; touch {tmp_path / str(index)}")

    with hire(Request(jobs=2), 12) as workers:
        workers.do(calls())
    assert len(list(tmp_path.iterdir())) == 12
    assert max(ahead) <= 4, "joblib takes as many as there are jobs at a time"


@pytest.fixture
def nowhere(monkeypatch):
    """An address where nothing is, and no Ray that would look for it for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray is looking for it"))
        yield f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("client", ["", "ray://"])
def test_a_ray_cluster_that_is_not_there(nowhere, monkeypatch, client):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    message = rf"sweep: no Ray cluster at {client}{nowhere} \(.*refused\); start one, or give an"
    with (
        pytest.raises(StabilityProbeError, match=message),
        hire(Request("ray", f"{client}{nowhere}"), 1),
    ):
        pass


def test_a_ray_cluster_of_the_environment_that_is_not_there(nowhere, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", nowhere)
    with (
        pytest.raises(StabilityProbeError, match=f"no Ray cluster at {nowhere}"),
        hire(Request("ray"), 1),
    ):
        pass


def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setattr("stability_probe.runs.workers.PATIENCE", 0.2)
    with (
        pytest.raises(StabilityProbeError, match=r"no Dask cluster at tcp://127.0.0.1:9"),
        hire(Request("dask", "tcp://127.0.0.1:9"), 1),
    ):
        pass


def test_dask_workers_that_would_share_a_process(monkeypatch):
    from distributed import LocalCluster

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        pytest.raises(StabilityProbeError, match=r"2 threads would do .* with --nthreads"),
        hire(Request("dask", cluster.scheduler_address), 1),
    ):
        pass
