"""A checkpoint as a run whose steps are noise levels."""

import numpy as np
import pytest
import torch

from stability_probe import (
    ConstantScaling,
    LearnableScaling,
    ProbeBatch,
    Run,
    StabilityProbeError,
    find_skips,
)
from stability_probe.probes import SensitivityConfig
from stability_probe.runs import ProbedPoint, ProbingConfig, record_checkpoint
from stability_probe.verify import Evidence
from tests.oracles.zoo import CASES, T, X, hook_count

QUICK = ProbingConfig(SensitivityConfig(directions=1, max_products=12, memory=1, paths=True))


def points(*levels, samples=2, **changes):
    generator = torch.Generator().manual_seed(0)
    found = []
    for t in levels:
        x = torch.randn(samples, *X.shape[1:], generator=generator)
        batch = ProbeBatch((x, torch.full((samples,), int(t))), **changes)
        found.append(ProbedPoint(t, batch))
    return found


@pytest.fixture
def net():
    return CASES["uvit"].build()


def record(net, tmp_path, where=None, **options):
    where = where or points(50.0, 900.0, target=torch.zeros(2, *X.shape[1:]))
    skips = find_skips(CASES["uvit"].build(), X, T)
    options = {"config": QUICK} | options
    return record_checkpoint(net, skips, where, Run(tmp_path / "run"), **options)


def test_records_and_what_is_known(net, tmp_path):
    seen = []
    run = record(net, tmp_path, on_point=lambda: seen.append(1), info={"checkpoint": "a.pt"})
    info = run.info
    assert (info["kind"], info["state"], info["checkpoint"]) == ("checkpoint", "complete", "a.pt")
    assert (info["noise_levels"], info["dtype"], info["scheme"]) == (
        [50, 900],
        "float32",
        "unscaled",
    )
    assert info["kappa"] == [1.0, 1.0]
    assert [s["kappa"] for s in info["skips"]] == [1.0, 1.0]
    assert len(seen) == 2
    frame = run.records()
    assert sorted(frame.step.unique()) == [1, 2]
    assert set(frame.metric) == {
        "energy", "cross", "kappa", "feature_grad_energy", "loss", "secant", "secant_mean",
        "secant_worst", "sigma_max", "sigma_max_upper", "lipschitz", "lipschitz_upper", "path",
        "path_upper", "path_share", "path_alignment", "path_gap", "sample_energy",
        "sample_kappa", "sample_loss", "sample_grad_energy", "counterfactual_energy",
    }  # fmt: skip
    assert np.isfinite(frame.value).all()


def test_energies_are_those_of_the_samples_at_their_level(net, tmp_path):
    where = points(50.0, 900.0)
    evidence = Evidence.of(record(net, tmp_path, where))
    for step, point in enumerate(where):
        np.testing.assert_allclose(
            evidence.samples("sample_energy", "x", 0)[step],
            point.batch.x.flatten(1).square().sum(1),
            rtol=1e-5,
        )
    assert evidence.kappa == [1.0, 1.0]
    assert not evidence.input_dependent


def test_gradients_need_a_target(net, tmp_path):
    frame = record(net, tmp_path, points(50.0)).records()
    assert not {"loss", "sample_loss", "sample_grad_energy", "feature_grad_energy"} & set(
        frame.metric
    )


def test_per_sample_gradients_one_after_the_other_are_those_of_all_at_once(net, tmp_path):
    where = points(50.0, target=torch.zeros(2, *X.shape[1:]))
    together = ProbingConfig(SensitivityConfig(directions=1, max_products=12))
    a = Evidence.of(record(net, tmp_path / "a", where))
    b = Evidence.of(record(net, tmp_path / "b", where, config=together))
    for kind in "ab":
        x, y = (e.samples("sample_grad_energy", kind) for e in (a, b))
        assert x.shape == y.shape == (1, 2, 2)
        np.testing.assert_allclose(x, y, rtol=1e-4)


def test_a_network_without_noise_levels(tmp_path):
    net, x = CASES["theory-add"].build(), torch.randn(3, 1, 64)
    skips = find_skips(net, CASES["theory-add"].args[0])
    where = [ProbedPoint(None, ProbeBatch((CASES["theory-add"].args[0],)))]
    run = record_checkpoint(net, skips, where, Run(tmp_path / "run"), config=QUICK)
    assert run.info["noise_levels"] is None
    assert x.shape[0] == 3


