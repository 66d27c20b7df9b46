"""Where numbers go: tables on the terminal, CSV files, and the README's table."""

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
from rich.table import Table

Row = Mapping[str, str | float | int | None]
OUT = Path("bench-out")
"""Where the CSV files go."""


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def machine_line(on: Row) -> str:
    """The same in words.

    >>> machine_line({"cpu": "Z80", "cores": 1, "threads": 1, "torch": "2.13", "date": "today"})
    'Z80, 1 cores, 1 threads, torch 2.13, today'
    """
    return "{cpu}, {cores} cores, {threads} threads, torch {torch}, {date}".format_map(on)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, each with the machine at its end; what was there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    here = machine()
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *here])
        writer.writeheader()
        writer.writerows({**row, **here} for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows as they were written, every cell as text.

    Raises:
        FileNotFoundError: if nothing was measured yet.
    """
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def shown(title: str, rows: Sequence[Row], digits: Mapping[str, int], caption: str = "") -> Table:
    """A table with the rows' columns; numbers stand on the right.

    Args:
        title: above it.
        rows: cells by column; all of the same columns.
        digits: decimals of the columns that are no texts and no whole numbers.
        caption: below it.
    """
    table = Table(title=title, caption=caption or None, title_justify="left")
    for name in rows[0] if rows else ():
        texts = all(isinstance(row[name], str) for row in rows)
        table.add_column(name.replace("_", " "), justify="left" if texts else "right")
    for row in rows:
        table.add_row(*(cell(value, digits.get(name)) for name, value in row.items()))
    return table


def cell(value: str | float | int | None, digits: int | None) -> str:
    """A value as it is printed; what was not measured is a dash.

    >>> cell(1.23456, 2), cell(None, 2), cell(float("nan"), 2), cell("text", None), cell(7, None)
    ('1.23', '–', '–', 'text', '7')
    """
    if value is None or value != value:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) and digits is not None else str(value)


def verdict(value: float | None, goal: float | None) -> str:
    """Whether a goal is met, in words that stand out if it is not.

    >>> verdict(1.01, 1.02), verdict(1.03, 1.02), verdict(None, 1.02), verdict(5.0, None)
    ('met', 'MISSED', 'not measured', '')
    """
    if goal is None:
        return ""
    if value is None or value != value:
        return "not measured"
    return "met" if value <= goal else "MISSED"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The README's table: a line a variant, a column a workload, median ± standard error.

    Args:
        rows: what `overhead.csv` holds.

    >>> print(markdown([{"workload": "net", "variant": "probe", "median": "1.014",
    ...                  "standard_error": "0.002", "note": ""}]))
    | a step, over the bare step | net |
    |---|---|
    | probe | 1.014 ± .002 |
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(row["variant"], row["workload"]): _spread(row) for row in rows}
    lines = [["a step, over the bare step", *workloads]]
    lines += [[v, *(cells.get((v, w), "–") for w in workloads)] for v in variants]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * (len(workloads) + 1), *text[1:]])


def _spread(row: Mapping[str, str]) -> str:
    """Median ± standard error, with as many digits as they deserve."""
    if not row["median"] or row["median"] == "nan":
        return row["note"] or "–"
    median, error = float(row["median"]), float(row["standard_error"])
    digits = 3 if median < 1.5 else 2
    spread = "" if error != error else f" ± {f'{error:.{digits}f}'.removeprefix('0')}"
    return f"{median:.{digits}f}{spread}" + (f" ({row['note']})" if row["note"] else "")
