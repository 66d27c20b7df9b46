"""The recorder as a whole: it changes nothing, leaves nothing, and records what happened."""

import copy
import gc
import itertools
import time
import weakref
from contextlib import ExitStack, nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stability_probe import (
    Run,
    StabilityProbe,
    StabilityProbeError,
    TheoryUNet,
    find_skips,
    scale_skips,
)
from stability_probe.probes import (
    COLUMNS,
    ProbeBatch,
    ProbeConfig,
    SensitivityConfig,
    per_sample_mse,
)
from stability_probe.probes import features as features_module
from stability_probe.probes import probe as probe_module
from stability_probe.probes import sensitivity as sensitivity_module
from stability_probe.probes.features import FeatureProbe
from stability_probe.probes.gradients import ParameterProbe
from stability_probe.probes.ranks import RecordWarning
from stability_probe.probes.sensitivity import SensitivityProbe
from stability_probe.skips import ArgumentTap, OperandTap, OutputTap, parse_scaling
from tests.oracles.recording import DETAILED, assert_rows, expected_step, output_of

QUICK = SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=2)
ALL_METRICS = {
    "energy", "cross", "kappa", "feature_grad_energy", "loss", "samples", "grad_energy",
    "param_energy", "update_ratio", "secant", "secant_mean", "secant_worst",
    "sigma_max", "sigma_max_upper", "lipschitz", "lipschitz_upper",
    "sample_loss", "sample_energy", "sample_kappa", "sample_grad_energy",
}  # fmt: skip
"""Every metric of the table in `stability_probe.probes.records` but those of paths and gates."""
GATES = {"gate_term", "gate_term_upper", "gate_bound"}


def one_step(probe, net, case, *, n=4, seed=0, scale=1.0):
    """Forward, backward and `probe.step` on one batch of a case."""
    x, t, target = case.data(n, seed, next(net.parameters()).dtype)
    loss = per_sample_mse(output_of(net, x, t), target)
    (scale * loss.mean()).backward()
    probe.step(loss=loss)
    return loss


def hooks_of(net):
    """Every hook of every kind: on modules, on parameters, and the global ones."""
    kinds = {
        (name, kind): len(hooks)
        for name, module in net.named_modules()
        for kind, hooks in vars(module).items()
        if "hooks" in kind and hasattr(hooks, "__len__")
    }
    tensors = {name: len(p._backward_hooks or ()) for name, p in net.named_parameters()}
    global_hooks = {
        name: len(hooks)
        for name, hooks in vars(torch.nn.modules.module).items()
        if name.startswith("_global_") and hasattr(hooks, "__len__")
    }
    assert any(kind == "_forward_pre_hooks" for _, kind in kinds)
    return kinds, tensors, global_hooks


class TestTransparency:
    """With a probe and without it, training is the same to the last bit."""

    def train(self, case, scheme, *, probed, steps=10):
        """Train; returns all that may not differ, and the records."""
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002 - the legacy global state is what is checked
        net, trace, frame = case.net().train(), [], None
        skips = case.skips(net)
        x, t, target = case.data(3, seed=9)
        probe = StabilityProbe(
            net,
            skips,
            every=1,
            sensitivity_every=10,
            batch=ProbeBatch((x, t), target=target, sensitive=2),
            config=ProbeConfig(updates=True, flush_every=7, sensitivity=QUICK),
        )
        with scale_skips(net, skips, parse_scaling(scheme)):
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
            with probe if probed else nullcontext():
                for _ in range(steps):
                    x = torch.randn(4, *case.shape)  # global state: a stray draw would show
                    t = torch.randint(1000, (4,))
                    loss = per_sample_mse(output_of(net, x, t), torch.randn_like(x))
                    loss.mean().backward()
                    if probed:
                        probe.step(loss=loss)
                    trace += [loss.detach(), *(p.grad.clone() for p in net.parameters())]
                    optimizer.step()
                    optimizer.zero_grad()
                    trace += [p.detach().clone() for p in net.parameters()]
            trace += [buffer.clone() for buffer in net.buffers()]
            frame = probe.frame()
        modes = [module.training for module in net.modules()]
        # not the state of `random`: beartype draws from it when it checks a container
        states = (torch.get_rng_state().tolist(), str(np.random.get_state()))  # noqa: NPY002
        return trace, (modes, states), frame

    def test_losses_gradients_parameters_and_random_states_are_bitwise_equal(self, case, scheme):
        bare, bare_state, _ = self.train(case, scheme, probed=False)
        with_probe, state, frame = self.train(case, scheme, probed=True)
        assert len(bare) == len(with_probe) >= 10 * 29
        assert all(torch.equal(a, b) for a, b in zip(bare, with_probe, strict=True))
        assert all(a.isfinite().all() for a in bare)
        assert state == bare_state
        assert set(frame.metric) - GATES == ALL_METRICS  # so every measurement did run
        assert sorted(frame[frame.metric == "sigma_max"].step.unique()) == [1, 10]
        assert sorted(frame[frame.metric == "energy"].step.unique()) == list(range(1, 11))

    def test_the_comparison_can_fail(self, cases):
        """A probe that draws one global random number is caught."""
        case = cases["add"]
        bare, _, _ = self.train(case, "unscaled", probed=False, steps=3)
        with pytest.MonkeyPatch.context() as patch:
            measure = SensitivityProbe.measure
            patch.setattr(SensitivityProbe, "measure", lambda s: (torch.rand(1), measure(s))[1])
            drawn, _, _ = self.train(case, "unscaled", probed=True, steps=3)
        assert not all(torch.equal(a, b) for a, b in zip(bare, drawn, strict=True))

    def test_no_activation_is_kept(self, cases):
        net = cases["concat"].net()
        seen = []
        net.encoder[0].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
        with StabilityProbe(net, cases["concat"].skips(net), sensitivity_every=1) as probe:
            one_step(probe, net, cases["concat"])
            gc.collect()
            assert seen
            assert all(ref() is None for ref in seen)


