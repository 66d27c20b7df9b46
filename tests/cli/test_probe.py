"""`skips` and `probe`, from the files that people have to verdicts and figures."""

import json
import pickle
import shlex
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file
from torch import nn

from stability_probe import LearnableScaling, Run, UViT, UViTConfig, find_skips, scale_skips
from stability_probe.checkpoints.noise import load_schedule
from stability_probe.cli.options import SubjectOptions
from stability_probe.cli.points import PointOptions, points_of
from stability_probe.cli.probe import mean_over_levels
from stability_probe.cli.subject import open_subject
from stability_probe.runs.commands import command_of
from tests.checkpoints.mutations import damaged, damages
from tests.checkpoints.saved_files import (
    FACTORY,
    Canary,
    conv_unet,
    diffusers_unet,
    every_format,
    files_of,
    save_export,
    save_legacy,
    save_tar,
)

SIZES = {"measured", "exact", "pathwise", "blockwise", "paper"}
FEW = ("--batch", 4, "--sensitive", 1)
QUICK = (*FEW, "--noise-levels", "500")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of every format: name -> (path, options)."""
    folder = tmp_path_factory.mktemp("saved")
    diffusers_unet().save_pretrained(folder / "unet")
    torch.save(UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2)).state_dict(), folder / "u.pth")
    save_file(conv_unet().state_dict(), folder / "net.safetensors")
    return {
        "diffusers": (folder / "unet", ()),
        "U-ViT": (folder / "u.pth", ("--model-args", '{"num_heads": 2}')),
        "safetensors": (folder / "net.safetensors", ("--model", FACTORY, "--input", "1,8,8")),
        "export": (save_export(folder), ("--trust-pickle",)),
    }


formats = pytest.mark.parametrize("name", ["diffusers", "U-ViT", "safetensors", "export"])


class TestSkips:
    @formats
    def test_a_table(self, cli, saved, name):
        path, options = saved[name]
        result = cli("skips", path, *options)
        assert result.code == 0
        head, *rows = result.out.splitlines()
        assert head.split()[:5] == ["level", "source", "sink", "merge", "shape"]
        assert len(rows) == {"diffusers": 4, "U-ViT": 2}.get(name, 1)
        assert all("concat" in row for row in rows)

    @formats
    def test_json(self, cli, saved, name):
        path, options = saved[name]
        found = json.loads(cli("skips", path, *options, "--json").out)
        assert [s["level"] for s in found] == list(range(1, len(found) + 1))
        assert set(found[0]) == {"level", "source", "sink", "merge", "shape", "kappa"}
        assert {s["kappa"] for s in found} == {1.0}

    def test_by_hand(self, cli, saved):
        result = cli("skips", saved["diffusers"][0], "--skips", "conv_in=up_blocks.1.*", "--json")
        assert [s["source"] for s in json.loads(result.out)] == ["conv_in"]

    def test_none(self, cli, tmp_path):
        save_file(nn.Linear(3, 3).state_dict(), tmp_path / "l.safetensors")
        options = ("--model", "torch.nn:Linear", "--model-args",
                   '{"in_features": 3, "out_features": 3}', "--input", "3")  # fmt: skip
        assert cli("skips", tmp_path / "l.safetensors", *options, "--json").out == "[]\n"
        result = cli("skips", tmp_path / "l.safetensors", *options)
        assert (result.code, result.out) == (0, "no long skips (N = 0)\n")

    def test_the_help_says_that_a_factory_is_run(self, cli):
        text = " ".join(cli("skips", "--help").out.split())
        assert "Importing and calling it runs that code" in text
        assert "even if that runs code from it" in text


class TestProbe:
    @formats
    def test_one_command(self, cli, saved, name, tmp_path):
        path, options = saved[name]
        levels = QUICK[4:] if name in ("diffusers", "U-ViT") else ()
        result = cli("probe", path, *options, *FEW, *levels, "-o", tmp_path / "run", "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert {"skips", "sensitivity", "verdicts", "figures"} <= set(found)
        sizes = found["sensitivity"]
        chain = [sizes[k] for k in ("measured", "exact", "pathwise", "blockwise", "paper")]
        assert all(low <= high * 1.01 for low, high in pairwise(chain))
        assert len(sizes["paths"]) == len(found["skips"])
        total = sum(sizes["paths"]) + sizes["middle"] + sizes["around"]
        assert total == pytest.approx(sizes["pathwise"])
        assert sizes["gap"] < 1e-4
        claims = [(v["theorem"], v["status"]) for v in found["verdicts"]]
        assert [theorem for theorem, _ in claims] == ["3.1", "3.1", "3.3", "3.3", "3.4"]
        assert claims[-1] == ("3.4", "HOLDS")
        run = Run.open(tmp_path / "run")
        assert (run.info["kind"], run.info["state"]) == ("checkpoint", "complete")
        assert json.loads((run.path / "verdicts.json").read_text()) == found["verdicts"]
        drawn = {file.stem for file in (run.path / "figures").iterdir()}
        assert drawn == {"hierarchy", "paths", "blame", "energies", "counterfactual"}
        assert sorted(found["figures"]) == sorted(map(str, (run.path / "figures").iterdir()))

    def test_for_people(self, cli, saved, tmp_path):
        result = cli("probe", saved["diffusers"][0], *QUICK, "-o", tmp_path / "run")
        assert result.code == 0
        for text in ("conv_in", "path by path", "skip 4", "middle", "Theorem 3.4", "figure: "):
            assert text in result.out
        assert "note: scaling: as found, none is added" in result.err
        assert "Gaussian noise" in result.err and "500; noise schedule of DDPM" in result.err

    @pytest.mark.slow
    def test_noise_levels_target_and_seed(self, cli, saved, tmp_path):
        options = ("--batch", 2, "--sensitive", 1, "--noise-levels", "10,900", "--target",
                   "epsilon", "--seed", 4)  # fmt: skip
        result = cli("probe", saved["diffusers"][0], *options, "-o", tmp_path / "a", "--json")
        rows = json.loads(result.out)["sensitivity"]["by_noise_level"]
        assert [row["noise_level"] for row in rows] == [10.0, 900.0]
        run = Run.open(tmp_path / "a")
        records = run.records()
        assert {"sample_loss", "sample_grad_energy"} <= set(records.metric)
        # and the command that the run says it was made by makes it again
        assert cli(*shlex.split(command_of(run.info, str(tmp_path / "b")))[1:]).code == 0
        again = Run.open(tmp_path / "b")
        assert again.records().equals(records) and again.info["config"] == run.info["config"]

    def test_one_sample(self, cli, saved, tmp_path):
        options = ("--batch", 1, "--sensitive", 1, "--noise-levels", "500", "--target", "sample")
        result = cli("probe", saved["diffusers"][0], *options, "-o", tmp_path / "run", "--json")
        assert result.code == 0, result.err
        statuses = [v["status"] for v in json.loads(result.out)["verdicts"]]
        assert statuses == ["INCONCLUSIVE"] * 4 + ["HOLDS"]

    def test_a_scheme(self, cli, saved, tmp_path):
        out = tmp_path / "run"
        path = saved["diffusers"][0]
        assert cli("probe", path, *QUICK, "--scheme", "cs:0.5", "-o", out).code == 0
        info = Run.open(out).info
        assert (info["scheme"], info["kappa"]) == ("cs:0.5", [1.0, 0.5, 0.25, 0.125])

    def test_learned_gates_in_the_checkpoint_are_applied(self, cli, tmp_path):
        net = UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2))
        x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
        with scale_skips(net, find_skips(net, x, t), LearnableScaling()):
            torch.save(net.state_dict(), tmp_path / "ls.pth")
        options = ("--model-args", '{"num_heads": 2}', *QUICK, "-o", tmp_path / "run")
        assert cli("probe", tmp_path / "ls.pth", *options).code == 0
        run = Run.open(tmp_path / "run")
        assert (run.info["scheme"], run.info["kappa"]) == ("ls", None)
        gains = run.records().query("metric == 'sample_kappa'").value
        assert gains.between(0.3, 0.7).all()

    def test_samples_from_a_file(self, cli, saved, tmp_path):
        x = np.full((3, 1, 8, 8), 0.5, np.float32)
        np.save(tmp_path / "x.npy", x)
        options = ("--input", tmp_path / "x.npy", "--noise-levels", "0", "--sensitive", 1)
        result = cli("probe", saved["diffusers"][0], *options, "-o", tmp_path / "run")
        assert result.code == 0
        assert "3 samples of" in result.err
        energies = Run.open(tmp_path / "run").records().query(
            "metric == 'sample_energy' and site == 'x'"
        )  # fmt: skip
        assert energies.value.tolist() == pytest.approx([16.0] * 3, rel=0.1)  # 64 pixels of .25

    def test_weights_that_are_not_numbers(self, cli, tmp_path):
        state = conv_unet().state_dict()
        state["down.weight"][0, 0] = torch.nan
        save_file(state, tmp_path / "nan.safetensors")
        options = ("--model", FACTORY, "--input", "1,8,8", "--batch", 4, "--sensitive", 1)
        result = cli(
            "probe", tmp_path / "nan.safetensors", *options, "-o", tmp_path / "r", "--json"
        )
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert found["sensitivity"]["exact"] is None
        assert {v["status"] for v in found["verdicts"]} <= {"ASSUMPTION_UNMET", "INCONCLUSIVE"}

    def test_train_and_then_probe(self, cli, tmp_path):
        made = ("train", "--scheme", "ls", "--steps", 2, "--width", 16, "--n-skips", 2,
                "--batch-size", 4, "--sensitivity-every", 0, "--out", tmp_path / "trained",
                "--weights", tmp_path / "w" / "ls.pth")  # fmt: skip
        assert cli(*made).code == 0
        options = ("--model-args", '{"num_heads": 4}', *QUICK, "-o", tmp_path / "probed")
        result = cli("probe", tmp_path / "w" / "ls.pth", *options)
        assert result.code == 0, result.err
        assert cli("verify", tmp_path / "probed").code == 0
        assert cli("plot", tmp_path / "probed").code == 0


def test_every_point_has_its_noise_level_and_its_noise(saved, tmp_path):
    subject = open_subject(SubjectOptions(saved["diffusers"][0], batch=3))
    schedule = load_schedule(tmp_path)
    how = PointOptions("10,900", "epsilon")
    points, notes = points_of(subject, schedule, how)
    for point, t in zip(points, (10, 900), strict=True):
        assert point.noise_level == t
        assert point.batch.kwargs["timestep"].tolist() == [t] * 3
        alpha, sigma = schedule.alpha_sigma(t, unit=False)
        expected = alpha * subject.inputs.args[0] + sigma * point.batch.target
        torch.testing.assert_close(point.batch.x, expected)
    assert any(line.startswith("timestep: 10, 900; noise schedule of DDPM") for line in notes)


def test_means_over_noise_levels():
    rows = [
        {"exact": 1.0, "pathwise": None, "paths": [1.0, 2.0], "gap": 0.1},
        {"exact": 3.0, "pathwise": None, "paths": [3.0, 2.0], "gap": 0.3},
    ]
    assert mean_over_levels(rows) == {
        "exact": 2.0, "pathwise": None, "paths": [2.0, 2.0], "gap": 0.3,
    }  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--noise-levels", "5000"), "noise level 5000: must lie in 0..999"),
            (("--noise-levels", "a"), "must be numbers with commas"),
            (("--target", "noise"), "must be one of epsilon, sample, v_prediction"),
            (("--scheme", "best"), "unknown scheme 'best'"),
            (("--sensitive", "0"), "--sensitive: must be at least 1"),
            (("--batch", "0"), "--batch: must be at least 1"),
            (("--input", "1,8,8,8"), "UNet2DModel fails on an input of shape"),
            (("--model", "no.such:thing"), "cannot be imported"),
            (("--weights", "ema"), "weights='ema' is not in it"),
        ],
    )
    def test_options(self, cli, saved, tmp_path, options, message):
        result = cli("probe", saved["diffusers"][0], *options, "-o", tmp_path / "run")
        assert result.code == 2
        (line,) = [text for text in result.complaints if not text.startswith("note:")]
        assert line.startswith("error: ") and message in line
        assert result.out == ""

    def test_nothing_recorded_is_lost(self, cli, refused, saved, tmp_path, contents):
        path = saved["safetensors"][0]
        options = (*saved["safetensors"][1], "--batch", 4, "--sensitive", 1)
        assert cli("probe", path, *options, "-o", tmp_path / "run").code == 0
        before = contents(tmp_path)
        assert "holds a run already" in refused("probe", path, *options, "-o", tmp_path / "run")
        assert contents(tmp_path) == before

    def test_a_network_without_skips(self, refused, tmp_path):
        save_file(nn.Linear(3, 3).state_dict(), tmp_path / "l.safetensors")
        args = '{"in_features": 3, "out_features": 3}'
        line = refused("probe", tmp_path / "l.safetensors", "--model", "torch.nn:Linear",
                       "--model-args", args, "--input", "3", "-o", tmp_path / "run")  # fmt: skip
        assert "Linear has no long skips (N = 0)" in line
        assert not (tmp_path / "run").exists()

    def test_a_network_that_takes_no_noise_level(self, refused, saved, tmp_path):
        path, options = saved["safetensors"]
        line = refused("probe", path, *options, "--target", "epsilon", "-o", tmp_path / "run")
        assert "takes no noise level, so there is none to predict" in line
        line = refused("probe", path, *options, "--noise-levels", "5", "-o", tmp_path / "run")
        assert "this network takes no noise level" in line

    def test_a_network_that_cannot_be_measured(self, cli, tmp_path):
        torch.save(conv_unet().state_dict(), tmp_path / "net.pt")
        options = ("--model", "tests.cli.test_probe:OnceDifferentiable", "--input", "1,8,8")
        result = cli("probe", tmp_path / "net.pt", *options, "-o", tmp_path / "run")
        assert result.code == 2
        (line,) = [t for t in result.complaints if t.startswith("error: ")]
        assert "cannot be measured" in line and "Traceback" not in result.err
        assert Run.open(tmp_path / "run").info["state"] == "failed"


class Once(torch.autograd.Function):
    """The identity, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.clone()


