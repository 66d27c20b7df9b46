"""A run folder on disk."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stability_probe import Run, StabilityProbeError
from stability_probe.probes import COLUMNS
from stability_probe.runs import open_runs
from stability_probe.runs.run import SCHEMA, STATE_FILE, finite, short_names, write_json
from tests.oracles.runs import rows


def one_line(error):
    """The message of an error, which must be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


class TestLife:
    def test_making_one_touches_nothing(self, tmp_path):
        run = Run(tmp_path / "run")
        assert list(tmp_path.iterdir()) == []
        assert run.name == "run"

    def test_begin_writes_what_is_known(self, run):
        info = json.loads((run.path / "run.json").read_text())
        assert info == run.info
        assert info["schema"] == SCHEMA
        assert (info["state"], info["reason"]) == ("running", None)
        assert info["config"] == {"scheme": "cs:0.7", "seed": 3}
        assert info["skips"] == [{"level": 1}]
        versions = info["versions"]
        assert set(versions) == {
            "python", "stability_probe", "torch", "diffusers", "accelerate", "numpy",
        }  # fmt: skip
        assert versions["numpy"] == np.__version__
        assert (run.path / "records").is_dir()
        assert not (run.path / "figures").exists()  # before there is a figure

    def test_begin_writes_what_the_run_is_about(self, tmp_path):
        run = Run(tmp_path / "run", {"seed": 3}, {"kind": "training", "skips": None})
        run.about["kappa"] = [1.0]
        run.begin({"skips": [1]})
        info = run.info
        assert (info["kind"], info["kappa"], info["skips"]) == ("training", [1.0], [1])
        assert info["config"] == {"seed": 3}

    def test_records_are_the_parts_in_order(self, run):
        assert tuple(run.records().columns) == COLUMNS
        assert run.records().empty
        for step in range(1, 13):  # more than nine, so that names must sort as numbers do
            run.append(rows(step))
        frame = run.records()
        assert tuple(frame.columns) == COLUMNS
        assert frame.step.tolist() == [s for s in range(1, 13) for _ in range(2)]
        assert frame.index.tolist() == list(range(24))
        assert frame.metric.tolist()[:2] == ["loss", "energy"]
        expected = rows(*range(1, 13))
        pd.testing.assert_frame_equal(
            frame, expected, check_categorical=False, check_dtype=False, check_exact=True
        )

    def test_parts_with_other_categories_come_together(self, run):
        run.append(rows(1))
        run.append(rows(2).assign(metric="new", site="elsewhere", stat="t0"))
        frame = run.records()
        assert frame.metric.tolist() == ["loss", "energy", "new", "new"]
        assert frame.site.tolist()[2:] == ["elsewhere"] * 2
        assert not frame.isna().any(axis=None)
        assert set(frame.query("metric == 'new'").step) == {2}

    def test_values_survive_to_the_last_bit(self, run):
        values = [math.pi, float("nan"), float("inf"), 5e-324, -0.0, 1e308]
        run.append(rows(1, 2, 3).assign(value=values))
        assert np.array_equal(
            run.records().value.to_numpy().view("i8"), np.array(values).view("i8")
        )

    def test_end_and_update_keep_what_was_there(self, run):
        run.update({"kappa": [1.0, 0.7]})
        run.end("failed", "out of memory", {"probe": {"overhead": 0.1}})
        info = run.info
        assert (info["state"], info["reason"]) == ("failed", "out of memory")
        assert info["kappa"] == [1.0, 0.7]
        assert info["probe"] == {"overhead": 0.1}
        assert info["skips"] == [{"level": 1}]

    def test_opening_gives_the_same_run(self, run):
        run.append(rows(1, 2))
        run.end("complete", None, {})
        opened = Run.open(run.path)
        assert opened.config == {"scheme": "cs:0.7", "seed": 3}
        assert opened.info == run.info
        pd.testing.assert_frame_equal(opened.records(), run.records())
        assert Run.open(str(run.path)).path == run.path

    def test_an_opened_run_goes_on_where_it_stopped(self, run):
        run.append(rows(1))
        run.append(rows(2))
        (run.path / "records" / "part-000001.parquet").unlink()  # numbers are not counts
        opened = Run.open(run.path)
        opened.append(rows(3))
        opened.append(rows(4))
        assert Run.open(run.path).records().step.tolist() == [2, 2, 3, 3, 4, 4]


