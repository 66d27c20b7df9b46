"""What the probe adds to a step of distributed training; run by `torchrun`.

    torchrun --nproc-per-node 2 --module benchmarks.ranks --folder FOLDER [--pairs N]

Every rank trains two `DistributedDataParallel` twins in turn, and the probe watches the inner
module of one of them. A pair is as many steps as the probe keeps before it stores them. The first
rank prints the pairs as JSON: seconds of the bare steps, of the recorded steps, and steps.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contention import Meter
from benchmarks.paired import Plan, interleave
from benchmarks.twins import Twin, batch, limit_threads
from benchmarks.variants import probed
from stability_probe import UViT, UViTConfig
from stability_probe.probes import ProbeConfig


def twin(rank: int) -> Twin:
    """The same network on every rank, each with a batch of its own."""
    config = UViTConfig(img_size=8, embed_dim=64, depth=9)
    inner = UViT(config, torch.Generator().manual_seed(0))
    x, t = batch((16, 1, 8, 8), seed=rank)
    return Twin(inner, x, t, DistributedDataParallel(inner))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print on the first rank."""
    parser = argparse.ArgumentParser(prog="benchmarks.ranks", description="Cost with several ranks")
    parser.add_argument("--folder", type=Path, required=True, help="the run folder")
    parser.add_argument("--pairs", type=int, default=8)
    chosen = parser.parse_args(arguments)
    limit_threads()
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        plain, watched = twin(rank), twin(rank)
        plan = Plan(chosen.pairs, ProbeConfig().flush_every, warmup=10)
        with probed(watched, chosen.folder, every=1, sensitivity_every=0):
            pairs = interleave(plain.step, watched.step, plan, Meter(os.getppid()))
        if rank == 0:
            print(json.dumps([asdict(pair) for pair in pairs]))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
