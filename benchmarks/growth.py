"""How the probe's cost of a recorded step grows with the network, the batch and the ranks.

    python -m benchmarks.growth [--seconds S] [--only WORD]

One size is varied at a time, on small networks. A pair is a few steps of each side (`paired`),
every step of the watched one recorded into a run folder; the median pair holds no flush, the mean
of all holds some. Ranks are processes of `torchrun` (`benchmarks.ranks`), where every pair holds
one flush.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.contention import DISTURBED, Meter, Taken, rule
from benchmarks.paired import Pair, Plan, additions, interleave, plain_seconds, ratios
from benchmarks.report import OUT, Row, machine, machine_line, shown, write_csv
from benchmarks.twins import Twin, batch, limit_threads
from benchmarks.variants import every_step
from stability_probe import TheoryUNet, UViT, UViTConfig

SECONDS = 6.0
"""For each size."""
BLOCK, BLOCK_SECONDS, FEWEST, MOST, WARMUP = 10, 0.3, 3, 20, 5
"""Steps of a side in a pair: at most, and roughly for how long; pairs in a half; steps dropped."""
RANKS = (1, 2)
DIGITS = dict.fromkeys(("bare_ms", "added_ms", "error_ms", "mean_added_ms"), 3) | {"ratio": 3}


class LayeredUNet(nn.Module):
    """Linear layers with GELU, spread over N encoder blocks, a middle one and N decoder blocks.

    Args:
        n_skips: N, long skips that are added where decoder blocks begin.
        layers: of all blocks together, at least 2N + 1.
        width: of every layer.
    """

    def __init__(self, n_skips: int, layers: int, width: int) -> None:
        super().__init__()
        blocks = 2 * n_skips + 1
        sizes = [layers // blocks + (place < layers % blocks) for place in range(blocks)]
        made = [_block(size, width) for size in sizes]
        self.encoder = nn.ModuleList(made[:n_skips])
        self.middle = made[n_skips]
        self.decoder = nn.ModuleList(made[n_skips + 1 :])

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The output; the noise level is not used."""
        kept = []
        for block in self.encoder:
            x = block(x)
            kept.append(x)
        x = self.middle(x)
        for block in self.decoder:
            x = block(x + kept.pop())
        return x


def _block(layers: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        *(part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU()))
    )


@dataclass(frozen=True)
class Case:
    """One size of a sweep, and how a twin of that size is made."""

    sweep: str
    size: int
    make: Callable[[], Twin]


def uvit(n_skips: int = 4, width: int = 64, samples: int = 16) -> Twin:
    """A U-ViT of 2N + 1 blocks on 8×8 images."""
    torch.manual_seed(0)
    config = UViTConfig(img_size=8, embed_dim=width, depth=2 * n_skips + 1)
    return Twin(UViT(config, torch.Generator().manual_seed(0)), *batch((samples, 1, 8, 8)))


def layered(n_skips: int, layers: int) -> Twin:
    """A `LayeredUNet` of width 128."""
    torch.manual_seed(0)
    return Twin(LayeredUNet(n_skips, layers, 128), *batch((64, 128)))


def theory(n_skips: int) -> Twin:
    """Eq. 4's network of width 128."""
    return Twin(TheoryUNet(128, n_skips, unit_gain=True), *batch((64, 128)))


def cases() -> Iterator[Case]:
    """All sweeps but that over ranks."""
    for n in (2, 4, 8, 16):
        yield Case("skips, and depth with them: U-ViT", n, partial(uvit, n_skips=n))
    for n in (2, 4, 8, 16):
        yield Case("skips, and depth with them: Eq. 4", n, partial(theory, n))
    for n in (2, 4, 8, 16):
        yield Case("skips alone: 33 layers", n, partial(layered, n, 33))
    for layers in (9, 18, 36, 72):
        yield Case("depth alone: layers, 4 skips", layers, partial(layered, 4, layers))
    for width in (16, 32, 64, 128):
        yield Case("width: U-ViT, 4 skips", width, partial(uvit, width=width))
    for samples in (2, 8, 32, 128):
        yield Case("batch: U-ViT, 4 skips", samples, partial(uvit, samples=samples))


def plan_of(step: float, seconds: float) -> Plan:
    """Half of the pairs that fill some seconds, given those of a bare step.

    >>> plan_of(0.01, 6.0), plan_of(0.3, 6.0)
    (Plan(pairs=15, block=10, warmup=5), Plan(pairs=5, block=1, warmup=5))
    """
    step = max(step, 1e-6)
    block = min(max(round(BLOCK_SECONDS / step), 1), BLOCK)
    pairs = round(seconds / 2 / (2 * block * step))
    return Plan(min(max(pairs, FEWEST), MOST), block, WARMUP)


