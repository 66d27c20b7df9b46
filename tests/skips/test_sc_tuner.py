import copy
import math
import pickle

import pytest
import torch

from stability_probe import StabilityProbeError
from stability_probe.skips.sc_tuner import SCTuner
from tests.oracles.skips import skips_of

SHAPES = {"vectors": (6,), "tokens": (5, 6), "maps": (6, 3, 4), "volumes": (6, 2, 3, 2)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def prepared(*shapes, trained=True, **options):
    """A tuner for these skips, in float64, its last layers no longer zero if `trained`."""
    scheme = SCTuner(**options)
    scheme.prepare(skips_of(*shapes))
    if trained:
        for seed, p in enumerate(scheme.parameters()):
            p.data = 0.5 * randn(*p.shape, seed=seed, dtype=p.dtype)
    return scheme.double()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def by_hand(scheme, u, level=1):
    """T(u) with the edited dimension written out by einsum."""
    layers = getattr(scheme, str(level))
    names = {2: "bc", 3: "blc", 4: "bchw", 5: "bcdhw"}[u.ndim]
    over, out = names, names.replace("c", "k")
    expand = tuple(1 if n == "c" else 0 for n in names)
    view = [-1 if e else 1 for e in expand]
    hidden = torch.einsum(f"{over},kc->{out}", u, layers.layer1.weight)
    hidden = gelu(hidden + layers.layer1.bias.view(view))
    edit = torch.einsum(f"{out},ck->{over}", hidden, layers.layer2.weight)
    return u + scheme.strength * (edit + layers.layer2.bias.view(view))


@every_shape
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_by_hand(shape, strength):
    scheme = prepared(shape, strength=strength, reduction=2)
    u = randn(2, *shape)
    torch.testing.assert_close(scheme(u, 1), by_hand(scheme, u))
    assert (scheme(u, 1) - u).abs().max() > 0.1


def test_one_number_by_hand():
    scheme = prepared((1,))
    for layer, weight, bias in [("layer1", 2.0, 1.0), ("layer2", 3.0, 0.5)]:
        getattr(scheme.get_submodule("1"), layer).weight.data.fill_(weight)
        getattr(scheme.get_submodule("1"), layer).bias.data.fill_(bias)
    u = torch.tensor([[-0.5]]).double()  # 2(-0.5) + 1 = 0 and GELU(0) = 0
    assert scheme(u, 1).item() == 0.0  # -0.5 + 0.5


@every_shape
def test_identity_at_the_start(shape):
    scheme = prepared(shape, trained=False)
    u = randn(2, *shape)
    assert torch.equal(scheme(u, 1), u)


@every_shape
def test_gradient_at_the_start_reaches_the_last_layer(shape):
    scheme = prepared(shape, trained=False)
    scheme(randn(2, *shape), 1).square().sum().backward()
    first, last = scheme.get_submodule("1.layer1"), scheme.get_submodule("1.layer2")
    assert last.weight.grad.abs().max() > 0
    assert last.bias.grad.abs().max() > 0
    assert (first.weight.grad == 0).all()  # W_2 = 0 hides it until W_2 has moved


@every_shape
def test_gradients(shape):
    scheme = prepared(shape, reduction=3, strength=0.5)
    u = randn(1, *shape).requires_grad_()
    names = [name for name, _ in scheme.named_parameters()]

    def call(u, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(scheme, values, (u, 1))

    parameters = [p.detach().clone().requires_grad_() for p in scheme.parameters()]
    assert torch.autograd.gradcheck(call, (u, *parameters))


def test_positions_do_not_mix():
    scheme = prepared((6, 3, 4))
    u = randn(1, 6, 3, 4)
    changed = u.clone()
    changed[..., 1, 2] += 1
    moved = (scheme(changed, 1) - scheme(u, 1)).abs().sum((0, 1)) > 0
    assert moved.nonzero().tolist() == [[1, 2]]


def test_strength_zero_is_the_tensor_itself():
    u = randn(2, 6, 3, 4)
    assert prepared((6, 3, 4), strength=0.0)(u, 1) is u


def test_the_edit_is_linear_in_the_strength():
    scheme = prepared((6, 3, 4), strength=1.0)
    u = randn(2, 6, 3, 4)
    whole = scheme(u, 1) - u
    scheme.strength = 0.25
    torch.testing.assert_close(scheme(u, 1) - u, 0.25 * whole)


def test_one_tuner_a_level():
    scheme = SCTuner(reduction=4)
    scheme.prepare(skips_of((8, 4, 4), (16, 2, 2), (3, 2, 2)))
    shapes = {name: tuple(p.shape) for name, p in scheme.named_parameters()}
    assert shapes == {
        "1.layer1.weight": (2, 8), "1.layer1.bias": (2,),
        "1.layer2.weight": (8, 2), "1.layer2.bias": (8,),
        "2.layer1.weight": (4, 16), "2.layer1.bias": (4,),
        "2.layer2.weight": (16, 4), "2.layer2.bias": (16,),
        "3.layer1.weight": (1, 3), "3.layer1.bias": (1,),
        "3.layer2.weight": (3, 1), "3.layer2.bias": (3,),
    }  # fmt: skip
    assert scheme.coefficients(3) is None
    assert scheme.name == "sc-tuner"


def test_as_many_numbers_as_published_for_stable_diffusion():
    scheme = SCTuner()
    scheme.prepare(skips_of(*[(c, 1, 1) for c in [320] * 4 + [640] * 3 + [1280] * 5]))
    assert sum(p.numel() for p in scheme.parameters()) == pytest.approx(19.68e6, abs=5e3)


def test_levels_use_their_own_tuner():
    scheme = prepared((6, 3, 4), (6, 3, 4))
    u = randn(2, 6, 3, 4)
    torch.testing.assert_close(scheme(u, 2), by_hand(scheme, u, level=2))
    assert not torch.equal(scheme(u, 1), scheme(u, 2))


def test_preparing_again_keeps_what_was_learned():
    scheme = prepared((8, 3), (8, 3))
    before = dict(scheme.named_parameters())
    scheme.prepare(skips_of((8, 3), (8, 3)))
    after = dict(scheme.named_parameters())
    assert after.keys() == before.keys()
    assert all(p is before[name] for name, p in after.items())


def test_weights_come_from_the_generator_alone():
    def weights(generator=None):
        return prepared((64, 8), trained=False, generator=generator).state_dict()["1.layer1.weight"]

    rng = torch.random.get_rng_state()
    first, again = weights(), weights()
    other = weights(torch.Generator().manual_seed(4))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_copies_behave_the_same():
    scheme = prepared((6, 3, 4), (6,), generator=torch.Generator().manual_seed(1))
    u = randn(2, 6, 3, 4)
    fresh = prepared((6, 3, 4), (6,), trained=False)
    assert not torch.equal(fresh(u, 1), scheme(u, 1))
    fresh.load_state_dict(scheme.state_dict())
    for other in (copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme)), fresh):
        assert torch.equal(other(u, 1), scheme(u, 1))


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), float("inf")])
def test_rejects_a_strength(strength):
    with pytest.raises(
        StabilityProbeError, match=rf"strength must lie in \[0, 1\], got {strength:g}"
    ):
        SCTuner(strength=strength)


@pytest.mark.parametrize("reduction", [0, -1])
def test_rejects_a_reduction(reduction):
    with pytest.raises(
        StabilityProbeError, match=f"sc-tuner: reduction must be at least 1, got {reduction}"
    ):
        SCTuner(reduction=reduction)


@pytest.mark.parametrize("shapes", [[(8, 4)], [(6, 3, 4), (6, 3, 4)], [(7, 3, 4)]])
def test_rejects_other_skips(shapes):
    scheme = prepared((6, 3, 4))
    with pytest.raises(StabilityProbeError, match="tuners for other skips; make one for each"):
        scheme.prepare(skips_of(*shapes))


def test_rejects_an_unknown_level():
    with pytest.raises(StabilityProbeError, match=r"level 2 has no tuner; call prepare\(skips\)"):
        prepared((6,))(randn(1, 6), 2)
