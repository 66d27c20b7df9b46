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
def test_a_scheme_that_is_not_known_and_a_folder_in_use_are_one_line_and_code_2(
    script, tmp_path, name, capsys
):
    used = tmp_path / "used"
    Run(used / "run").begin({"skips": []})
    for out, scheme, named in [
        (tmp_path / "new", "nonsense", "nonsense"),
        (used, "cs:0.7", str(used / "run")),
    ]:
        with pytest.raises(SystemExit) as ended:
            script(name, "--out", out, "--scheme", scheme, "--steps", 1, "--batch-size", 4)
        assert ended.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert named in line
