import io

import pytest
from rich.console import Console

from benchmarks.report import machine, machine_line, markdown, read_csv, shown, verdict, write_csv

ROWS = [
    {"workload": "one", "variant": "probe", "median": 1.0144, "standard_error": 0.002, "note": ""},
    {"workload": "one", "variant": "peer", "median": None, "standard_error": None,
     "note": "peer is not installed"},
    {"workload": "two", "variant": "probe", "median": 4.567, "standard_error": 0.123, "note": ""},
]  # fmt: skip


def test_a_csv_file_says_what_it_was_measured_on(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_csv(path, ROWS)
    write_csv(path, ROWS)
    found = read_csv(path)
    assert len(found) == len(ROWS)
    assert list(found[0]) == [*ROWS[0], "cpu", "cores", "threads", "torch", "date"]
    assert found[0]["median"] == "1.0144"
    assert found[1]["median"] == ""
    assert found[2]["cpu"] == machine()["cpu"]
    assert machine_line(found[0]) == machine_line(machine())


def test_the_readme_table_comes_from_the_csv_file(tmp_path):
    write_csv(tmp_path / "rows.csv", ROWS)
    lines = markdown(read_csv(tmp_path / "rows.csv")).splitlines()
    assert lines == [
        "| a step, over the bare step | one | two |",
        "|---|---|---|",
        "| probe | 1.014 ± .002 | 4.57 ± .12 |",
        "| peer | peer is not installed | – |",
    ]


def test_the_readme_table_says_what_is_doubtful():
    row = {"workload": "one", "variant": "probe", "median": "2.0", "standard_error": "nan"}
    line = markdown([{**row, "note": "disturbed"}]).splitlines()[-1]
    assert line == "| probe | 2.00 (disturbed) |"


def test_a_table_has_the_columns_of_its_rows():
    console = Console(file=io.StringIO(), width=120)
    console.print(shown("title", ROWS, {"median": 2}, "caption"))
    printed = console.file.getvalue()
    assert "standard error" in printed
    assert "1.01" in printed and "1.0144" not in printed
    assert "peer is not installed" in printed and "–" in printed
    assert printed.startswith("title") and "caption" in printed


@pytest.mark.parametrize(
    ("value", "goal", "said"),
    [(1.02, 1.02, "met"), (1.021, 1.02, "MISSED"), (float("nan"), 1.02, "not measured")],
)
def test_a_missed_goal_is_said(value, goal, said):
    assert verdict(value, goal) == said
