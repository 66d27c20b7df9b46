"""Discovery and scaling over networks whose skips were read off their source code."""

import warnings

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from torch.nn.functional import mse_loss

from stability_probe import StabilityProbeError, Uniform, find_skips, scale_skips
from stability_probe.skips import SkipWarning
from tests.oracles.architectures import NESTED, WITHOUT, ZOO, tensors
from tests.oracles.zoo import hook_count

pytestmark = pytest.mark.filterwarnings("ignore::stability_probe.skips.SkipWarning")
zoo = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


def skips_of(entry, model):
    return find_skips(model, *entry.args, **entry.kwargs)


def outputs(entry, model, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.run(model)


@zoo
def test_finds_exactly_the_skips_of_the_source_code(entry):
    model = entry.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SkipWarning)
        found = skips_of(entry, model)
    assert [(s.source, s.sink, s.merge, s.shape) for s in found] == list(entry.skips)
    assert [s.level for s in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("entry", WITHOUT.values(), ids=WITHOUT)
def test_finds_none_where_there_are_none(entry):
    assert skips_of(entry, entry.build()) == []


@pytest.mark.parametrize("entry", NESTED.values(), ids=NESTED)
def test_nested_dense_skips_are_refused_by_name(entry):
    with pytest.raises(StabilityProbeError, match="nested dense skips"):
        skips_of(entry, entry.build())


@zoo
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.slow
def test_one_is_the_identity_to_the_last_bit(entry, training):
    model = entry.build()
    skips = skips_of(entry, model)
    hooks = hook_count(model)
    model.train(training)
    plain = outputs(entry, model)
    model = entry.build().train(training)  # batch norms have moved
    with scale_skips(model, skips, Uniform(1.0)):
        scaled = outputs(entry, model)
    assert all(map(torch.equal, plain, scaled))
    assert hook_count(model) == hooks
    assert not any("forward" in vars(m) for m in model.modules())


class Replace:
    """Puts something else in the place of what passes."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, u):
        return torch.randn(u.shape, generator=self.generator, dtype=u.dtype)


@zoo
def test_zero_makes_the_output_independent_of_every_skip(entry):
    model = entry.build().eval()
    skips = skips_of(entry, model)
    plain = outputs(entry, model)
    seen = []
    for seed in (1, 2):
        handles = [s.skip.attach(model, Replace(seed)) for s in skips]
        perturbed = outputs(entry, model)
        with scale_skips(model, skips, Uniform(0.0)):
            seen.append(outputs(entry, model))
        for handle in handles:
            handle.remove()
        assert not all(map(torch.allclose, plain, perturbed))  # the tap is on the skip
    assert all(map(torch.equal, *seen))


@pytest.fixture
def double(monkeypatch):
    """Networks that make tensors of their own make them in float64, and norms compute in it."""
    monkeypatch.setattr(FP32LayerNorm, "forward", torch.nn.LayerNorm.forward)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@zoo
@pytest.mark.usefixtures("double")
@pytest.mark.slow
def test_gradient_with_respect_to_kappa_is_that_of_finite_differences(entry):
    model = entry.build().double().eval()
    args, kwargs = to_double(entry.args), to_double(entry.kwargs)
    skips = find_skips(model, *args, **kwargs)
    kappa = torch.full((len(skips),), 0.8, dtype=torch.float64, requires_grad=True)

    def loss(k):
        handles = [s.skip.attach(model, lambda u, i=i: u * k[i]) for i, s in enumerate(skips)]
        try:
            found = tensors(model(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
        return sum(mse_loss(t, torch.ones_like(t)) for t in found if t.is_floating_point())

    (analytic,) = torch.autograd.grad(loss(kappa), kappa)
    assert analytic.isfinite().all() and (analytic != 0).all()
    for i in range(len(skips)):
        step = torch.zeros_like(kappa)
        step[i] = 1e-6
        with torch.no_grad():
            numeric = (loss(kappa + step) - loss(kappa - step)) / 2e-6
        assert numeric.item() == pytest.approx(analytic[i].item(), rel=2e-3, abs=1e-7)


def to_double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: to_double(item) for name, item in value.items()}
    return type(value)(map(to_double, value)) if isinstance(value, tuple | list) else value
