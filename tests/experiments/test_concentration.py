import json
import runpy
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "concentration" / "run.py"


@pytest.mark.slow
def test_the_experiment_writes_what_its_readme_promises(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["--out", str(tmp_path / "deep" / "out"), "--networks", "1000", "--resamples", "200"])
    out = tmp_path / "deep" / "out"
    readme = (SCRIPT.parent / "README.md").read_text()
    names = {path.name for path in out.iterdir()}
    assert names == {
        "coverage.csv", "slopes.csv", "by_rho.csv", "verdicts.json", "concentration.png",
    }  # fmt: skip
    assert all(f"`{name}`" in readme for name in names)
    verdicts = json.loads((out / "verdicts.json").read_text())
    assert [verdict["run"] for verdict in verdicts] == ["h_0..h_N"] * 2 + ["h_0 alone"] * 2
    assert verdicts[0]["status"] == "HOLDS"
    assert verdicts[1]["status"] == "VIOLATED"
    slopes = pd.read_csv(out / "slopes.csv")
    assert list(slopes.n_skips) == [1, 2, 4, 8, 16]
    assert (slopes.upper_side < slopes.lower_side).all()
    table = pd.read_csv(out / "coverage.csv")
    assert len(table) == 6 * 5 * 13 * 2 * 3
    assert (table.networks == 1000).all()
    printed = capsys.readouterr().out
    assert "HOLDS: h_0..h_N:" in printed
    assert "slope_times_blocks" in printed


def test_bad_input_is_one_line_and_nothing_is_overwritten(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "coverage.csv").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        (["--out", "new", "--networks", "0"], "--networks: needs at least 500, got 0"),
        (["--out", "new", "--resamples", "1"], "--resamples: needs at least 200, got 1"),
        (["--out", "taken"], "is there already"),
        (["--out", "file"], "is there already"),
        (["--out", "file/below"], "cannot be made"),
    ):
        arguments[1] = str(tmp_path / arguments[1])
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "taken" / "coverage.csv").read_text() == "mine"
    assert not (tmp_path / "new").exists()
