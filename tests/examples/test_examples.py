"""The examples run as scripts, and train what they would train without the probe."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stability_probe import Run, verify
from tests.oracles.curves import tensorboard_curves

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = {
    "train_diffusers": lambda out: load_file(
        out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    ),
    "train_lightning": lambda out: torch.load(out / "last.ckpt", weights_only=True)["state_dict"],
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def script(monkeypatch):
    """Run an example with options."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


@pytest.mark.parametrize("name", WEIGHTS)
def test_records_verdicts_and_the_same_weights(script, tmp_path, name, capsys):
    options = ("--steps", 3, "--batch-size", 4)
    script(name, "--out", tmp_path / "probed", *options)
    assert f"run: {tmp_path / 'probed' / 'run'}" in capsys.readouterr().out
    run = Run.open(tmp_path / "probed" / "run")
    frame = run.records()
    assert run.info["state"] == "complete"
    assert set(frame[frame.metric == "energy"].step) == {1, 2, 3}
    assert len(run.info["skips"]) == 4
    verdicts = verify(run)
    assert {v.theorem for v in verdicts if v.status == "HOLDS"} >= {"3.4"}
    undecided = {v.theorem: v.advice for v in verdicts if v.status == "INCONCLUSIVE"}
    assert "3 steps were recorded" in undecided.pop("3.2")  # 20 are needed
    assert len(verdicts) == 5 and len(undecided) <= 1
    script(name, "--out", tmp_path / "bare", "--no-probe", *options)
    assert not (tmp_path / "bare" / "run").exists()
    probed, bare = (WEIGHTS[name](tmp_path / part) for part in ("probed", "bare"))
    assert probed.keys() == bare.keys() and len(bare) > 50
    assert all(torch.equal(value, bare[key]) for key, value in probed.items())
    curves(name, tmp_path / "probed", frame)


def curves(name, out, frame):
    """What has been drawn beside the script's own loss."""
    if name == "train_lightning":
        text = (out / "log" / "metrics.csv").read_text()
        assert "loss/mean" in text and "energy/h_0" in text
        return
    drawn = tensorboard_curves(out / "logs")
    assert drawn["loss"] == pytest.approx(drawn["loss/mean"])
    mine = frame[(frame.metric == "energy") & (frame.site == "h") & (frame.stat == "mean")]
    h0 = mine[mine.level == 0].set_index("step").value
    assert drawn["energy/h_0"] == pytest.approx(h0.to_dict())


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--scheme", "nonsense", "nonsense"),
     ("--batch-size", 1798, "--batch-size 1798: there are 1797 images"),
     ("--batch-size", 0, "--batch-size 0: ")],
)  # fmt: skip
def test_bad_options_are_one_line(script, tmp_path, capsys, name, option, value, said):
    with pytest.raises(SystemExit) as ended:
        script(name, "--out", tmp_path, option, value)
    line = capsys.readouterr().err.splitlines()[-1]  # Lightning may say something before it
    assert ended.value.code == 2 and line.startswith("error: ") and said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_folder_in_use_is_one_line(script, tmp_path, capsys, name):
    Run(tmp_path / "run").begin({"skips": []})
    with pytest.raises(SystemExit) as ended:
        script(name, "--out", tmp_path, "--steps", 1, "--batch-size", 4)
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert str(tmp_path / "run") in line
