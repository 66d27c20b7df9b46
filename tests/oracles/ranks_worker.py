"""What the tests of distributed recording run in every process.

`ranks_worker.py FOLDER SCENARIO...`

Each scenario trains a tiny network that is the same in all processes on its share of a batch, and
leaves what happened in FOLDER. With one process the shares are micro-batches of one step.
"""

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stability_probe import Run, StabilityProbe, TheoryUNet, find_skips
from stability_probe.errors import StabilityProbeError
from stability_probe.probes import ProbeBatch, ProbeConfig
from stability_probe.probes.sensitivity import SensitivityConfig
from tests.oracles.zoo import uvit

SHARES, STEPS = 2, 5
Data = tuple[Tensor, Tensor]


def network(name: str) -> tuple[nn.Module, Data]:
    """A network and a batch of x_t and t."""
    torch.manual_seed(0)
    net = uvit() if name == "uvit" else TheoryUNet(8, 2)
    x = torch.randn(4, 1, 8, 8) if name == "uvit" else torch.randn(4, 8)
    return net, (x, torch.tensor([1, 300, 600, 900]))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(folder: Path, **what: Any) -> None:
    """Leave a note of this process."""
    (folder / f"rank{rank()}.json").write_text(json.dumps(what))


def steps(
    model: nn.Module, probe: StabilityProbe, data: Data, backward: Callable[[Tensor], Any], n: int
) -> Iterator[int]:
    """Train: each process on its share, one process on all of them one after the other."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shares = [rank()] if dist.is_initialized() else range(SHARES)
    for step in range(1, n + 1):
        losses = []
        for share in shares:
            part = slice(2 * share, 2 * share + 2)
            loss = model(data[0][part], data[1][part]).square().flatten(1).mean(1)
            backward(loss.mean() / len(shares))
            losses.append(loss.detach())
        optimizer.step()
        probe.step(loss=torch.cat(losses))
        yield step
        optimizer.zero_grad()


@contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives that are called, by name."""
    called: list[str] = []
    kept = {}
    for name in dist.__all__ if hasattr(dist, "__all__") else dir(dist):
        fn = getattr(dist, name)
        if name.startswith(("all_", "gather", "broadcast", "reduce", "scatter", "barrier")):
            kept[name] = fn

            def counting(*args: Any, _fn: Any = fn, _name: str = name, **kwargs: Any) -> Any:
                called.append(_name)
                return _fn(*args, **kwargs)

            setattr(dist, name, counting)
    try:
        yield called
    finally:
        for name, fn in kept.items():
            setattr(dist, name, fn)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    config = ProbeConfig(flush_every=2, updates=True, sensitivity=SensitivityConfig(directions=2))
    return {"every": 1, "sensitivity_every": 0, "run": Run(folder / "run"), "config": config} | more


