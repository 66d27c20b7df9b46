import pytest

from stability_probe.cli.console import print_costs, print_verdicts, progress
from stability_probe.regression import run_numbers
from stability_probe.runs import Run
from stability_probe.verify import Verdict


def verdict(**values):
    known = {"theorem": "3.4", "run": "cs:0.7", "claim": "a chain", "status": "HOLDS"}
    return Verdict(**{**known, **values})


def test_a_row_has_every_number(capsys):
    print_verdicts([
        verdict(measured=2.0, bound=8.0, statistic="share", estimate=0.5, interval=(0.25, 0.75),
                n=17)
    ])  # fmt: skip
    header, *_ = (out := capsys.readouterr().out).splitlines()
    for name in ("run", "measured", "bound", "slack", "[interval] level", "n", "verdict"):
        assert name in header
    (row,) = (line for line in out.splitlines() if line.startswith("cs:0.7"))
    assert row.split() == ["cs:0.7", "HOLDS", "2", "8", "4", "share:", "0.5", "[0.25,", "0.75]",
                           "17"]  # fmt: skip
    assert "HOLDS" in row[:42]  # however narrow the terminal is


def test_what_is_not_known_is_a_dash(capsys):
    print_verdicts([verdict(status="INCONCLUSIVE")])
    out = capsys.readouterr().out
    assert "INCONCLUSIVE              –          –          – –" in out


def test_claims_have_a_heading_each(capsys):
    print_verdicts([
        verdict(theorem="3.1", claim="one"), verdict(theorem="3.1", claim="one", run="b"),
        verdict(theorem="3.2", claim="two"), verdict(claim="three"),
    ])  # fmt: skip
    out = capsys.readouterr().out
    headings = [line for line in out.splitlines() if line.startswith(("Theorem", "Lemma"))]
    assert headings == ["Theorem 3.1: one", "Lemma 3.2: two", "Theorem 3.4: three"]


def test_advice_is_given_where_a_claim_does_not_hold(capsys):
    print_verdicts([
        verdict(advice="fine"), verdict(status="VIOLATED", advice="look at [κ]"),
        verdict(status="ASSUMPTION_UNMET", advice="train again"),
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "VIOLATED  3.4 cs:0.7: look at [κ]" in out
    assert "ASSUMPTION_UNMET  3.4 cs:0.7: train again" in out
    assert "fine" not in out


@pytest.mark.parametrize("run", ["a [bold]run[/bold]", "x" * 24])
def test_names_are_printed_as_they_are(capsys, run):
    print_verdicts([verdict(run=run)])
    assert any(line.startswith(f"{run} ") for line in capsys.readouterr().out.splitlines())


def test_no_verdicts(capsys):
    print_verdicts([])
    assert len(capsys.readouterr().out.splitlines()) == 2


def run_that_cost(path, **seconds):
    run = Run(path)
    run.begin({"probe": seconds} if seconds else {})
    return run


def test_costs_are_a_row_a_run_that_has_them(capsys, tmp_path):
    parts = {"hooks_s": 1.25, "step_s": 0.5, "flush_s": 0.25, "sensitivity_s": 3.0}
    run = run_that_cost(tmp_path / "cs", elapsed_s=105.0, overhead=0.02, **parts)
    print_costs([run, run_that_cost(tmp_path / "random-networks")])
    *_, header, row = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "run"
    assert row.split() == ["cs", "2.0%", "1.25", "0.5", "0.25", "3", "105"]


def test_costs_of_runs_of_one_name_are_a_row_each(capsys, tmp_path):
    parts = dict.fromkeys(("hooks_s", "step_s", "flush_s", "sensitivity_s", "elapsed_s"), 1.0)
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "cs"]
    print_costs([run_that_cost(folder, overhead=0.1, **parts) for folder in folders])
    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (first, second, third)] == ["a/run", "b/run", "cs"]


def test_a_cost_that_is_not_known_is_a_dash(capsys, tmp_path):
    run = run_that_cost(tmp_path / "run", hooks_s=0.25)
    print_costs([run])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["run", "–", "0.25", *"––––"]
    assert "probe_overhead" not in run_numbers(run)


def test_no_costs_are_no_table(capsys, tmp_path):
    print_costs([run_that_cost(tmp_path / "random-networks")])
    assert capsys.readouterr().out == ""


def test_progress_is_on_stderr(capsys):
    with progress() as display:
        task = display.add_task("training cs:0.7", total=4)
        display.advance(task, 4)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "training cs:0.7" in printed.err and "4/4" in printed.err and "left" in printed.err
