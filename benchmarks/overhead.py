"""What watching a training step costs: the probe and its peers against the bare step.

    python -m benchmarks.overhead [--pairs N] [--only WORD] [--markdown]

Two twins of a network take steps in turn, one watched and one not (`paired`); halfway they change
places, so that what one has over the other by chance cancels. TorchLens's twin is in a process of
its own. A row whose package is not installed says so. Rows are written to `bench-out/overhead.csv`
as they come, and `--markdown` prints the README's table from that file.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.contention import DISTURBED, Meter, rule
from benchmarks.paired import Pair, Plan, Summary, interleave, ratios
from benchmarks.remote import remote_step
from benchmarks.report import (
    OUT,
    Row,
    cell,
    machine,
    machine_line,
    markdown,
    read_csv,
    shown,
    verdict,
    write_csv,
)
from benchmarks.twins import WORKLOADS, Workload, limit_threads
from benchmarks.variants import VARIANTS, Variant

PAIRS, FEWEST = 200, 2
"""Pairs of steps for the probe's rows: each half of them holds two flushes; and the fewest."""
CSV = "overhead.csv"
DIGITS = dict.fromkeys(("least", "median", "largest", "standard_error", "mean"), 3)


def plan_of(steps: int, period: int) -> Plan:
    """Half of a row's pairs.

    >>> plan_of(200, 1), plan_of(200, 10)
    (Plan(pairs=100, block=1, warmup=10), Plan(pairs=10, block=10, warmup=10))
    """
    pairs = max(steps // 2 // period, FEWEST)
    return Plan(pairs, period, warmup=10 if steps >= 100 else 3)


def measure(workload: Workload, variant: Variant, steps: int, folder: Path) -> list[Pair]:
    """Pairs of a plain and a watched twin."""
    meter = Meter()
    if variant.apart:
        plain = workload.twin()
        with remote_step(workload, variant.name, folder) as step:
            return interleave(plain.step, step, plan_of(2 * steps, 1), meter)
    one, other = workload.twin(), workload.twin()
    pairs = []
    for half, (plain, watched) in enumerate(((one, other), (other, one))):
        with variant.attach(watched, folder / str(half)) as period:
            pairs += interleave(plain.step, watched.step, plan_of(steps, period), meter)
    return pairs


def row(workload: Workload, variant: Variant, pairs: Sequence[Pair]) -> Row:
    """A line of the table; without pairs it says what is missing."""
    found = ratios(pairs) if pairs else None
    numbers = asdict(found) if found else {}
    return {
        "workload": workload.name,
        "variant": variant.name,
        **{name: numbers.get(name) for name in ("least", "median", "largest")},
        "standard_error": numbers.get("error"),
        "mean": numbers.get("mean"),
        "steps_a_pair": pairs[0].steps if pairs else None,
        "kept": numbers.get("kept"),
        "dropped": numbers.get("dropped"),
        "goal": variant.goal,
        "verdict": verdict(numbers.get("median"), variant.goal),
        "note": note(variant, found),
    }


def note(variant: Variant, found: Summary | None) -> str:
    """What a reader of the numbers has to know."""
    if found is None:
        return f"{variant.needs} is not installed"
    return DISTURBED if found.disturbed else ""


def measured(workload: Workload, variant: Variant, pairs: int) -> Row:
    """Measure one row."""
    if not variant.installed:
        return row(workload, variant, [])
    steps = max(round(pairs * variant.share), 2 * FEWEST)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return row(workload, variant, measure(workload, variant, steps, Path(folder)))


def tables(console: Console, rows: Sequence[Row]) -> None:
    """Print a table a workload, and which goals are met."""
    for name in dict.fromkeys(str(r["workload"]) for r in rows):
        columns = [c for c in rows[0] if c not in ("workload", "goal")]
        mine = [{c: r[c] for c in columns} for r in rows if r["workload"] == name]
        console.print(shown(f"{name}: a watched step over a bare one", mine, DIGITS))
    console.print(f"mean: of all steps, those that store to disk included. {rule()}")
    for r in rows:
        if r["goal"] is not None:
            goal = f"median {cell(r['median'], 3)}, goal at most {r['goal']}: {r['verdict']}"
            console.print(f"{r['workload']}: {r['variant']}: {goal} {r['note']}", markup=False)
    console.print(machine_line(machine()))


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description="Cost of a step")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of steps, for the probe's rows")
    parser.add_argument("--only", default="", help="variants with this word in their name")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the CSV file")
    parser.add_argument(
        "--markdown", action="store_true", help="print the README's table of the last run"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, or print what was measured."""
    chosen, console = options(arguments), Console(width=150)
    if chosen.markdown:
        before = read_csv(chosen.out / CSV)
        print(f"{markdown(before)}\n\n{machine_line(before[0])}")
        return
    limit_threads()
    rows: list[Row] = []
    for workload in WORKLOADS:
        for variant in VARIANTS:
            if chosen.only in variant.name:
                rows.append(measured(workload, variant, chosen.pairs))
                write_csv(chosen.out / CSV, rows)
                median = cell(rows[-1]["median"], 3)
                console.print(f"{workload.name}: {variant.name}: {median}", markup=False)
    tables(console, rows)


if __name__ == "__main__":
    main()
