"""Records of several processes: those of one process on the union of their samples."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stability_probe import Run
from stability_probe.errors import StabilityProbeError
from stability_probe.probes import Key, ranks
from stability_probe.probes.ranks import Ranks, join
from stability_probe.probes.records import Column, Layout, Part, as_frame
from stability_probe.probes.summaries import summarise

PACKAGE = Path(__file__).parents[2]
WORKER = PACKAGE / "tests" / "oracles" / "ranks_worker.py"
ROW = ["step", "metric", "site", "level", "stat"]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE), **more}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(launcher, folder, *scenarios, check=True):
    command = [sys.executable, "-m", *launcher, str(WORKER), str(folder), *scenarios]
    done = subprocess.run(
        command, env=environment(), cwd=PACKAGE, capture_output=True, text=True, timeout=240
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def torchrun():
    return ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]


def said(folder):
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same trainings in one process, the shares as micro-batches."""
    folder = tmp_path_factory.mktemp("one")
    command = [sys.executable, str(WORKER), str(folder)]
    subprocess.run(
        [*command, "plain:theory", "plain:uvit", "measured:theory"],
        env=environment(), cwd=PACKAGE, check=True, timeout=240,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What happened in two processes of plain torchrun."""
    folder = tmp_path_factory.mktemp("two")
    launch(
        torchrun(), folder, "ddp:theory", "ddp:uvit", "fsdp:theory", "fsdp:uvit",
        "measured:theory", "unsynchronised", "taken", "uneven", "sharded_and_measured", "absent",
    )  # fmt: skip
    return folder


def both(first, second):
    """The records of two runs side by side."""
    frames = [
        Run.open(path / "run").records().astype(dict.fromkeys(ROW[1:3] + ROW[4:], object))
        for path in (first, second)
    ]
    assert not any(frame.duplicated(ROW).any() for frame in frames)
    together = frames[0].merge(frames[1], on=ROW, how="outer", indicator=True)
    assert (together._merge == "both").all()
    assert len(together) > 500
    return together


def assert_same(together, rtol):
    np.testing.assert_allclose(together.value_x, together.value_y, rtol=rtol, atol=0)


class TestUnion:
    @pytest.mark.parametrize("net", ["theory", "uvit"])
    def test_ddp_records_what_one_process_would_of_all_samples(self, one, two, net):
        together = both(two / f"ddp-{net}", one / f"plain-{net}")
        ends = together.stat.isin(["min", "max"])
        assert ends.sum() > 100
        assert_same(together[ends], rtol=0)
        assert_same(together[~ends & (together.metric != "cross")], rtol=1e-6)
        assert_same(together[together.metric.isin(["grad_energy", "samples"])], rtol=0)

    @pytest.mark.parametrize("net", ["theory", "uvit"])
    def test_fully_sharded_records_what_one_process_would(self, one, two, net):
        """Its weights lie elsewhere in memory, so that products are rounded in another way."""
        together = both(two / f"fsdp-{net}", one / f"plain-{net}")
        assert_same(together[together.metric != "cross"], rtol=3e-6)
        assert {"grad_energy", "update_ratio"} <= set(together.metric)

    def test_every_samples_count(self, two):
        frame = Run.open(two / "ddp-theory" / "run").records()
        counts = frame[frame.metric == "samples"].groupby("step").value.sum()
        assert counts.tolist() == [4.0] * 5

    @pytest.mark.slow
    def test_accelerate_launch(self, one, tmp_path):
        # `--multi_gpu` starts several processes; the worker's Accelerator keeps them on the CPU.
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch([*launcher, "--main_process_port", free_port()], tmp_path, "accelerated:theory")
        assert [note["world"] for note in said(tmp_path / "accelerated-theory")] == [2, 2]
        together = both(tmp_path / "accelerated-theory", one / "plain-theory")
        assert_same(together[together.stat.isin(["min", "max"])], rtol=0)
        assert_same(together[together.metric != "cross"], rtol=1e-6)

    def test_measurements_are_those_of_process_0(self, one, two):
        together = both(two / "measured-theory", one / "measured-theory")
        single = together[together.stat.str.startswith("s")]
        assert sorted(single.step.unique()) == [1, 3]
        assert "sigma_max" in set(single.metric)
        assert_same(single, rtol=0)

    def test_one_collective_a_flush_and_process_0_alone_stores(self, two):
        for net in ("theory", "uvit"):
            first, second = said(two / f"ddp-{net}")
            assert first["flushes"] == second["flushes"] == [["gather_object"]]
            run = Run.open(two / f"ddp-{net}" / "run")
            assert (run.info["state"], first["rows"]) == ("complete", len(run.records()))
            assert len(list((run.path / "records").iterdir())) == 3  # steps 1–2, 3–4 and 5


class TestRefusals:
    def test_gradients_that_are_not_averaged(self, two):
        first, _ = said(two / "unsynchronised")
        assert (
            "grad_energy of a/encoder.0.layer1.weight is not the same in all proc" in first["error"]
        )
        assert "outside no_sync()" in first["error"]

    def test_a_taken_folder_is_refused_in_all_processes(self, two):
        assert all("holds a run already" in note["error"] for note in said(two / "taken"))

    def test_processes_of_different_length(self, two):
        first, _ = said(two / "uneven")
        assert (
            "process 1 and process 0 have not recorded the same (steps [2, 3] and" in first["error"]
        )

    def test_measurements_of_a_sharded_network(self, two):
        for note in said(two / "sharded_and_measured"):
            assert "is sharded over the processes" in note["error"]
            assert "got sensitivity_every=3; pass 0" in note["error"]

    def test_a_block_that_only_one_process_enters(self, two):
        note = json.loads((two / "absent" / "rank0.json").read_text())
        assert "not all 2 processes entered the probe's block within 2 s" in note["error"]
        assert note["seconds"] < 30


class TestLostProcesses:
    def processes(self, folder, scenario):
        """Two processes without an agent that would stop one for the other."""
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2")
        command = [sys.executable, str(WORKER), str(folder), scenario]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return [
            subprocess.Popen(command, env={**env, "RANK": str(r)}, cwd=PACKAGE, **quiet)
            for r in (0, 1)
        ]

    @pytest.mark.parametrize("scenario", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
    def test_training_goes_on_and_the_run_says_so(self, tmp_path, scenario):
        """At most the time-out of 3 s is waited for; then process 0 makes its nine steps."""
        first, second = self.processes(tmp_path, scenario)
        try:
            first.wait(120)
        finally:
            second.kill()
            second.wait()
            first.kill()
        note = json.loads((tmp_path / scenario / "rank0.json").read_text())
        assert note["error"] is None
        assert note["seconds"] < 30
        assert len(note["warnings"]) == 1
        assert "no more records are stored" in note["warnings"][0]
        run = Run.open(tmp_path / scenario / "run")
        assert run.info["state"] == "failed"
        assert "not heard of within 3 s or are gone" in run.info["reason"]
        assert sorted(run.records().step.unique()) == [1, 2]  # what both had flushed

    @pytest.mark.slow
    def test_under_torchrun_the_run_stays_readable(self, tmp_path):
        started = time.perf_counter()
        done = launch(torchrun(), tmp_path, "dies_in_training", check=False)
        assert done.returncode != 0
        assert time.perf_counter() - started < 120
        run = Run.open(tmp_path / "dies_in_training" / "run")
        assert run.info["state"] in ("running", "failed")
        assert sorted(run.records().step.unique()) == [1, 2, 3, 4]


def part(join_by, values, steps=(1,), how="value", name="a"):
    column = Column(Key("energy", name, 0, "x"), join_by, how=how)
    return Part(Layout([column]), list(steps), np.asarray(values, dtype=float).reshape(-1, 1))


def joined(*parts_of):
    """The records of several processes together, as a frame."""
    merged = [ranks._merged([ranks._Block.of(p) for p in parts]) for parts in parts_of]
    return as_frame([block.part() for block in join(merged)])


def summary(x, loss, t, steps=(1,)):
    """What a process records of samples and their losses, or of one loss for all of them."""
    losses, single = Key("loss", "loss", 0, ""), not isinstance(loss, list)
    samples = {
        Key("energy", "x", 0, ""): torch.tensor(x),
        losses: torch.tensor([loss] if single else loss),
    }
    edges = torch.tensor([500.0])
    layout, values = summarise(samples, torch.tensor(t), edges, [losses] if single else [])
    return Part(layout, list(steps), np.stack([values.double().numpy()] * len(steps)))


def table(frame):
    return {(row.metric, row.stat): row.value for row in frame.itertuples()}


class TestJoin:
    @pytest.mark.parametrize(
        ("how", "expected"), [("sum", 4.0), ("min", -2.0), ("max", 6.0), ("same", None)]
    )
    def test_by_hand(self, how, expected):
        parts = [[part(how, [6.0])], [part(how, [-2.0])]]
        if expected is None:
            with pytest.raises(StabilityProbeError, match="energy of a is not the same in all"):
                joined(*parts)
        else:
            assert joined(*parts).value.tolist() == [expected]

    def test_nan_is_kept_and_agrees_with_nan(self):
        nan = float("nan")
        for how in ("sum", "min", "max"):
            assert np.isnan(joined([part(how, [1.0])], [part(how, [nan])]).value).all()
        assert np.isnan(joined([part("same", [nan])], [part("same", [nan])]).value).all()

    @pytest.mark.parametrize("scalar", [False, True])
    @pytest.mark.parametrize("sizes", [(4, 4), (4, 2), (4, 1), (1, 3)])
    def test_batches_may_differ_in_size(self, sizes, scalar):
        """A last batch is often short; one of a single sample is no different."""
        x = [[1.0, 5.0, 2.0, 8.0][:n] for n in sizes]
        loss = [[v / 2 for v in part] for part in x]
        t = [[10.0, 900.0, 20.0, 800.0][:n] for n in sizes]
        given = [0.5, 1.5] if scalar else loss
        parts = [[summary(*each)] for each in zip(x, given, t, strict=True)]
        found = table(joined(*parts))
        if scalar:
            assert (found["loss", "mean"], found["loss", "max"]) == (1.0, 1.5)
            assert ("loss", "t0") not in found
        else:
            assert found == pytest.approx(
                table(joined([summary([*x[0], *x[1]], [*loss[0], *loss[1]], [*t[0], *t[1]])]))
            )
        union = np.array([*x[0], *x[1]])
        noisy = np.array([*t[0], *t[1]]) > 500
        assert found["energy", "mean"] == pytest.approx(union.mean())
        assert found["energy", "t0"] == pytest.approx(union[~noisy].mean())
        assert found["samples", "t0"] == (~noisy).sum()
        assert (found["energy", "min"], found["energy", "max"]) == (union.min(), union.max())

    def test_losses_of_some_samples_only(self):
        """Whoever has as many losses as samples in one process has to in the other."""
        fits, not_all = summary([1.0], [1.0], [5.0]), summary([1.0, 2.0], [1.0], [5.0, 6.0])
        with pytest.raises(
            StabilityProbeError, match=r"not recorded the same \(Key\(metric='loss'"
        ):
            joined([fits], [not_all])

    def test_numbers_that_changed_their_type_are_one_series(self):
        """A loss in float64 at one step makes a part of its own."""
        here = [summary([1.0], [1.0], [5.0], steps=(2, 3)), summary([4.0], [1.0], [5.0])]
        frame = joined(here, here[::-1])
        assert frame[(frame.metric == "energy") & (frame.stat == "mean")].value.tolist() == [
            4.0,
            1.0,
            1.0,
        ]
        assert frame.step.is_monotonic_increasing

    def test_what_process_0_alone_has_measured_stays(self):
        both_have, measured = part("sum", [1.0]), part("same", [5.0], name="b")
        found = joined([both_have, measured], [both_have])
        assert found.value.tolist() == [2.0, 5.0]

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (
                [],
                "process 1 and process 0 have not recorded the same .Key.metric='energy', site='a'",
            ),
            ([part("sum", [1.0], name="b")], "site='a'"),
            ([part("sum", [1.0]), part("min", [1.0], name="c")], "site='c'"),
            ([part("sum", [1.0], steps=[2])], r"process 1 .* \(steps \[2\] and not \[1\]\)"),
        ],
    )
    def test_different_records_are_refused(self, other, message):
        with pytest.raises(StabilityProbeError, match=message):
            joined([part("sum", [1.0])], other)


def test_one_process_has_nobody_to_wait_for():
    alone = Ranks.meet(timeout=0.1)
    assert (alone.world, alone.rank, alone.first, alone.lost) == (1, 0, True, None)
    parts = [part("sum", [1.0])]
    assert alone.gather(parts) == parts
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 / 0)
