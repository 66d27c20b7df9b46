"""The callback records what the same loop records by hand, and changes nothing."""

import re
import sys
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from torch import nn

from stability_probe import (
    ConstantScaling,
    Run,
    StabilityProbe,
    StabilityProbeError,
    TheoryUNet,
    find_skips,
    scale_skips,
)
from stability_probe.probes import ProbeConfig, SensitivityConfig
from stability_probe.runs import scalars

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from stability_probe.integrations.lightning import StabilityCallback  # noqa: E402

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
EXAMPLE = torch.zeros(1, 8)
CLIP = 1e-2
CONFIG = ProbeConfig(
    updates=True,
    flush_every=2,
    sensitivity=SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=2),
)
SETTINGS = {"every": 1, "sensitivity_every": 0, "config": CONFIG}
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    """Trains a network with skips, and a bias beside it, on batches of two."""

    def __init__(self, tell=True, breaks_at=None):
        super().__init__()
        self.net = TheoryUNet(8, 2, generator=torch.Generator().manual_seed(0))
        self.bias = nn.Parameter(torch.zeros(8))
        scale_skips(self.net, find_skips(self.net, EXAMPLE), ConstantScaling(kappa=0.7))
        self.tell, self.breaks_at = tell, breaks_at

    def forward(self, x):
        return self.net(x) + self.bias

    def training_step(self, batch, batch_idx):
        if self.global_step == self.breaks_at:
            raise ZeroDivisionError("broken")
        loss = (self(batch) - batch).square().mean(1)
        if self.tell:
            self.losses = loss.detach()
        return loss.mean()

    def validation_step(self, batch, batch_idx):
        self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder, callbacks=(), module=None, ckpt_path=None, **options):
    """Six batches an epoch."""
    module = module or Module()
    settings = {
        "max_steps": 6, "gradient_clip_val": CLIP, "logger": False, "accelerator": "cpu",
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = lightning.Trainer(
        callbacks=list(callbacks), default_root_dir=folder, **{**settings, **options}
    )
    loader = torch.utils.data.DataLoader(X, batch_size=2)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer, module


def by_hand(*, accumulate=1, steps=6, tell=True, context=nullcontext, scaler=None, **changed):
    """The same training in a loop of its own: its records and weights."""
    module = Module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    batches = list(X.split(2)) * accumulate
    settings = {**SETTINGS, **changed}
    with StabilityProbe(module.net, find_skips(module.net, EXAMPLE), **settings) as probe:
        for step in range(steps):
            optimizer.zero_grad()
            losses = []
            for batch in batches[step * accumulate : (step + 1) * accumulate]:
                with context():
                    losses.append((module(batch) - batch).square().mean(1))
                loss = losses[-1].mean() / accumulate
                (loss if scaler is None else scaler.scale(loss)).backward()
            told = torch.cat(losses)
            if not tell:
                told = torch.stack([x.mean() for x in losses]).mean()
            if scaler is None:
                probe.step(loss=told)
            else:
                scaler.unscale_(optimizer)
                probe.step(loss=told, grad_scale=scaler.get_scale(), grads_unscaled=True)
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    return probe.frame(), module


def callback(run=None, **options):
    return StabilityCallback(run, **{"model": "net", "inputs": (EXAMPLE,), **SETTINGS, **options})


def assert_same(frame, expected):
    """To the last bit."""
    pd.testing.assert_frame_equal(
        frame, expected, check_exact=True, check_categorical=False, check_dtype=False
    )


def same_weights(module, other):
    ours, theirs = module.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def hooks(module):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in module.modules()
    )