@pytest.mark.parametrize(
    ("scheme", "kappa"), [(ConstantScaling(0.5), [1, 0.5]), (LearnableScaling(), None)]
)
def test_under_a_scheme(net, tmp_path, scheme, kappa):
    run = record(net, tmp_path, points(50.0), scheme=scheme)
    assert run.info["kappa"] == kappa
    assert run.info["scheme"] == scheme.name
    gains = Evidence.of(run).samples("sample_kappa", "skip")[0]
    if kappa:
        np.testing.assert_allclose(gains, np.broadcast_to([[1], [0.5]], (2, 2)), rtol=1e-6)
    else:
        assert (gains < 1).all()
    assert not hasattr(net, "se")


def test_the_network_is_left_as_it_was(net, tmp_path):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.random.get_rng_state()
    record(net, tmp_path)
    assert net.training
    assert hook_count(net) == 0
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


class TestMemory:
    """A network that runs out of memory with more than so many samples."""

    def limited(self, net, most, error=None):
        error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

        def hook(module, args):
            if len(args[0]) > most:
                raise error

        net.register_forward_pre_hook(hook)
        return net

    def test_the_batch_is_halved_until_it_fits(self, net, tmp_path):
        said = []
        run = record(
            self.limited(net, 2), tmp_path, points(50.0, 900.0, samples=8), on_smaller=said.append
        )
        assert said == [4, 2]
        energies = Evidence.of(run).samples("sample_energy", "x")
        assert energies.shape == (2, 1, 2)
        assert np.isfinite(energies).all()

    @pytest.mark.parametrize(
        "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    )
    def test_every_kind_of_it(self, net, tmp_path, error):
        said = []
        record(self.limited(net, 1, error), tmp_path, points(50.0), on_smaller=said.append)
        assert said == [1]

    def test_one_sample_that_is_too_many(self, net, tmp_path):
        with pytest.raises(StabilityProbeError, match="out of memory with 1 samples"):
            record(self.limited(net, 0), tmp_path, points(50.0), on_smaller=lambda n: None)
        assert Run.open(tmp_path / "run").info["state"] == "failed"

    def test_only_the_first_noise_level_may_take_fewer_samples(self, net, tmp_path):
        passes = []

        def hook(module, args):
            passes.append(args[1][0].item())
            if args[1][0] == 900 and len(args[0]) > 1:
                raise MemoryError

        net.register_forward_pre_hook(hook)
        with pytest.raises(StabilityProbeError, match="out of memory with 2 samples"):
            record(net, tmp_path, points(50.0, 900.0), on_smaller=lambda n: None)
        assert {50, 900} == set(passes)
        run = Run.open(tmp_path / "run")
        assert (run.info["state"], set(run.records().step)) == ("failed", {1})

    def test_a_network_that_takes_one_size_of_batch_is_not_given_less(self, net, tmp_path):
        said = []
        with pytest.raises(StabilityProbeError, match="out of memory with 2 samples"):
            record(self.limited(net, 1), tmp_path, points(50.0, whole=True), on_smaller=said.append)
        assert said == []

    def test_other_errors_pass(self, net, tmp_path):
        with pytest.raises(RuntimeError, match="shapes"):
            record(self.limited(net, 1, RuntimeError("shapes")), tmp_path, points(50.0))
        info = Run.open(tmp_path / "run").info
        assert (info["state"], info["reason"]) == ("failed", "RuntimeError: shapes")


def test_nothing_to_probe(net, tmp_path):
    with pytest.raises(StabilityProbeError, match="needs long skips and noise levels, got 0 and 1"):
        record_checkpoint(net, [], points(50.0), Run(tmp_path / "run"))
    with pytest.raises(StabilityProbeError, match="got 2 and 0"):
        record_checkpoint(net, find_skips(net, X, T), [], Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_kept(net, tmp_path):
    record(net, tmp_path, points(50.0))
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(StabilityProbeError, match="holds a run already"):
        record(net, tmp_path, points(50.0))
    assert (tmp_path / "run" / "run.json").read_text() == before