class TestRefusals:
    def test_an_existing_run_is_not_overwritten(self, run):
        run.append(rows(1))
        before = (run.path / "run.json").read_bytes()
        with pytest.raises(StabilityProbeError, match="holds a run already, which would be") as e:
            Run(run.path).begin({})
        assert str(run.path) in one_line(e)
        assert (run.path / "run.json").read_bytes() == before
        assert run.records().step.tolist() == [1, 1]

    def test_a_run_that_failed_with_no_record_gives_way(self, run):
        run.end("failed", "KeyError: 'loss'", {})
        (run.path / "notes.txt").write_text("mine")
        again = Run(run.path, {"seed": 4})
        again.begin({})
        assert (again.info["state"], again.info["config"]) == ("running", {"seed": 4})
        assert again.info["reason"] is None
        assert (run.path / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        "kept", ["records/part-000001.parquet", "records/part-000001.partial", STATE_FILE]
    )
    def test_whatever_a_run_that_failed_has_left_stays(self, run, kept):
        run.end("failed", "KeyError: 'loss'", {})
        (run.path / kept).write_bytes(b"PAR1")
        before = run.info
        with pytest.raises(StabilityProbeError, match="holds a run already, which would be lost"):
            Run(run.path).begin({})
        assert run.info == before
        assert (run.path / kept).read_bytes() == b"PAR1"

    @pytest.mark.parametrize("state", ["running", "complete", "", None])
    def test_only_one_that_failed_gives_way(self, run, state):
        run.update({"state": state})
        with pytest.raises(StabilityProbeError, match="holds a run already") as e:
            Run(run.path).begin({})
        assert ("may still be running" in one_line(e)) == (state == "running")

    def test_one_whose_run_json_is_damaged_does_not_give_way(self, run):
        (run.path / "run.json").write_text("{")
        with pytest.raises(StabilityProbeError, match="holds a run already, which would be lost"):
            Run(run.path).begin({})
        assert (run.path / "run.json").read_text() == "{"

    def test_records_without_a_run_json_are_not_overwritten(self, run):
        run.append(rows(1))
        (run.path / "run.json").unlink()
        with pytest.raises(StabilityProbeError, match="holds a run already"):
            Run(run.path).begin({})
        assert run.records().step.tolist() == [1, 1]

    def test_a_part_that_cannot_be_written_is_named_and_the_next_takes_its_place(self, run):
        run.append(rows(1))
        (run.path / "records" / "part-000002.partial").mkdir()
        with pytest.raises(StabilityProbeError, match="parquet: cannot be written") as e:
            run.append(rows(2))
        assert "part-000002" in one_line(e)
        (run.path / "records" / "part-000002.partial").rmdir()
        run.append(rows(3))
        assert run.records().step.tolist() == [1, 1, 3, 3]

    @pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.touch()])
    def test_what_is_not_a_run_folder_is_not_opened(self, tmp_path, make):
        make(tmp_path / "it")
        with pytest.raises(
            StabilityProbeError, match=r"not a run folder \(it has no run.json"
        ) as e:
            Run.open(tmp_path / "it")
        assert str(tmp_path / "it") in one_line(e)

    @pytest.mark.parametrize("text", ["", "{", '{"schema": 1', "\x00\x01", b"\xff\xfe{}"], ids=repr)
    def test_a_damaged_run_json_is_named(self, run, text):
        data = text if isinstance(text, bytes) else text.encode()
        (run.path / "run.json").write_bytes(data)
        for read in (lambda: Run.open(run.path), lambda: run.info):
            with pytest.raises(StabilityProbeError, match="json: cannot be read as JSON") as e:
                read()
            one_line(e)

    @pytest.mark.parametrize("text", ["[]", "3", "null", '"run"'])
    def test_a_run_json_that_is_no_object_is_named(self, run, text):
        (run.path / "run.json").write_text(text)
        with pytest.raises(StabilityProbeError, match="a JSON object is needed, got"):
            Run.open(run.path)

    @pytest.mark.parametrize("info", [
        {"state": 3}, {"kind": []}, {"reason": {}}, {"kappa": ["x"]}, {"kappa": [None]},
        {"kappa": 0.7}, {"skips": [{"source": 1}]}, {"skips": None}, {"noise_levels": ["x"]},
        {"parameters": "many"}, {"parameters": True}, {"input": [1]}, {"dtype": "int8"},
        {"dtype": []}, {"block_gain": "x"}, {"resumed": 3}, {"probe": {"hooks_s": None}},
        {"probe_settings": 3}, {"global_constants": {"lip_a": 1}}, {"config": None},
    ], ids=repr)  # fmt: skip
    def test_a_field_of_another_type_is_named(self, run, info):
        run.update(info)
        with pytest.raises(StabilityProbeError, match=r"run\.json: `") as e:
            Run.open(run.path)
        assert f"`{next(iter(info))}" in one_line(e) and "needed, got" in one_line(e)

    def test_what_is_not_known_may_be_null_and_what_is_new_may_be_anything(self, run):
        unknown = ("kappa", "noise_levels", "seed", "unmet", "input", "probing", "scheme")
        run.update({**dict.fromkeys(unknown), "mine": [{}], "probe": {}, "versions": {"mine": 3}})
        assert Run.open(run.path).info["mine"] == [{}]

    @pytest.mark.parametrize("schema", [0, SCHEMA + 1, None, "1"])
    def test_another_schema_is_refused(self, run, schema):
        run.update({"schema": schema})
        with pytest.raises(StabilityProbeError, match=f"has schema {schema!r} and this version"):
            Run.open(run.path)

    @pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "middle", "foreign"])
    def test_a_damaged_part_is_named(self, run, damage):
        for step in (1, 2, 3):
            run.append(rows(*range(step, step + 500), value=math.pi * step))
        part = run.path / "records" / "part-000002.parquet"
        data = part.read_bytes()
        foreign = io.BytesIO()
        pd.DataFrame({"other": [1]}).to_parquet(foreign)
        part.write_bytes({
            "empty": b"",
            "truncated": data[: len(data) // 2],
            "garbage": b"PAR1" + bytes(range(256)) + b"PAR1",
            "middle": data[:40] + b"\xff" * 400 + data[440:],
            "foreign": foreign.getvalue(),
        }[damage])  # fmt: skip
        with pytest.raises(StabilityProbeError, match="parquet: damaged") as e:
            run.records()
        assert f"{part}: damaged (" in one_line(e)
        assert "move it away to read the rest" in one_line(e)
        part.rename(part.with_suffix(".bad"))
        assert set(run.records().step) == {*range(1, 501), *range(3, 503)}

    def test_leftovers_of_unfinished_writes_are_ignored(self, run):
        run.append(rows(1))
        (run.path / "records" / "part-000002.partial").write_bytes(b"half a part")
        (run.path / "run.json.partial").write_text("{")
        assert Run.open(run.path).records().step.tolist() == [1, 1]
        run.append(rows(2))  # and do not stand in the way
        run.end("complete", None, {})
        assert Run.open(run.path).records().step.tolist() == [1, 1, 2, 2]
        assert sorted(p.name for p in run.path.rglob("*.partial")) == []

    def test_nothing_unfinished_is_left(self, run):
        run.append(rows(1))
        run.end("complete", None, {})
        assert sorted(p.relative_to(run.path).as_posix() for p in run.path.rglob("*")) == [
            "records", "records/part-000001.parquet", "run.json",
        ]  # fmt: skip

    @pytest.mark.parametrize("below", ["run", "a/b/run"])
    def test_a_path_below_a_file_cannot_be_written(self, tmp_path, below):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(
            StabilityProbeError, match=r"cannot be written \(.+\); choose anoth"
        ) as e:
            Run(tmp_path / "file" / below).begin({})
        assert str(tmp_path / "file") in one_line(e)
        with pytest.raises(StabilityProbeError, match="not a run folder"):
            Run.open(tmp_path / "file" / below)
        assert (tmp_path / "file").read_text() == "in the way"

    def test_a_path_that_is_a_file_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StabilityProbeError, match="cannot be written"):
            Run(tmp_path / "file").begin({})