class TestRecords:
    def test_are_those_of_the_loop_by_hand(self, tmp_path):
        """Gradients before they are clipped, losses of every sample; nothing is changed."""
        mine = callback(tmp_path / "run", sensitivity_every=4)
        _, module = fit(tmp_path, [mine])
        expected, twin = by_hand(sensitivity_every=4)
        assert set(expected[expected.metric == "sigma_max"].step) == {1, 4}
        assert_same(Run.open(tmp_path / "run").records(), expected)
        assert same_weights(module, twin)
        assert same_weights(module, fit(tmp_path)[1])
        assert Run.open(tmp_path / "run").info["state"] == "complete"
        assert set(expected.step) == {1, 2, 3, 4, 5, 6}
        assert hooks(module) == hooks(twin) == hooks(Module())

    @pytest.mark.parametrize("tell", [True, False])
    def test_an_accumulated_step_is_one(self, tmp_path, tell):
        mine = callback()
        fit(tmp_path, [mine], Module(tell), max_steps=3, accumulate_grad_batches=2)
        assert_same(mine.probe.frame(), by_hand(accumulate=2, steps=3, tell=tell)[0])

    def test_every_other(self, tmp_path):
        mine = callback(every=2)
        fit(tmp_path, [mine])
        assert_same(mine.probe.frame(), by_hand(every=2)[0])

    def test_under_bf16(self, tmp_path):
        mine = callback()
        fit(tmp_path, [mine], precision="bf16-mixed")

        def autocast():
            return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

        assert_same(mine.probe.frame(), by_hand(context=autocast)[0])

    @pytest.mark.parametrize("tell", [True, False])
    def test_with_a_grad_scaler(self, tmp_path, tell):
        """Whose scale is out of what is recorded; it grows after the second step."""

        def scaler():
            return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

        def autocast():
            return torch.autocast("cpu", torch.half, cache_enabled=False)

        mine = callback()
        plugin = MixedPrecision("16-mixed", "cpu", scaler())
        fit(tmp_path, [mine], Module(tell), plugins=[plugin])
        expected, _ = by_hand(context=autocast, scaler=scaler(), tell=tell)
        assert plugin.scaler.get_scale() == 2.0**13
        assert_same(mine.probe.frame(), expected)

    def test_of_the_module_itself(self, tmp_path):
        module = Module()
        module.example_input_array = EXAMPLE
        mine = callback(model=None, inputs=None)
        fit(tmp_path, [mine], module)
        frame = mine.probe.frame()
        expected = by_hand()[0]
        same = ("energy", "kappa", "cross", "loss")
        assert_same(*(
            f[f.metric.isin(same) & (f.site != "output")].reset_index(drop=True)
            for f in (frame, expected)
        ))  # fmt: skip


class TestEnd:
    def test_an_error_removes_every_hook(self, tmp_path):
        mine, module = callback(tmp_path / "run"), Module(breaks_at=3)
        bare = hooks(module)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, [mine], module)
        assert hooks(module) == bare
        run = Run.open(tmp_path / "run")
        assert (run.info["state"], run.info["reason"]) == ("failed", "ZeroDivisionError: broken")
        assert set(run.records().step) == {1, 2, 3}

    def test_an_error_elsewhere_at_the_start(self, tmp_path):
        class Breaks(Callback):
            def on_train_start(self, trainer, pl_module):
                raise ZeroDivisionError

        module = Module()
        bare = hooks(module)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, [callback(), Breaks()], module)
        assert hooks(module) == bare

    def test_a_run_is_not_written_over(self, tmp_path):
        mine = callback(tmp_path / "run")
        fit(tmp_path, [mine], max_steps=1)
        with pytest.raises(StabilityProbeError, match="holds a run already"):
            fit(tmp_path, [mine], max_steps=1)