def shard(net: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = ("encoder", "decoder", "in_blocks", "out_blocks")
    for block in [b for name in blocks for b in getattr(net, name, [])]:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def records(folder: Path, name: str, wrap: Callable[[nn.Module], nn.Module], **more: Any) -> None:
    """A run of five steps, and the collectives of the probe's own."""
    net, data = network(name)
    skips = find_skips(net, data[0][:1], data[1][:1])
    model = wrap(net)
    flushes = []
    with StabilityProbe(model, skips, **options(folder, **more)) as probe:
        for _ in steps(model, probe, data, Tensor.backward, STEPS - 1):
            pass
        with counted() as called:
            probe.flush()
        flushes.append(called)
        for _ in steps(model, probe, data, Tensor.backward, 1):
            pass
    say(folder, flushes=flushes, rows=len(probe.frame()))


def plain(folder: Path, name: str) -> None:
    records(folder, name, lambda net: net)


def ddp(folder: Path, name: str) -> None:
    records(folder, name, nn.parallel.DistributedDataParallel)


def fsdp(folder: Path, name: str) -> None:
    records(folder, name, shard)


def measured(folder: Path, name: str) -> None:
    """Scheduled measurements beside DDP."""
    _, data = network(name)
    batch = ProbeBatch(data, sensitive=1)
    wrap = nn.parallel.DistributedDataParallel if dist.is_initialized() else lambda net: net
    records(folder, name, wrap, sensitivity_every=3, batch=batch)


def accelerated(folder: Path, name: str) -> None:
    """Through accelerate, which wraps model and optimizer."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, data = network(name)
    skips = find_skips(net, data[0][:1], data[1][:1])
    model = accelerator.prepare(net)
    with StabilityProbe(model, skips, **options(folder)) as probe:
        for _ in steps(model, probe, data, accelerator.backward, STEPS):
            pass
    say(folder, world=accelerator.num_processes)


def error_of(folder: Path, act: Callable[[], None]) -> None:
    started = time.perf_counter()
    error = None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            act()
        except StabilityProbeError as problem:
            error = str(problem)
    messages = [str(w.message) for w in seen if "StabilityProbe" in str(w.message)]
    say(folder, error=error, seconds=time.perf_counter() - started, warnings=messages)


def unsynchronised(folder: Path, name: str) -> None:
    """Gradients that are not averaged over the processes."""
    error_of(folder, lambda: plain(folder, name))


def taken(folder: Path, name: str) -> None:
    """A folder that holds a run already."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "run.json").write_text("{}")
    dist.barrier()
    error_of(folder, lambda: ddp(folder, name))


def uneven(folder: Path, name: str) -> None:
    """Process 1 makes one step more."""
    net, data = network(name)
    net.requires_grad_(False).requires_grad_(True)
    skips = find_skips(net, data[0][:1])
    zero = lambda loss: (0 * loss).backward()  # noqa: E731 (so that the gradients agree)

    def act() -> None:
        more = {"config": ProbeConfig(flush_every=50)}
        with StabilityProbe(net, skips, **options(folder, **more)) as probe:
            for _ in steps(net, probe, data, zero, 2 + rank()):
                pass

    error_of(folder, act)


def sharded_and_measured(folder: Path, name: str) -> None:
    error_of(folder, lambda: records(folder, name, shard, sensitivity_every=3))


def absent(folder: Path, name: str) -> None:
    """Only process 0 enters the block."""
    if rank() == 0:
        config = ProbeConfig(timeout=2.0)
        error_of(folder, lambda: records(folder, name, lambda net: net, config=config))
    else:
        time.sleep(4)


def lost(folder: Path, name: str, how: Callable[[], None]) -> None:
    """Process 1 stops at its third step; process 0 has nothing to wait for but the probe."""
    net, data = network(name)
    skips = find_skips(net, data[0][:1])
    zero = lambda loss: (0 * loss).backward()  # noqa: E731

    def act() -> None:
        config = ProbeConfig(flush_every=2, timeout=3.0)
        with StabilityProbe(net, skips, **options(folder, config=config)) as probe:
            for step in steps(net, probe, data, zero, 9):
                if rank() == 1 and step == 3:
                    how()

    error_of(folder, act)


def dies(folder: Path, name: str) -> None:
    lost(folder, name, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hangs(folder: Path, name: str) -> None:
    lost(folder, name, lambda: time.sleep(60))


def dies_in_training(folder: Path, name: str) -> None:
    """Process 1 dies in the middle of a DDP training."""
    net, data = network(name)
    skips = find_skips(net, data[0][:1])
    model = nn.parallel.DistributedDataParallel(net)
    with StabilityProbe(model, skips, **options(folder)) as probe:
        for step in steps(model, probe, data, Tensor.backward, 50):
            if rank() == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ and not scenarios[0].startswith("accelerated"):
        dist.init_process_group("gloo")
    for scenario in scenarios:
        name, _, net = scenario.partition(":")
        place = folder / scenario.replace(":", "-")
        place.mkdir(parents=True, exist_ok=True)
        globals()[name](place, net or "theory")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