def disk_full(frame):
    raise OSError("disk full")


class Boom(Exception):
    """Raised on purpose."""


def boom(*args, **kwargs):
    raise Boom


class TestNothingIsLeft:
    """Whatever ends the block, no hook remains and what was recorded is stored."""

    @pytest.fixture(params=["unscaled", "ls"])
    def scaled(self, case, request):
        net = case.net().train()
        skips = case.skips(net)
        with scale_skips(net, skips, parse_scaling(request.param)):
            yield case, net, skips, hooks_of(net)

    def probe(self, net, skips, case, **options):
        x, t, target = case.data(2)
        config = ProbeConfig(sensitivity=QUICK)
        return StabilityProbe(
            net, skips, batch=ProbeBatch((x, t), target=target), config=config, **options
        )

    def test_after_a_normal_run(self, scaled):
        case, net, skips, before = scaled
        with self.probe(net, skips, case) as probe:
            assert hooks_of(net) != before
            one_step(probe, net, case)
        assert hooks_of(net) == before

    def test_after_an_exception_in_the_forward_pass(self, scaled, monkeypatch, tmp_path):
        case, net, skips, before = scaled
        run = Run(tmp_path / "run")
        with pytest.raises(Boom), self.probe(net, skips, case, run=run) as probe:
            one_step(probe, net, case)
            monkeypatch.setattr(net.get_submodule(skips[0].sink), "forward", boom)
            one_step(probe, net, case)
        assert hooks_of(net) == before
        assert run.info["state"] == "failed"
        assert run.info["reason"].startswith("Boom")
        assert set(run.records().step) == {1}

    def test_after_an_exception_in_the_loss(self, scaled):
        case, net, skips, before = scaled
        with pytest.raises(Boom), self.probe(net, skips, case) as probe:
            boom(output_of(net, *case.data()[:2]))
        assert hooks_of(net) == before
        assert probe.frame().empty

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (features_module, "_norm"),
            (FeatureProbe, "taken"),
            (FeatureProbe, "_on_input"),
            (ParameterProbe, "read"),
            (SensitivityProbe, "secants"),
            (SensitivityProbe, "jacobian_norms"),
            (sensitivity_module, "sample_gradients"),
            (probe_module, "parameter_blocks"),
            (probe_module, "waiting"),
        ],
    )
    def test_after_an_exception_in_the_probe_itself(self, cases, monkeypatch, owner, name):
        case = cases["uvit"]
        net = case.net()
        before, modes = hooks_of(net), [m.training for m in net.modules()]
        monkeypatch.setattr(owner, name, boom)
        with pytest.raises(Boom), self.probe(net, case.skips(net), case) as probe:
            one_step(probe, net, case)
        assert hooks_of(net) == before
        assert [m.training for m in net.modules()] == modes

    @pytest.mark.parametrize("attached", [0, 1, 3])
    def test_after_an_exception_half_way_into_the_block(self, scaled, monkeypatch, attached):
        case, net, skips, before = scaled
        count = iter(range(100))

        def failing(attach):
            def fails_at_last(tap, model, fn, *, first=False):
                if next(count) == attached - 1:
                    assert hooks_of(net) != before  # some are there by now
                    boom()
                return attach(tap, model, fn, first=first)

            return fails_at_last

        if attached:
            for kind in (OutputTap, ArgumentTap, OperandTap):
                monkeypatch.setattr(kind, "attach", failing(kind.attach))
        else:
            whole = FeatureProbe.attach
            fails = lambda *args: (whole(*args), boom())  # noqa: E731
            monkeypatch.setattr(FeatureProbe, "attach", fails)
        with pytest.raises(Boom), self.probe(net, skips, case):
            pass
        assert hooks_of(net) == before

    def test_a_backward_pass_after_the_block_records_nothing(self, cases):
        case = cases["add"]
        net = case.net()
        x, t, target = case.data()
        with StabilityProbe(net, case.skips(net)) as probe:
            loss = per_sample_mse(net(x, t), target)
        loss.mean().backward()
        with_hooks = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        per_sample_mse(net(x, t), target).mean().backward()
        assert all(
            torch.equal(a, p.grad) for a, p in zip(with_hooks, net.parameters(), strict=True)
        )
        assert probe.frame().empty

    @pytest.mark.parametrize("nested", [True, False])
    def test_a_probe_is_used_once(self, cases, nested):
        case = cases["add"]
        net = case.net()
        before = hooks_of(net)
        probe = StabilityProbe(net, case.skips(net))
        with pytest.raises(StabilityProbeError, match="it is used once; make another"):
            with probe:
                if nested:
                    probe.__enter__()
            probe.__enter__()
        assert hooks_of(net) == before

    def test_a_first_pass_that_the_model_refuses_can_be_repeated(self, cases):
        case = cases["uvit"]
        net = case.net()
        with self.probe(net, case.skips(net), case) as probe:
            with pytest.raises(Exception, match="16"):  # beartype's or torch's
                net(torch.ones(2, 3, 8, 8), torch.ones(2))
            one_step(probe, net, case)
        assert {"grad_energy", "sample_grad_energy"} <= set(probe.frame().metric)


