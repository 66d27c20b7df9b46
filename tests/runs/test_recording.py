"""Recorded training runs and ensembles."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from stability_probe import Run, StabilityProbeError, TheoryUNet, find_skips, scale_skips
from stability_probe.errors import TrainingDiverged
from stability_probe.probes import COLUMNS, ProbeConfig, SensitivityConfig
from stability_probe.probes import probe as probe_module
from stability_probe.runs import (
    EnsembleConfig,
    RecordConfig,
    TrainConfig,
    build_model,
    load_images,
    open_runs,
    record_ensemble,
    record_training,
    train,
)
from stability_probe.runs.recording import seeded_scaling
from stability_probe.skips import LearnableScaling
from tests.oracles.recording import energy, run_pass

QUICK = {"model": "theory-unet", "n_skips": 2, "batch_size": 8, "steps": 6, "warmup": 2}
PROBING = RecordConfig(
    sensitivity_every=3,
    probe_samples=5,
    sensitive_samples=2,
    probe=ProbeConfig(
        updates=True,
        flush_every=3,
        sensitivity=SensitivityConfig(epsilons=(1e-2,), directions=1, max_products=3),
    ),
)
PLAIN = RecordConfig(sensitivity_every=0)


class TestTraining:
    @pytest.fixture(scope="class")
    def recorded(self, tmp_path_factory):
        """A run, and the steps that its callback was told of."""
        steps = []
        run = record_training(
            TrainConfig(**QUICK, scheme="cs:0.5", seed=3),
            tmp_path_factory.mktemp("runs") / "cs",
            PROBING,
            steps.append,
        )
        return run, steps

    def test_run_json_says_what_it_was(self, recorded):
        run, _ = recorded
        info = json.loads((run.path / "run.json").read_text())
        assert (info["kind"], info["state"], info["reason"]) == ("training", "complete", None)
        assert (info["scheme"], info["seed"], info["kappa"]) == ("cs:0.5", 3, [1.0, 0.5])
        assert TrainConfig(**info["config"]) == TrainConfig(**QUICK, scheme="cs:0.5", seed=3)
        assert [s["level"] for s in info["skips"]] == [1, 2]
        assert info["parameters"] == 10 * 64 * 64
        alpha_squared = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).mean()
        assert info["input"]["m"] == 64
        assert info["input"]["mean_alpha_squared"] == pytest.approx(alpha_squared, rel=1e-5)
        second_moment = load_images("digits").double().square().mean().item()
        assert info["input"]["second_moment"] == pytest.approx(second_moment, rel=1e-9)
        assert info["probe"]["elapsed_s"] > 0

    def test_every_step_is_recorded_and_told_of(self, recorded):
        run, steps = recorded
        frame = run.records()
        assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6]
        assert sorted(frame[frame.metric == "energy"].step.unique()) == [1, 2, 3, 4, 5, 6]
        assert sorted(frame[frame.metric == "sigma_max"].step.unique()) == [1, 3, 6]
        losses = frame[(frame.metric == "loss") & (frame.stat == "mean")].value
        assert losses.tolist() == pytest.approx([s.loss.mean().item() for s in steps], rel=1e-6)
        assert tuple(frame.columns) == COLUMNS
        assert not frame.duplicated(list(COLUMNS[:-1])).any()

    def test_the_measurements_are_on_as_many_samples_as_asked_for(self, recorded):
        frame = recorded[0].records()
        first = frame[frame.step == 1]
        counts = first[first.stat.str.match(r"s\d")].groupby("metric", observed=True).stat.nunique()
        assert counts.to_dict() == {
            "secant": 2, "secant_mean": 2, "secant_worst": 2,
            "sigma_max": 2, "sigma_max_upper": 2, "lipschitz": 2, "lipschitz_upper": 2,
            "sample_energy": 5, "sample_kappa": 5, "sample_loss": 5, "sample_grad_energy": 5,
        }  # fmt: skip
        assert "update_ratio" in set(frame.metric)

    def test_the_measured_gain_is_kappa(self, recorded):
        frame = recorded[0].records()
        kappa = frame[(frame.metric == "kappa") & (frame.stat == "mean")]
        for level, expected in ((1, 1.0), (2, 0.5)):
            found = kappa[kappa.level == level].value
            assert found.tolist() == pytest.approx([expected] * 6, rel=1e-6)

    @pytest.mark.parametrize("scheme", ["unscaled", "ls"])
    def test_training_is_the_same_as_without_recording(self, tmp_path, scheme):
        """Bitwise: the same losses at every step from the loop alone."""
        c = TrainConfig(**(QUICK | {"model": "uvit", "width": 16}), scheme=scheme, seed=5)
        recorded = []
        record_training(c, tmp_path / "run", PROBING, lambda s: recorded.append(s.loss))
        images = load_images("digits")
        model = build_model(c, images.shape[1:])
        skips = find_skips(model, images[:1], torch.zeros(1).long())
        with scale_skips(model, skips, seeded_scaling(c.scheme, c.seed)):
            plain = [s.loss for s in train(model, images, c)]
        assert len(plain) == 6
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))

    def test_the_same_seed_records_the_same(self, recorded, tmp_path):
        run, _ = recorded
        for seed, same in ((3, True), (4, False)):
            c = TrainConfig(**QUICK, scheme="cs:0.5", seed=seed)
            again = record_training(c, tmp_path / str(seed), PROBING)
            assert (again.records().value.tolist() == run.records().value.tolist()) is same

    def test_only_some_steps(self, tmp_path):
        c = TrainConfig(**QUICK)
        run = record_training(c, tmp_path / "run", RecordConfig(every=4, sensitivity_every=0))
        assert sorted(run.records().step.unique()) == [1, 4]

    @pytest.mark.parametrize("levels", [50, 1000])
    def test_noise_bins_span_the_noise_levels_of_the_run(self, tmp_path, levels):
        c = TrainConfig(**(QUICK | {"batch_size": 64}), noise_levels=levels)
        counts = record_training(c, tmp_path / "run", PLAIN).records().query("metric == 'samples'")
        assert set(counts.stat) == {"t0", "t1", "t2", "t3"}
        assert counts.value.sum() == 6 * 64
        assert counts.groupby("stat", observed=True).value.sum().between(60, 140).all()

    def test_gates_train_and_are_counted(self, tmp_path):
        c = TrainConfig(**QUICK, scheme="ls")
        run = record_training(c, tmp_path / "run", PLAIN)
        assert run.info["kappa"] is None
        assert run.info["parameters"] > 10 * 64 * 64
        frame = run.records()
        gates = frame[(frame.metric == "grad_energy") & frame.site.str.contains("se.layer1.weight")]
        assert len(gates) == 6
        assert (gates.value > 0).any()

    def test_gates_come_from_the_seed(self):
        def weights(scheme, seed):
            scheme = seeded_scaling(scheme, seed)
            assert isinstance(scheme, LearnableScaling)
            net = TheoryUNet(32, 2)
            scheme.prepare(find_skips(net, torch.zeros(1, 32)))
            return torch.cat([p.flatten() for p in scheme.parameters()])

        for name in ("ls", "ls-non-shared"):
            assert torch.equal(weights(name, 1), weights(name, 1))
            assert not torch.equal(weights(name, 1), weights(name, 2))
        assert len(weights("ls-non-shared", 1)) == 2 * len(weights("ls", 1))
        assert seeded_scaling("cs:0.5", 1).coefficients(2) == [1.0, 0.5]

    def test_a_training_that_diverges_fails_readably(self, tmp_path):
        """A vast learning rate overflows the weights at the first step and the loss after it."""
        c = TrainConfig(**(QUICK | {"warmup": 0, "learning_rate": 1e30}))
        told = []
        with pytest.raises(TrainingDiverged, match="not finite at step 2 of 6"):
            record_training(c, tmp_path / "run", PROBING, lambda s: told.append(s.step))
        run = Run.open(tmp_path / "run")
        assert run.info["state"] == "failed"
        assert run.info["reason"] == "TrainingDiverged: the loss was not finite at step 2 of 6"
        frame = run.records()
        assert told == sorted(frame.step.unique()) == [1, 2]
        loss = frame[(frame.metric == "loss") & (frame.stat == "mean")].set_index("step").value
        assert np.isfinite(loss[1])
        assert np.isnan(loss[2])
        energies = frame[(frame.metric == "energy") & (frame.stat == "mean")]
        assert np.isfinite(energies[energies.step == 1].value).all()
        x = energies[(energies.site == "x") & (energies.step == 2)].value
        assert np.isfinite(x).all()
        output = energies[(energies.site == "output") & (energies.step == 2)].value
        assert np.isnan(output).all()

    def test_a_failure_in_the_probe_or_the_callback_is_in_the_folder(self, tmp_path, monkeypatch):
        def fail(*args):
            raise OSError("no space\nleft")

        with pytest.raises(OSError, match="no space"):
            record_training(TrainConfig(**QUICK), tmp_path / "callback", PLAIN, fail)
        monkeypatch.setattr(probe_module, "waiting", fail)
        with pytest.raises(OSError, match="no space"):
            record_training(TrainConfig(**QUICK), tmp_path / "probe", PLAIN)
        for name in ("callback", "probe"):
            info = Run.open(tmp_path / name).info
            assert info["state"] == "failed"
            assert info["reason"].startswith("OSError: no space")
        assert set(Run.open(tmp_path / "callback").records().step) == {1}

    def test_a_used_folder_is_refused_and_left(self, recorded):
        run, _ = recorded
        before = run.info
        with pytest.raises(StabilityProbeError, match="holds a run already"):
            record_training(TrainConfig(**QUICK), run.path, PLAIN)
        assert run.info == before

    def test_an_unwritable_folder_is_refused_before_training(self, tmp_path):
        (tmp_path / "file").touch()
        told = []
        with pytest.raises(StabilityProbeError, match="cannot be written"):
            record_training(TrainConfig(**QUICK), tmp_path / "file" / "run", PLAIN, told.append)
        assert told == []


SCHEMES = ("unscaled", "cs:0.5", "uniform:0", "ls")


class TestEnsemble:
    CONFIG = EnsembleConfig(networks=3, m=16, n_skips=3, samples=5, seed=7)

    @pytest.fixture(scope="class", params=["add", "concat"])
    def ensemble(self, request, tmp_path_factory):
        c = EnsembleConfig(**(vars(self.CONFIG) | {"merge": request.param}))
        folder, told = tmp_path_factory.mktemp("ensemble"), []
        runs = record_ensemble(c, SCHEMES, folder / "all", lambda: told.append(1))
        assert len(told) == 3
        return c, runs

    def test_gradients_may_be_left_out(self, tmp_path):
        """And everything else is as with them."""
        frames = []
        for gradients in (True, False):
            c = EnsembleConfig(**(vars(self.CONFIG) | {"gradients": gradients}))
            (run,) = record_ensemble(c, ["cs:0.7"], tmp_path / str(gradients))
            frames.append(run.records())
        alone = ("sample_grad_energy", "sample_loss", "sample_energy")
        rest = frames[0][~frames[0].metric.isin(alone)].reset_index(drop=True)
        assert len(rest) < len(frames[0])
        pd.testing.assert_frame_equal(frames[1], rest, check_categorical=False, check_dtype=False)

    def direct(self, c, scheme, index):
        """The energies of one network: its seed gives first the weights, then the inputs."""
        generator = torch.Generator().manual_seed(c.seed + index)
        net = TheoryUNet(c.m, c.n_skips, merge=c.merge, unit_gain=True, generator=generator)
        x = torch.randn(c.samples, c.m, generator=generator)
        with scale_skips(net, find_skips(net, x), seeded_scaling(scheme, c.seed + index)):
            return run_pass(net, x, torch.zeros(len(x)))

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_records_are_those_of_each_network(self, ensemble, scheme):
        c, runs = ensemble
        frame = runs[SCHEMES.index(scheme)].records()
        found = frame.set_index(["step", "metric", "site", "level", "stat"]).value
        assert sorted(frame.step.unique()) == [1, 2, 3]
        single = frame.stat.str.match(r"s\d")
        assert set(frame[~single].metric) == {"energy", "kappa", "cross"}
        assert set(frame[~single].stat) == {"mean", "min", "max"}
        for step in (1, 2, 3):
            seen = self.direct(c, scheme, step - 1)
            tensors = {("x", 0): seen.x, ("output", 0): seen.output, ("h", 3): seen.z[3]}
            for i in (1, 2, 3):
                tensors |= {
                    (s, i): getattr(seen, s)[i] for s in ("u", "ku", "z", "merged")
                } | {("h", i - 1): seen.h[i - 1]}  # fmt: skip
            assert set(tensors) == {
                (row.site, row.level) for row in frame.itertuples() if row.metric == "energy"
            }
            for (site, level), tensor in tensors.items():
                e = energy(tensor)
                expected = {"mean": e.mean(), "min": e.min(), "max": e.max()}
                for stat, value in expected.items():
                    got = found[step, "energy", site, level, stat]
                    assert got == pytest.approx(value.item(), rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_gradients_are_those_of_every_sample(self, ensemble, scheme):
        """One backward pass a sample, with the targets that the seed gives after the inputs."""
        c, runs = ensemble
        frame = runs[SCHEMES.index(scheme)].records()
        found = frame.set_index(["step", "metric", "site", "level", "stat"]).value
        assert set(frame[frame.stat.str.match(r"s\d")].stat) == {f"s{s}" for s in range(5)}
        for step in (1, 2, 3):
            generator = torch.Generator().manual_seed(c.seed + step - 1)
            net = TheoryUNet(c.m, c.n_skips, merge=c.merge, unit_gain=True, generator=generator)
            x, y = (torch.randn(c.samples, c.m, generator=generator) for _ in range(2))
            gates = seeded_scaling(scheme, c.seed + step - 1)
            with scale_skips(net, find_skips(net, x), gates):
                for s in range(c.samples):
                    expected = {
                        ("sample_energy", "x", 0): x[s].square().sum(),
                        ("sample_energy", "target", 0): y[s].square().sum(),
                        ("sample_loss", "loss", 0): (net(x[s : s + 1])[0] - y[s]).square().mean(),
                    }
                    for site, level, block in (
                        *(("a", i, net.encoder[i - 1]) for i in (1, 2, 3)),
                        *(("b", i, net.decoder[i - 1].block) for i in (1, 2, 3)),
                    ):
                        loss = (net(x[s : s + 1])[0] - y[s]).square().mean()
                        weights = [block.layer1.weight, block.layer2.weight]
                        energies = [g.square().sum() for g in torch.autograd.grad(loss, weights)]
                        expected["sample_grad_energy", site, level] = max(energies)
                    for key, value in expected.items():
                        got = found[(step, *key, f"s{s}")]
                        assert got == pytest.approx(value.item(), rel=1e-4, abs=1e-7)

    def test_every_scheme_has_its_run(self, ensemble):
        c, runs = ensemble
        assert [run.name for run in runs] == ["unscaled", "cs-0.5", "uniform-0", "ls"]
        kappas = [[1.0, 1.0, 1.0], [1.0, 0.5, 0.25], [0.0, 0.0, 0.0], None]
        for run, scheme, kappa in zip(runs, SCHEMES, kappas, strict=True):
            info = Run.open(run.path).info
            assert (info["kind"], info["state"]) == ("ensemble", "complete")
            assert (info["scheme"], info["kappa"], info["block_gain"]) == (scheme, kappa, 1.0)
            assert info["config"] == vars(c)
        assert {r.name for r in open_runs([runs[0].path.parent])} == {run.name for run in runs}

    def test_schemes_meet_the_same_networks(self, ensemble):
        _, runs = ensemble
        frames = [run.records().query("site == 'u' and metric == 'energy'") for run in runs]
        for frame in frames[1:]:
            assert frame.value.tolist() == frames[0].value.tolist()

    def test_settings_change_the_networks(self, tmp_path):
        def output(**options):
            c = EnsembleConfig(**(vars(self.CONFIG) | {"networks": 1} | options))
            name = "-".join(map(str, options.values())) or "plain"
            (run,) = record_ensemble(c, ["unscaled"], tmp_path / name)
            frame = run.records().query("site == 'output' and stat == 'mean'")
            return frame.value.item(), run.info["block_gain"]

        plain, gain = output()
        kaiming, kaiming_gain = output(unit_gain=False)
        assert (gain, kaiming_gain) == (1.0, 2.0)
        assert kaiming > 4 * plain
        assert output(final_relu=True)[0] != plain
        assert output(seed=8)[0] != plain
        assert output(seed=7)[0] == plain

    def test_nothing_is_drawn_from_the_global_state(self, tmp_path):
        state = torch.get_rng_state()
        record_ensemble(self.CONFIG, ["ls"], tmp_path)
        assert torch.equal(torch.get_rng_state(), state)

    def test_gradients_need_not_be_enabled(self, ensemble, tmp_path):
        c, runs = ensemble
        with torch.no_grad():
            (run,) = record_ensemble(c, ["unscaled"], tmp_path)
        assert run.records().value.tolist() == runs[0].records().value.tolist()

    def test_one_that_is_stopped_has_failed_and_keeps_its_networks(self, tmp_path):
        told = []

        def stop():
            told.append(1)
            if len(told) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            record_ensemble(self.CONFIG, ["unscaled", "cs:0.5"], tmp_path, stop)
        for name in ("unscaled", "cs-0.5"):
            run = Run.open(tmp_path / name)
            assert run.info["state"] == "failed"
            assert run.info["reason"].startswith("KeyboardInterrupt")
            assert sorted(run.records().step.unique()) == [1, 2]

    def test_a_used_folder_is_refused(self, ensemble):
        c, runs = ensemble
        with pytest.raises(StabilityProbeError, match="holds a run already"):
            record_ensemble(c, ["unscaled"], runs[0].path.parent)

    @pytest.mark.parametrize("name", ["networks", "m", "n_skips", "samples"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_a_number_below_one_is_refused(self, name, value):
        with pytest.raises(StabilityProbeError, match=f"{name} must be at least 1, got {value}"):
            EnsembleConfig(**{name: value})

    def test_an_unknown_scheme_is_refused(self, tmp_path):
        with pytest.raises(StabilityProbeError, match="unknown scheme 'half'"):
            record_ensemble(self.CONFIG, ["half"], tmp_path / "runs")