class TestJson:
    def test_is_whole_readable_and_has_no_nan(self, run):
        value = {"slack": [1.5, float("nan")], "bound": float("-inf"), "κ": ("é", None, True)}
        run.write_json("verdicts.json", value)
        text = (run.path / "verdicts.json").read_text()
        strict = json.loads(text, parse_constant=pytest.fail)
        assert strict == {"slack": [1.5, None], "bound": None, "κ": ["é", None, True]}
        assert "κ" in text
        assert text.endswith("}\n")

    def test_folders_on_the_way_are_made(self, tmp_path):
        write_json(tmp_path / "a" / "b.json", [1])
        assert json.loads((tmp_path / "a" / "b.json").read_text()) == [1]

    def test_an_unwritable_file_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StabilityProbeError, match=r"below.json: cannot be written \("):
            write_json(tmp_path / "file" / "below.json", {})

    def test_a_failed_write_leaves_the_old_file(self, run):
        with pytest.raises(TypeError):
            run.write_json("run.json", {"state": object()})
        assert run.info["state"] == "running"

    @pytest.mark.parametrize("value", [1, "nan", True, None, 0.5, [], {}])
    def test_finite_values_are_themselves(self, value):
        assert finite(value) == value

    def test_nan_is_replaced_at_every_depth(self):
        nan, inf = float("nan"), float("inf")
        nested = {"a": [nan, {"b": (inf, 1.0)}], "c": "x"}
        assert finite(nested) == {"a": [None, {"b": [None, 1.0]}], "c": "x"}