def record(
    net, case, batches, *, scale=1.0, call=None, at_once=False, sensitivity_every=0, **options
):
    """The frame of one recorded step, gradients accumulated over batches, or of all at once."""
    options["sensitivity_every"] = sensitivity_every
    call = call or (lambda x, t: output_of(net, x, t))
    net.zero_grad()
    with StabilityProbe(net, case.skips(net), **options) as probe:
        losses = []
        for x, t, target in batches:
            losses.append(per_sample_mse(call(x, t), target))
            if not at_once:
                (scale * losses[-1].mean() / len(batches)).backward()
        if at_once:
            (scale * sum(loss.mean() for loss in losses) / len(batches)).backward()
        probe.step(loss=torch.cat(losses), grad_scale=scale)
    return probe.frame()


class TestRecordsAgainstTheOracle:
    """Everything recorded at a step, against activations kept and reduced afterwards."""

    def test_two_micro_batches_are_one_step_of_the_union_of_their_samples(self, case, scheme):
        net = case.net(torch.float64)
        batches = [case.data(n, seed, torch.float64) for n, seed in ((4, 1), (3, 2))]
        with scale_skips(net, case.skips(net), parse_scaling(scheme)):
            torch.manual_seed(0)  # dropout
            frame = record(net, case, batches, scale=512.0)
            torch.manual_seed(0)
            net.zero_grad()
            expected = expected_step(net, batches, grad_scale=512.0)
        assert frame.step.unique().tolist() == [1]
        assert expected["loss", "loss", 0, "min"] < expected["loss", "loss", 0, "max"]
        assert_rows(frame, expected)
        found = frame.set_index(["metric", "site", "level", "stat"]).value.sort_index()
        for i in range(1, len(case.skips(net)) + 1):  # h_i := z_i
            z, h = found["energy", "z", i], found["energy", "h", i]
            np.testing.assert_allclose(h, z, rtol=1e-12)

    def test_two_passes_and_one_backward_pass_are_the_same(self, case):
        """Gradients come last pass first, and are put with the samples that they belong to."""
        net = case.net(torch.float64).eval()
        batches = [case.data(n, seed, torch.float64) for n, seed in ((4, 1), (3, 2))]
        frame = record(net, case, batches, at_once=True)
        net.zero_grad()
        assert_rows(frame, expected_step(net, batches))

    def test_float32_features_agree_with_float64(self, case):
        net, exact = case.net().eval(), case.net(torch.float64).eval()
        frame = record(net, case, [case.data(5)])
        expected = expected_step(exact, [case.data(5, dtype=torch.float64)])
        assert_rows(frame, expected, rtol=1e-4)

    @pytest.mark.parametrize(("bins", "levels"), [(1, 1000.0), (2, 1000.0), (7, 500.0)])
    def test_noise_bins(self, cases, bins, levels):
        case = cases["add"]
        net = case.net(torch.float64)
        batch = case.data(40, dtype=torch.float64)
        config = ProbeConfig(noise_bins=bins, noise_levels=levels)
        frame = record(net, case, [batch], config=config)
        net.zero_grad()
        assert_rows(frame, expected_step(net, [batch], bins=bins, levels=levels))
        assert frame[frame.metric == "samples"].value.sum() == 40

    def test_a_bin_starts_at_its_lower_edge(self, cases):
        case = cases["add"]
        net = case.net()
        x, _, target = case.data(4)
        t = torch.tensor([0, 249, 250, 999])
        frame = record(net, case, [(x, t, target)])
        counts = frame[frame.metric == "samples"].set_index("stat").value
        assert counts.to_dict() == {"t0": 2.0, "t1": 1.0, "t3": 1.0}

    def test_empty_noise_bins_leave_no_row(self, cases):
        case = cases["uvit"]
        net = case.net()
        x, _, target = case.data(4)
        frame = record(net, case, [(x, torch.tensor([1, 2, 600, 3]), target)])
        binned = frame[frame.stat.str.startswith("t")]
        assert set(binned.stat) == {"t0", "t2"}
        assert not frame.value.isna().any()
        assert set(binned.metric) == {
            "energy", "cross", "kappa", "feature_grad_energy", "loss", "samples",
        }  # fmt: skip

    def test_nan_in_one_sample_stays_in_its_bin(self, cases):
        case = cases["add"]
        net = case.net(torch.float64)
        x, _, target = case.data(4, dtype=torch.float64)
        t = torch.tensor([10, 20, 900, 990])
        x[2, 3] = float("nan")
        frame = record(net, case, [(x, t, target)])
        net.zero_grad()
        expected = expected_step(net, [(x, t, target)])
        found = frame.set_index(["metric", "site", "level", "stat"]).value
        for metric, site, level in [
            ("energy", "x", 0), ("energy", "h", 0), ("energy", "u", 2), ("loss", "loss", 0),
        ]:  # fmt: skip
            for stat in ("mean", "min", "max", "t3"):
                assert np.isnan(found[metric, site, level, stat])
            whole = expected[metric, site, level, "t0"]
            assert found[metric, site, level, "t0"] == pytest.approx(whole, rel=1e-10)
            assert np.isfinite(whole)
        assert found["samples", "loss", 0, "t3"] == 2
        grads = frame[frame.metric == "grad_energy"]
        assert grads.value.isna().all()  # the batch mean's gradient is lost, and says so

    def test_a_scalar_loss_is_recorded_as_it_is(self, cases):
        case = cases["add"]
        net = case.net()
        x, t, _ = case.data(4)
        with StabilityProbe(net, case.skips(net), sensitivity_every=0) as probe:
            net(x, t).sum().backward()
            probe.step(loss=torch.tensor(2.5))
        loss = probe.frame().query("metric == 'loss'").set_index("stat").value
        assert loss.to_dict() == {"mean": 2.5, "min": 2.5, "max": 2.5}

    @pytest.mark.parametrize("loss", [2.5, 2, torch.tensor([2.5])], ids=str)
    def test_a_number_as_the_loss(self, cases, loss):
        case = cases["add"]
        net = case.net()
        with StabilityProbe(net, case.skips(net), sensitivity_every=0) as probe:
            net(case.data(4)[0]).sum().backward()
            probe.step(loss=float(loss))
        rows = probe.frame().query("metric == 'loss'")
        assert rows.value.tolist() == [float(loss)] * 3

    def test_parameter_gradients_may_have_been_unscaled_before(self, cases):
        """After `scaler.unscale_` features still have the loss's scale, parameters do not."""
        case = cases["concat"]
        net = case.net(torch.float64)
        x, t, target = case.data(4, dtype=torch.float64)
        with StabilityProbe(net, case.skips(net), sensitivity_every=0) as probe:
            loss = per_sample_mse(net(x, t), target)
            (512 * loss.mean()).backward()
            for p in net.parameters():
                p.grad /= 512
            probe.step(loss=loss, grad_scale=512.0, grads_unscaled=True)
        net.zero_grad()
        assert_rows(probe.frame(), expected_step(net, [(x, t, target)]))

    def test_a_copy_of_the_model_is_not_recorded(self, cases):
        case = cases["uvit"]
        net = case.net()
        batch = case.data(4)

        def with_a_copy(x, t):
            copy.deepcopy(net)(100 * x, t).sum().backward()
            return net(x, t)

        plain = record(net, case, [batch])
        pd.testing.assert_frame_equal(record(net, case, [batch], call=with_a_copy), plain)

    def test_without_a_loss_there_is_none_and_the_rest_is_the_same(self, cases):
        case = cases["add"]
        net = case.net()
        x, t, target = case.data(4)
        with StabilityProbe(net, case.skips(net), sensitivity_every=0) as probe:
            per_sample_mse(net(x, t), target).mean().backward()
            probe.step()
        with_loss = record(net, case, [(x, t, target)])
        rest = with_loss[with_loss.metric != "loss"].reset_index(drop=True)
        rest = rest[rest.metric != "skipped"].reset_index(drop=True)  # there was no scaler
        pd.testing.assert_frame_equal(probe.frame(), rest, check_categorical=False)

    @pytest.mark.parametrize("name", ["concat", "uvit", "unet2d"])
    def test_arguments_by_keyword_are_the_same_as_by_position(self, cases, name):
        case = cases[name]
        net = case.net().eval()
        x, t, target = case.data(4)
        x_name, t_name = {
            "concat": ("x", "t"), "uvit": ("x", "timesteps"), "unet2d": ("sample", "timestep"),
        }[name]  # fmt: skip
        ways = [
            lambda x, t: net(x, t),
            lambda x, t: net(x, **{t_name: t}),
            lambda x, t: net(**{x_name: x, t_name: t}),
            lambda x, t: net(**{t_name: t, x_name: x}),
        ]
        frames = [
            record(
                net, case, [(x, t, target)], sensitivity_every=1,
                config=ProbeConfig(sensitivity=QUICK),
                call=lambda x, t, way=way: out if torch.is_tensor(out := way(x, t)) else out.sample,
            )
            for way in ways
        ]  # fmt: skip
        assert "t3" in set(frames[0].stat)
        assert "sigma_max" in set(frames[0].metric)
        for frame in frames[1:]:
            pd.testing.assert_frame_equal(frame, frames[0])

    def test_checkpointed_blocks_are_recorded_once(self, cases):
        """Gradient checkpointing runs blocks again in the backward pass, hooks and all."""
        case = cases["unet2d"]
        net, batch = case.net().train(), case.data(4)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        plain = record(net, case, [batch])
        passes = []
        block = net.up_blocks[1].resnets[0]
        block.register_forward_hook(lambda *args: passes.append(1))
        net.enable_gradient_checkpointing()
        before = hooks_of(net)
        pd.testing.assert_frame_equal(record(net, case, [batch]), plain)
        assert len(passes) > 2  # find_skips, the search for blocks, and more than one of training
        assert hooks_of(net) == before

    def test_a_step_with_a_pass_that_has_no_noise_level_has_no_bins(self, cases):
        case = cases["add"]
        net = case.net()
        x, t, _ = case.data(4)
        with StabilityProbe(net, case.skips(net), sensitivity_every=0) as probe:
            (net(x, t).sum() + net(x[:2]).sum()).backward()
            probe.step(loss=torch.ones(4))
        assert set(probe.frame().stat) == {"mean", "min", "max", "value"}

    def test_passes_without_gradients_are_not_recorded(self, cases):
        case = cases["uvit"]
        net = case.net()
        batch = case.data(4)
        plain = record(net, case, [batch])

        def validate_first(x, t):
            with torch.no_grad():
                net(100 * x, t)
            return net(x, t)

        pd.testing.assert_frame_equal(record(net, case, [batch], call=validate_first), plain)

    def test_a_first_pass_without_gradients_does_not_start_the_probe(self, cases):
        case = cases["add"]
        net = case.net()
        with StabilityProbe(net, case.skips(net)) as probe:
            with torch.no_grad():
                net(torch.full((2, 16), 7.0))
            one_step(probe, net, case, n=3)
        frame = probe.frame()
        x = case.data(3)[0]
        sampled = frame[(frame.metric == "sample_energy") & (frame.site == "x")]
        assert sampled.value.tolist() == pytest.approx(x.square().sum(1).tolist(), rel=1e-6)

    def test_no_skips_records_what_does_not_need_them(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        with StabilityProbe(net, []) as probe:
            net(x).square().mean().backward()
            probe.step()
        frame = probe.frame()
        assert set(frame.metric) == {
            "energy", "grad_energy", "param_energy", "secant", "secant_mean", "secant_worst",
            "sigma_max", "sigma_max_upper", "sample_energy",
        }  # fmt: skip
        assert set(frame[frame.metric == "energy"].site) == {"x", "output"}


class TestSchedule:
    """Which steps are recorded, and when records are stored."""

    def run(self, case, **options):
        net = case.net()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        with StabilityProbe(net, case.skips(net), **{"every": 1, **options}) as probe:
            for step in range(1, 11):
                one_step(probe, net, case, seed=step)
                optimizer.step()
                optimizer.zero_grad()
        return probe.frame()

    def test_every_third_step_has_the_numbers_of_that_step(self, cases):
        case = cases["concat"]
        every = self.run(case, sensitivity_every=0)
        third = self.run(case, sensitivity_every=0, every=3)
        assert third.step.unique().tolist() == [1, 3, 6, 9]
        same = every[every.step.isin([1, 3, 6, 9])].reset_index(drop=True)
        pd.testing.assert_frame_equal(third, same, check_categorical=False)
        assert self.run(case, sensitivity_every=0, every=4).step.unique().tolist() == [1, 4, 8]

    def test_left_to_itself_it_records_every_tenth_step(self, cases):
        case = cases["concat"]
        net = case.net()
        with StabilityProbe(net, case.skips(net), sensitivity_every=0) as probe:
            for _ in range(21):
                one_step(probe, net, case)
        assert probe.frame().step.unique().tolist() == [1, 10, 20]

    @pytest.mark.parametrize(
        ("sensitivity_every", "expected"), [(0, []), (1, list(range(1, 11))), (4, [1, 4, 8])]
    )
    def test_scheduled_measurements(self, cases, sensitivity_every, expected):
        config = ProbeConfig(sensitivity=QUICK)
        frame = self.run(cases["add"], every=7, sensitivity_every=sensitivity_every, config=config)
        assert frame[frame.metric == "sigma_max"].step.tolist() == [
            s for s in expected for _ in range(4)
        ]
        assert frame[frame.metric == "energy"].step.unique().tolist() == [1, 7]

    def test_without_a_batch_the_first_eight_samples_are_probed(self, cases):
        case = cases["add"]
        net = case.net()
        config = ProbeConfig(sensitivity=QUICK)
        with StabilityProbe(net, case.skips(net), sensitivity_every=1, config=config) as probe:
            one_step(probe, net, case, n=11, seed=1)
            one_step(probe, net, case, n=11, seed=2)
        frame = probe.frame()
        x = case.data(11, seed=1)[0]
        expected = x[:8].square().sum(1).tolist()
        for step in (1, 2):
            rows = frame[(frame.metric == "sample_energy") & (frame.site == "x")]
            assert rows[rows.step == step].value.tolist() == pytest.approx(expected, rel=1e-6)
        assert "sample_loss" not in set(frame.metric)  # there is no target

    def test_the_measurements_see_the_parameters_of_their_step(self, cases):
        case = cases["add"]
        net = case.net()
        x, t, target = case.data(2)
        batch = ProbeBatch((x, t), target=target)
        config = ProbeConfig(sensitivity=QUICK)
        with StabilityProbe(
            net, case.skips(net), sensitivity_every=1, batch=batch, config=config
        ) as probe:
            one_step(probe, net, case)
            with torch.no_grad():
                net.decoder[0].block.layer2.weight.mul_(2)  # doubles the output
            one_step(probe, net, case)
        sigma = probe.frame().query("metric == 'sigma_max'").value.to_numpy().reshape(2, 2)
        assert sigma[1] == pytest.approx(2 * sigma[0], rel=1e-5)

    @pytest.mark.parametrize(("flush_every", "parts"), [(1, 10), (3, 4), (50, 1)])
    def test_flushing_changes_nothing_but_the_parts(self, cases, tmp_path, flush_every, parts):
        run = Run(tmp_path / "run")
        config = ProbeConfig(flush_every=flush_every)
        frame = self.run(cases["add"], sensitivity_every=0, run=run, config=config)
        in_memory = self.run(cases["add"], sensitivity_every=0)
        pd.testing.assert_frame_equal(frame, in_memory, check_dtype=False, check_categorical=False)
        assert len(list((run.path / "records").glob("*.parquet"))) == parts

    def test_columns_are_the_same_in_memory_and_from_a_run(self, cases, tmp_path):
        run = Run(tmp_path / "run")
        assert COLUMNS == ("step", "metric", "site", "level", "stat", "value")
        for options in ({}, {"run": run}):
            frame = self.run(cases["add"], sensitivity_every=5, **options)
            assert tuple(frame.columns) == COLUMNS
            assert not frame.empty
            assert frame.value.dtype == np.float64
        assert tuple(Run.open(run.path).records().columns) == COLUMNS

    def test_an_unused_probe_has_an_empty_frame(self, cases, tmp_path):
        net = cases["add"].net()
        for run in (None, Run(tmp_path / "run")):
            with StabilityProbe(net, cases["add"].skips(net), run=run) as probe:
                pass
            assert tuple(probe.frame().columns) == COLUMNS
            assert probe.frame().empty

    def test_a_run_says_how_it_went(self, cases, tmp_path):
        run = Run(tmp_path / "run", {"scheme": "unscaled"})
        case = cases["add"]
        net = case.net()
        with StabilityProbe(net, case.skips(net), run=run) as probe:
            one_step(probe, net, case)
            assert run.info["state"] == "running"
        info = run.info
        assert (info["state"], info["reason"]) == ("complete", None)
        assert info["config"] == {"scheme": "unscaled"}
        assert [s["level"] for s in info["skips"]] == [1, 2, 3]
        assert info["skips"][0] == {
            "level": 1, "source": "encoder.0", "sink": "decoder.0.block", "merge": "add",
            "shape": [16], "kappa": 1.0,
        }  # fmt: skip
        settings = info["probe_settings"]
        assert (settings["every"], settings["sensitivity_every"]) == (10, 100)
        assert (settings["noise_bins"], settings["sensitivity"]["rtol"]) == (4, 1e-2)
        assert set(info["probe"]) == {
            "hooks_s", "step_s", "flush_s", "sensitivity_s", "elapsed_s", "overhead",
        }  # fmt: skip

    def test_the_cost_adds_up_on_a_clock_of_our_own(self, cases, monkeypatch, tmp_path):
        """Every look at the clock is a second; the last store takes a thousand more."""
        now = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
        run, case = Run(tmp_path / "run"), cases["add"]
        append, net = run.append, case.net()

        def slow(frame):
            append(frame)
            for _ in range(1000):
                next(now)

        monkeypatch.setattr(run, "append", slow)
        batch = ProbeBatch(case.data(2)[:2])
        with StabilityProbe(net, case.skips(net), run=run, batch=batch) as probe:
            one_step(probe, net, case)
        cost = run.info["probe"]
        parts = {k: cost[f"{k}_s"] for k in ("hooks", "step", "flush", "sensitivity")}
        assert all(seconds > 0 for seconds in parts.values())
        assert 1000 < parts["flush"] < 1010
        bare = cost["elapsed_s"] - sum(parts.values())
        assert bare > 0
        assert cost["overhead"] == pytest.approx(
            (parts["hooks"] + parts["step"] + parts["flush"]) / bare
        )
        assert probe.cost() == cost  # the time since the block was left is not counted

    def test_a_used_run_is_refused_before_anything_is_attached(self, cases, tmp_path):
        run, case = Run(tmp_path / "run"), cases["add"]
        run.begin({})
        net = case.net()
        before = hooks_of(net)
        with pytest.raises(StabilityProbeError, match="holds a run already"):
            StabilityProbe(net, case.skips(net), run=run).__enter__()
        assert hooks_of(net) == before

    def test_a_run_that_cannot_be_attached_to_is_not_begun(self, cases, tmp_path):
        skips = cases["add"].skips(cases["add"].net())
        with pytest.raises(StabilityProbeError, match="has no such module"):
            StabilityProbe(nn.Linear(2, 2), skips, run=Run(tmp_path / "run")).__enter__()
        assert list(tmp_path.iterdir()) == []

    def test_training_goes_on_while_the_disk_is_full_and_the_run_says_so(
        self, cases, tmp_path, monkeypatch
    ):
        run, case = Run(tmp_path / "run"), cases["add"]
        net = case.net()
        before = hooks_of(net)
        monkeypatch.setattr(run, "append", disk_full)
        config = ProbeConfig(flush_every=1)
        options = {"sensitivity_every": 0, "run": run, "config": config, "every": 1}
        with (
            pytest.warns(RecordWarning, match="disk full; training goes on") as warned,
            StabilityProbe(net, case.skips(net), **options) as probe,
        ):
            for _ in range(3):
                one_step(probe, net, case)
        assert len(warned) == 1
        assert probe.steps == 3
        reason = "records of steps 1, 2, 3 could not be stored: disk full"
        assert (run.info["state"], run.info["reason"]) == ("failed", reason)
        assert hooks_of(net) == before

    def test_records_that_could_not_be_stored_are_kept_and_tried_again(
        self, cases, tmp_path, monkeypatch
    ):
        run, case = Run(tmp_path / "run"), cases["add"]
        net = case.net()
        with (
            pytest.warns(RecordWarning, match="disk full"),
            StabilityProbe(net, case.skips(net), run=run, sensitivity_every=0, every=1) as probe,
        ):
            one_step(probe, net, case)
            with monkeypatch.context() as patch:
                patch.setattr(run, "append", disk_full)
                probe.flush()
                assert run.records().empty
                assert set(probe.frame().step) == {1}  # they wait
            one_step(probe, net, case)
        assert sorted(run.records().step.unique()) == [1, 2]
        assert not run.records().duplicated(list(COLUMNS[:-1])).any()
        assert (run.info["state"], run.info["reason"]) == ("complete", None)

    def test_the_first_of_two_errors_is_the_one_shown(self, cases, tmp_path, monkeypatch):
        run, case = Run(tmp_path / "run"), cases["add"]
        net = case.net()
        monkeypatch.setattr(run, "append", lambda frame: 1 / 0)
        with pytest.raises(Boom), StabilityProbe(net, case.skips(net), run=run) as probe:
            one_step(probe, net, case)
            boom()
        assert run.info["state"] == "failed"
        assert run.info["reason"].startswith("Boom")

    def test_skips_out_of_order_are_refused(self, cases):
        net = cases["add"].net()
        skips = cases["add"].skips(net)
        for wrong in (skips[::-1], skips[1:], [*skips, skips[0]]):
            with pytest.raises(StabilityProbeError, match="must have the levels 1"):
                StabilityProbe(net, wrong)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": -1}, {"sensitivity_every": -1}])
def test_a_schedule_out_of_range_is_refused(cases, options):
    with pytest.raises(StabilityProbeError, match="every must be at least 1 and sensitivity_every"):
        StabilityProbe(cases["add"].net(), [], **options)


class TestLaws:
    """A network without biases is positively homogeneous, and the records must show it."""

    NET = TheoryUNet(8, 2).double()

    def found(self, x, scheme="cs:0.5", weight=1.0, grad_scale=1.0):
        from stability_probe import find_skips

        self.NET.zero_grad()
        skips = find_skips(self.NET, x[:1])
        with ExitStack() as stack:
            stack.enter_context(scale_skips(self.NET, skips, parse_scaling(scheme)))
            probe = stack.enter_context(StabilityProbe(self.NET, skips, sensitivity_every=0))
            (weight * self.NET(x).square().sum()).backward()
            probe.step(grad_scale=grad_scale)
        frame = probe.frame()
        return frame.set_index(["metric", "site", "level", "stat"]).value

    @settings(max_examples=15, deadline=None)
    @given(c=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
    def test_scaling_the_input_by_c_scales_energies_by_c_squared(self, c, seed):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        one, scaled = self.found(x), self.found(c * x)
        power = {"energy": 2, "cross": 2, "kappa": 0, "param_energy": 0}
        # the gradient of a sum of squares is c times as large, and at a weight it meets a feature
        power |= {"feature_grad_energy": 2, "grad_energy": 4, "skipped": 0}
        assert set(one.index.get_level_values("metric")) == set(power)
        for metric, exponent in power.items():
            small = one[metric].to_numpy()
            tolerance = 1e-6 * np.abs(one["energy"]).max() if metric == "cross" else 0
            np.testing.assert_allclose(
                scaled[metric].to_numpy() / c**exponent, small, rtol=1e-5, atol=tolerance
            )
            assert exponent == 0 or np.abs(small).max() > 0

    @settings(max_examples=15, deadline=None)
    @given(scale=st.floats(1e-4, 1e5))
    def test_a_loss_scale_that_is_told_makes_no_difference(self, scale):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        plain, scaled = self.found(x), self.found(x, weight=scale, grad_scale=scale)
        np.testing.assert_allclose(scaled.to_numpy(), plain.to_numpy(), rtol=1e-5)
        untold = self.found(x, weight=3.0)
        for metric in ("grad_energy", "feature_grad_energy"):
            np.testing.assert_allclose(untold[metric], 9 * plain[metric], rtol=1e-5)

    @settings(max_examples=15, deadline=None)
    @given(kappa=st.just(0.0) | st.floats(1e-3, 2.0))
    def test_the_measured_gain_is_the_schemes_kappa(self, kappa):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        found = self.found(x, f"uniform:{kappa}")
        np.testing.assert_allclose(found["kappa"].to_numpy(), kappa, rtol=1e-10)
        if kappa == 0:
            assert (found["energy"]["ku"] == 0).all()
            assert (found["cross"] == 0).all()


class TestEasilyWrong:
    """Cases in which plausible code records a plausible, wrong number."""

    def test_a_grad_scaler_that_has_unscaled_the_parameters_gradients(self, cases):
        def recorded(scale, unscale):
            case = cases["add"]
            net = case.net()
            x, t, _ = case.data()
            with StabilityProbe(net, case.skips(net), sensitivity_every=0) as probe:
                (scale * net(x, t).square().mean()).backward()
                if unscale:
                    for p in net.parameters():
                        p.grad /= scale
                probe.step(grad_scale=scale, grads_unscaled=unscale)
            frame = probe.frame()
            return frame[frame.metric.isin(["grad_energy", "feature_grad_energy"])].value.to_numpy()

        for unscale in (False, True):
            np.testing.assert_allclose(recorded(2.0**10, unscale), recorded(1.0, False), rtol=1e-4)

    def test_gradients_of_two_forward_passes_fall_into_their_own_noise_bins(self):
        net = TheoryUNet(8, 2)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        with StabilityProbe(net, find_skips(net, x), sensitivity_every=0) as probe:
            noisy, clean = net(x, torch.full((4,), 990)), net(x, torch.full((4,), 10))
            (noisy.square().mean() + 0 * clean.square().mean()).backward()
            probe.step()
        found = probe.frame().query(
            "metric == 'feature_grad_energy' and site == 'h' and level == 1"
        )
        by_bin = found.set_index("stat").value
        assert by_bin["t0"] == 0 < by_bin["t3"]

    def test_a_copy_of_a_probed_model_is_not_probed(self):
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)
        with StabilityProbe(net, find_skips(net, x), sensitivity_every=0) as probe:
            net(x).mean().backward()
            average = copy.deepcopy(net)
            for _ in range(3):
                average(7 * x).mean().backward()
            probe.step()
        energies = probe.frame().query("metric == 'energy' and site == 'x'").value
        np.testing.assert_allclose(energies, 8.0, rtol=1e-6)

    def test_a_step_after_the_gradients_were_zeroed_is_refused(self):
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)
        with (
            pytest.raises(StabilityProbeError, match=r"call step\(\) before the gradients"),
            StabilityProbe(net, find_skips(net, x), sensitivity_every=0) as probe,
        ):
            net(x).sum().backward()
            net.zero_grad()
            probe.step()

    @pytest.mark.parametrize(
        ("every", "idle", "expected"),
        [
            (1, (), [1, 10, 20, 30]),
            (3, (), [1, 12, 21, 30]),
            (10, (), [1, 10, 20, 30]),
            (25, (), [1, 25]),
            (10, (10, 20, 21), [1, 11, 22, 30]),
        ],
    )
    def test_details_are_recorded_once_in_ten_steps(self, every, idle, expected):
        """Those of them that are recorded, whichever they are; going on elsewhere changes none."""
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)
        skips, frames, state = find_skips(net, x), [], None
        for first, last in ((1, 17), (18, 32)):
            probe = StabilityProbe(net, skips, every=every, sensitivity_every=0)
            if state is not None:
                probe.load_state_dict(state)
            with probe:
                for step in range(first, last + 1):
                    if step not in idle:
                        net(x).square().mean().backward()
                    probe.step()
                    net.zero_grad()
                probe.flush()
                state = probe.state_dict()
            frames.append(probe.frame())
        frame = pd.concat(frames)
        for metric in ("param_energy", "feature_grad_energy"):
            assert frame[frame.metric == metric].step.unique().tolist() == expected
        recorded = frame[frame.metric == "grad_energy"].step.unique().tolist()
        assert set(expected) <= set(recorded)

    def test_a_parameter_that_is_unfrozen_or_replaced_is_recorded_from_then_on(self):
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)
        first, last = net.encoder[0].layer1, net.encoder[1].layer1
        first.weight.requires_grad_(False)
        with StabilityProbe(net, find_skips(net, x), every=1, **DETAILED) as probe:
            for step in range(3):
                if step == 1:
                    first.weight.requires_grad_(True)
                if step == 2:
                    last.weight = nn.Parameter(100 * last.weight.detach())
                net(x).square().mean().backward()
                probe.step()
                net.zero_grad()
        frame = probe.frame()
        rows = frame[frame.metric == "param_energy"].set_index(["site", "step"]).value
        assert sorted(rows["a/encoder.0.layer1.weight"].index) == [2, 3]
        size = rows["a/encoder.1.layer1.weight"]
        assert size[3] == pytest.approx(1e4 * size[2], rel=1e-5)

    def test_a_pass_that_fails_and_is_tried_again_counts_once(self):
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)

        def out_of_memory(module, args):
            raise RuntimeError("out of memory")

        with StabilityProbe(net, find_skips(net, x), sensitivity_every=0) as probe:
            net(x).sum().backward()  # a first micro-batch that works
            with (
                net.decoder[0].register_forward_pre_hook(out_of_memory),
                pytest.raises(RuntimeError, match="out of memory"),
            ):
                net(100 * x, torch.full((4,), 990))
            net(2 * x).sum().backward()
            probe.step()
        energies = probe.frame().query("metric == 'energy' and site == 'x'").set_index("stat").value
        assert energies[["mean", "max"]].tolist() == pytest.approx([(8 + 32) / 2, 32])
        assert not probe.frame().stat.str.startswith("t").any()

    def test_a_due_step_without_a_training_pass_is_made_up_for(self):
        """A network that is trained in every other step, as in adversarial training."""
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)
        with StabilityProbe(net, find_skips(net, x), every=2, sensitivity_every=0) as probe:
            for step in range(1, 7):
                if step % 2:
                    net(x).sum().backward()
                probe.step(loss=1.0)
        frame = probe.frame()
        assert frame.step.unique().tolist() == [1, 3, 5]
        assert frame[frame.metric == "energy"].groupby("step").size().nunique() == 1

    def test_a_state_taken_before_the_first_pass_is_whole(self):
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)
        config = ProbeConfig(updates=True)
        options = {"sensitivity_every": 0, "config": config, "every": 1}
        with StabilityProbe(net, find_skips(net, x), **options) as probe:
            net(x).sum().backward()
            probe.step()
        state = probe.state_dict()
        again = StabilityProbe(net, find_skips(net, x), **options)
        again.load_state_dict(state)
        assert len(again.state_dict()["moved_from"]) == len(list(net.parameters()))
        assert again.state_dict()["steps"] == 1

    def test_skips_that_are_not_all_there_are_refused(self):
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)
        with pytest.raises(StabilityProbeError, match=r"levels 1..N in order, got \[2\]"):
            StabilityProbe(net, find_skips(net, x)[1:])

    def test_a_loss_may_be_a_plain_number(self):
        net, x = TheoryUNet(8, 2), torch.ones(4, 8)
        with StabilityProbe(net, find_skips(net, x), sensitivity_every=0) as probe:
            net(x).mean().backward()
            probe.step(loss=0.5)
        assert set(probe.frame().query("metric == 'loss'").value) == {0.5}