def measure(case: Case, seconds: float) -> list[Pair]:
    """Pairs of a plain and a recorded twin, which change places halfway."""
    one, other = case.make(), case.make()
    plan = plan_of(min(one.step() for _ in range(3)), seconds)
    pairs = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for half, (plain, watched) in enumerate(((one, other), (other, one))):
            with every_step(watched, Path(folder) / str(half)):
                pairs += interleave(plain.step, watched.step, plan, Meter())
    return pairs


def row(sweep: str, size: int, pairs: Sequence[Pair], note: str = "") -> Row:
    """A line of the table; without pairs the note says why."""
    added = additions(pairs) if pairs else None
    return {
        "sweep": sweep,
        "size": size,
        "bare_ms": plain_seconds(pairs) * 1e3 if pairs else None,
        "added_ms": added.median * 1e3 if added else None,
        "error_ms": added.error * 1e3 if added else None,
        "mean_added_ms": added.mean * 1e3 if added else None,
        "ratio": ratios(pairs).median if pairs else None,
        "kept": added.kept if added else None,
        "dropped": added.dropped if added else None,
        "note": note or (DISTURBED if added and added.disturbed else ""),
    }


def ranks(processes: int, pairs: int) -> Row:
    """The row of some processes of `torchrun`, from what the first of them prints."""
    sweep = "ranks: U-ViT, 4 skips, gloo"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "--module", "benchmarks.ranks"]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        asked = [*command, "--folder", str(Path(folder) / "run"), "--pairs", str(pairs)]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return row(sweep, processes, [], f"failed: {reason(done.stderr)}")
    return row(sweep, processes, printed(done.stdout))


def printed(stdout: str) -> list[Pair]:
    """The pairs that `benchmarks.ranks` printed in its last line.

    >>> printed('hello\\n[{"plain": 1.0, "watched": 2.0, "steps": 50, "taken": null}]')
    [Pair(plain=1.0, watched=2.0, steps=50, taken=None)]
    """
    pairs = json.loads(stdout.strip().splitlines()[-1])
    return [Pair(**p | {"taken": p["taken"] and Taken(**p["taken"])}) for p in pairs]


def reason(stderr: str) -> str:
    """The line in which a traceback says what went wrong; `torchrun` prints more after it.

    >>> reason("[rank0]: Traceback (most recent call last):\\n[rank0]: ValueError: no\\nmore: text")
    'ValueError: no'
    """
    lines = [line.split("]: ", 1)[1] for line in stderr.splitlines() if line.startswith("[rank")]
    told = [line for line in lines if line and not line.startswith((" ", "Traceback"))]
    return (told or stderr.strip().splitlines()[-1:] or ["nothing was printed"])[0]


def grown(rows: Sequence[Row]) -> str:
    """How many times as much is added at the largest size of a sweep as at the smallest.

    >>> grown([{"size": 2, "added_ms": 1.0}, {"size": 8, "added_ms": 1.5}])
    'size × 4, added × 1.5'
    """
    first, last = rows[0], rows[-1]
    times = [_over(last[name], first[name]) for name in ("size", "added_ms")]
    return f"size × {times[0]}, added × {times[1]}"


def _over(last: str | float | int | None, first: str | float | int | None) -> str:
    if not isinstance(last, int | float) or not isinstance(first, int | float) or first <= 0:
        return "?"
    return f"{last / first:.3g}"


def tables(console: Console, rows: Sequence[Row]) -> None:
    """Print a table a sweep."""
    for sweep in dict.fromkeys(str(r["sweep"]) for r in rows):
        mine = [r for r in rows if r["sweep"] == sweep]
        cells = [{k: v for k, v in r.items() if k != "sweep"} for r in mine]
        console.print(shown(f"{sweep}, a recorded step", cells, DIGITS, grown(mine)))
    console.print(rule(), machine_line(machine()), sep="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description="Growth of the cost")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each size")
    parser.add_argument("--only", default="", help="sweeps with this word in their name")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the CSV file")
    chosen = parser.parse_args(arguments)
    limit_threads()
    console, rows = Console(width=150), []
    for case in cases():
        if chosen.only in case.sweep:
            rows.append(row(case.sweep, case.size, measure(case, chosen.seconds)))
            write_csv(chosen.out / "growth.csv", rows)
            console.print(f"{case.sweep}: {case.size}: done", markup=False)
    if chosen.only in "ranks":
        rows += [ranks(n, max(round(chosen.seconds), FEWEST)) for n in RANKS]
        write_csv(chosen.out / "growth.csv", rows)
    tables(console, rows)


if __name__ == "__main__":
    main()