class TestGoingOn:
    def test_from_a_checkpoint(self, tmp_path):
        """To the records of a training that never stopped; those after it are taken again."""
        epochs = {"limit_train_batches": 2}
        never = callback()
        _, twin = fit(tmp_path, [never], **epochs)
        mine = callback(tmp_path / "run")
        with pytest.raises(ZeroDivisionError):
            saving = SavesAt(tmp_path / "x.ckpt", 4)
            fit(tmp_path, [mine, saving], Module(breaks_at=5), **epochs)
        assert set(Run.open(tmp_path / "run").records().step) == {1, 2, 3, 4, 5}
        again = callback(tmp_path / "run")
        _, module = fit(tmp_path, [again], ckpt_path=tmp_path / "x.ckpt", **epochs)
        run = Run.open(tmp_path / "run")
        assert (run.info["state"], run.info["resumed"]) == ("complete", [4])
        assert_same(run.records(), never.probe.frame())
        assert same_weights(module, twin)

    def test_a_checkpoint_can_be_read_as_plain_values(self, tmp_path):
        saving = SavesAt(tmp_path / "x.ckpt", 2)
        fit(tmp_path, [callback(), saving], max_steps=2, limit_train_batches=2)
        saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
        (state,) = (v for name, v in saved.items() if name.startswith("StabilityCallback"))
        assert state["steps"] == 2 and torch.equal(state["batch"]["args"][0], X[:2])

    def test_two_networks_have_a_state_each(self):
        assert callback().state_key != callback(model="other").state_key

    def test_before_and_without_a_training(self):
        mine = callback()
        assert mine.state_dict() == {}
        mine.load_state_dict({})
        mine.load_state_dict({"steps": 3})
        assert mine.state_dict() == {"steps": 3}


class SavesAt(Callback):
    """Saves a checkpoint at the end of the epoch that a step ends."""

    def __init__(self, file, step):
        self.file, self.step = file, step

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


class TestLoggers:
    def test_are_told(self, tmp_path):
        mine = callback()
        fit(tmp_path, [mine], logger=CSVLogger(tmp_path, name="", version="log"))
        table = pd.read_csv(tmp_path / "log" / "metrics.csv").set_index("step")
        expected = dict(scalars(mine.probe.frame()))
        assert table.index.tolist() == list(expected) == [1, 2, 3, 4, 5, 6]
        for step, values in expected.items():
            assert table.loc[step].dropna().to_dict() == pytest.approx(values)

    def test_or_not(self, tmp_path):
        fit(tmp_path, [callback(log=False)], logger=CSVLogger(tmp_path, name="", version="log"))
        assert not (tmp_path / "log" / "metrics.csv").exists()


class TestRefused:
    def refused(self, tmp_path, mine, module=None, **options):
        with pytest.raises(StabilityProbeError) as error:
            fit(tmp_path, [mine], module, max_steps=1, **options)
        return str(error.value)

    def test_no_such_network(self, tmp_path):
        line = self.refused(tmp_path, callback(model="unet"))
        assert line == "StabilityCallback: no 'unet' in Module, which has net"

    def test_no_example_input(self, tmp_path):
        line = self.refused(tmp_path, callback(inputs=None))
        assert "an example input is needed to find the long skips, got none; pass inputs=" in line

    def test_no_skips(self, tmp_path):
        line = self.refused(tmp_path, callback(model="net.middle"))
        assert "has no long skips that can be found; name the network with model=" in line

    def test_two_optimizers(self, tmp_path):
        class Two(Module):
            automatic_optimization = False

            def configure_optimizers(self):
                return [super(Two, self).configure_optimizers() for _ in range(2)]

        line = self.refused(tmp_path, callback(), Two(), gradient_clip_val=None)
        assert "one optimizer is needed, got 2; call StabilityProbe.step" in line

    def test_the_module_itself_in_several_processes(self, monkeypatch):
        trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        monkeypatch.setattr(lightning.Trainer, "world_size", 2)
        with pytest.raises(StabilityProbeError, match="name the network in it"):
            callback(model=None)._network(trainer, Module())


def test_without_lightning(monkeypatch):
    name = "stability_probe.integrations.lightning"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(StabilityProbeError, match=re.escape("stability_probe[lightning]")):
        __import__(name)