class TestOpenRuns:
    @pytest.fixture
    def tree(self, tmp_path):
        for name in ("sweep/b", "sweep/a", "sweep/deep/er/c", "single"):
            Run(tmp_path / name, {"name": name}).begin({})
        (tmp_path / "sweep" / "notes.txt").touch()
        (tmp_path / "empty").mkdir()
        return tmp_path

    def names(self, *paths):
        return [run.config["name"] for run in open_runs(paths)]

    def test_a_run_is_itself_and_a_folder_is_the_runs_in_it(self, tree):
        assert self.names(tree / "single") == ["single"]
        assert self.names(tree / "sweep") == ["sweep/a", "sweep/b", "sweep/deep/er/c"]
        assert self.names(str(tree / "single"), tree / "sweep" / "deep") == [
            "single",
            "sweep/deep/er/c",
        ]
        assert self.names() == []

    def test_a_run_json_stands_for_its_folder(self, tree):
        assert self.names(tree / "single" / "run.json") == ["single"]
        with pytest.raises(StabilityProbeError, match="neither a run folder"):
            open_runs([tree / "empty" / "run.json"])

    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (["a/run"], ["run"]),
            (["a/run", "b/run", "b/cs"], ["a/run", "b/run", "cs"]),
            (["x/a/run", "y/a/run", "y/b/run"], ["x/a/run", "y/a/run", "b/run"]),
            (["run", "run/run"], [f"{Path.cwd().name}/run", "run/run"]),
        ],
    )
    def test_short_names_tell_folders_apart(self, paths, names):
        assert short_names([Path(path) for path in paths]) == names

    def test_a_folder_twice_has_no_name_of_its_own(self, tmp_path):
        assert short_names([tmp_path, tmp_path]) == [str(tmp_path)] * 2

    def test_each_run_comes_once(self, tree, monkeypatch):
        monkeypatch.chdir(tree)
        given = ["sweep/a", tree / "sweep", "sweep/../sweep/a", "sweep/a"]
        assert self.names(*given) == ["sweep/a", "sweep/b", "sweep/deep/er/c"]

    @pytest.mark.parametrize("name", ["empty", "missing", "sweep/notes.txt"])
    def test_a_path_with_no_run_is_refused(self, tree, name):
        with pytest.raises(StabilityProbeError, match="neither a run folder") as e:
            open_runs([tree / "single", tree / name])
        assert str(tree / name) in one_line(e)

    def test_a_damaged_run_among_them_is_refused(self, tree):
        (tree / "sweep" / "a" / "run.json").write_text("{")
        with pytest.raises(StabilityProbeError, match="cannot be read as JSON"):
            open_runs([tree / "sweep"])


TRAIN_FOREVER = """
import sys, torch
from stability_probe import Run, StabilityProbe, TheoryUNet, find_skips
from stability_probe.probes import ProbeConfig
torch.set_num_threads(1)
net, x = TheoryUNet(8, 2), torch.randn(4, 8)
options = dict(every=1, sensitivity_every=0, config=ProbeConfig(flush_every=2))
options["run"] = Run(sys.argv[1])
with StabilityProbe(net, find_skips(net, x), **options) as probe:
    step = 0
    while True:
        step += 1
        loss = net(x).square().mean(dim=1)
        loss.mean().backward()
        probe.step(loss=loss)
        net.zero_grad()
        print(step, flush=True)
"""


def test_a_killed_run_is_readable_up_to_its_last_part(tmp_path):
    path = tmp_path / "run"
    package = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN_FOREVER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=package,
    )
    try:
        for line in process.stdout:
            if int(line) >= 9:
                break
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    run = Run.open(path)
    assert (run.info["state"], run.info["reason"]) == ("running", None)
    frame = run.records()
    last = int(frame.step.max())
    assert last >= 7  # of at least 9 taken, at most one flush's worth may be lost
    assert sorted(frame.step.unique()) == list(range(1, last + 1))
    details = frame.metric.isin(["param_energy", "feature_grad_energy"])
    per_step = frame[~details].groupby("step").size()
    assert per_step.nunique() == 1  # no step is there in part
    assert not frame.duplicated(["step", "metric", "site", "level", "stat"]).any()
    parts = list((path / "records").glob("part-*.parquet"))
    assert sum(len(pd.read_parquet(part)) for part in parts) == len(frame)
    assert [r.path for r in open_runs([tmp_path])] == [path]