def OnceDifferentiable():
    net = conv_unet()
    net.down.register_forward_hook(lambda module, args, out: Once.apply(out))
    return net


# ── hostile input ────────────────────────────────────────────────────────────────────────────────


class TestHostileInput:
    @pytest.mark.parametrize("command", ["skips", "probe"])
    @pytest.mark.parametrize("save", ["zip", "legacy", "tar", "plain"])
    def test_code_in_a_pickle_does_not_run_unless_trusted(
        self, cli, refused, tmp_path, save, command
    ):
        canary, file = tmp_path / "canary", tmp_path / "evil.pt"
        held = {"state_dict": conv_unet().state_dict(), "evil": Canary(canary)}
        {
            "zip": torch.save, "legacy": save_legacy, "tar": save_tar,
            "plain": lambda saved, path: path.write_bytes(pickle.dumps(saved)),
        }[save](held, file)  # fmt: skip
        out = ("-o", tmp_path / "run") if command == "probe" else ()
        options = (file, "--model", FACTORY, "--input", "1,8,8", *out)
        line = refused(command, *options)
        assert "--trust-pickle" in line or save == "plain"
        assert not canary.exists()
        if save == "zip":
            result = cli(command, *options, "--trust-pickle", *(FEW if out else ()))
            assert result.code == 0
            assert "warning: " in result.err and "runs code from the file" in result.err
            assert canary.exists()


@pytest.fixture(scope="module")
def all_formats(tmp_path_factory):
    return every_format(tmp_path_factory.mktemp("formats"))


@pytest.mark.parametrize("name", ["diffusers", "bin", "safetensors", "torch", "legacy", "uvit",
                                  "export"])  # fmt: skip
@settings(
    max_examples=30, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(damage=damages)
def test_damaged_files_end_in_one_line_and_exit_code_2(cli, all_formats, name, damage):
    """Or, where a format has no checksum, in a network that loads: 7 × 30 mutations."""
    path, options = all_formats[name]
    words = ("--model", options["factory"], "--input", "1,8,8") if "factory" in options else ()
    words += ("--trust-pickle",) if "trust_pickle" in options else ()
    files = [f for f in files_of(path) if f.suffix != ".json"] or files_of(path)
    with damaged(files[0], damage):
        result = cli("skips", path, *words, "--json")
    errors = [line for line in result.complaints if line.startswith("error: ")]
    assert result.code in (0, 2) and len(errors) == (result.code == 2), result
    assert "Traceback" not in result.err
    if result.code == 0:
        assert isinstance(json.loads(result.out), list)
