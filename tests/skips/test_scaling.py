from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe import StabilityProbeError
from stability_probe.skips import (
    ConstantScaling,
    FixedScaling,
    InverseSqrt2,
    LearnableScaling,
    Scaling,
    Uniform,
    Unscaled,
)
from tests.oracles.skips import skips_of

laws = settings(deadline=None, derandomize=True, max_examples=50)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ── constants ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("scheme", "name", "expected"),
    [
        (Unscaled(), "unscaled", [1, 1, 1, 1]),
        (InverseSqrt2(), "inverse-sqrt2", [0.5**0.5] * 4),
        (Uniform(0.25), "uniform:0.25", [0.25] * 4),
        (Uniform(0.0), "uniform:0", [0, 0, 0, 0]),
        (Uniform(3.0), "uniform:3", [3, 3, 3, 3]),
        (ConstantScaling(0.5), "cs:0.5", [1, 0.5, 0.25, 0.125]),
        (ConstantScaling(kappa=1.0), "cs:1", [1, 1, 1, 1]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_coefficients(scheme, name, expected):
    assert scheme.name == name
    assert scheme.coefficients(4) == pytest.approx(expected, rel=1e-12, abs=0)
    assert scheme.coefficients(0) == []
    assert not list(scheme.parameters())
    u = randn(2, 3)
    for level, kappa in enumerate(expected, start=1):
        torch.testing.assert_close(scheme(u, level), kappa * u)


@pytest.mark.parametrize("scheme", [Unscaled(), Uniform(1.0), ConstantScaling(1.0)])
def test_one_leaves_the_tensor_itself(scheme):
    u = randn(2, 3)
    assert all(scheme(u, level) is u for level in (1, 2, 5))


def test_zero_is_not_off():
    assert (Uniform(0.0)(randn(2, 3), 1) == 0).all()


@laws
@given(st.floats(0.01, 1.0), st.integers(1, 12))
def test_cs_decays_from_one_at_the_outermost_skip(kappa, n):
    coefficients = ConstantScaling(kappa).coefficients(n)
    assert coefficients[0] == 1
    assert coefficients == sorted(coefficients, reverse=True)
    for outer, inner in pairwise(coefficients):
        assert inner == pytest.approx(kappa * outer)


@pytest.mark.parametrize("c", [-0.1, float("nan"), float("inf"), float("-inf")])
def test_uniform_rejects(c):
    with pytest.raises(
        StabilityProbeError, match=rf"uniform scaling: κ must be a finite number ≥ 0, got {c:g}"
    ):
        Uniform(c)


@pytest.mark.parametrize("kappa", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_cs_rejects(kappa):
    with pytest.raises(
        StabilityProbeError, match=rf"cs scaling: κ must lie in \(0, 1\], got {kappa:g}"
    ):
        ConstantScaling(kappa)


def test_the_base_has_no_behaviour():
    with pytest.raises(NotImplementedError):
        Scaling().coefficients(1)
    with pytest.raises(NotImplementedError):
        Scaling()(randn(1, 1), 1)


# ── learnable ────────────────────────────────────────────────────────────────────────────────────


def gates(scheme):
    return {name: tuple(p.shape) for name, p in scheme.named_parameters()}


def network(hidden, size, prefix=""):
    return {
        f"{prefix}layer1.weight": (hidden, size),
        f"{prefix}layer1.bias": (hidden,),
        f"{prefix}layer2.weight": (size, hidden),
        f"{prefix}layer2.bias": (size,),
    }


def test_shared_is_one_network_for_skips_of_one_size():
    scheme = LearnableScaling()
    scheme.prepare(skips_of((32, 8), (32, 8), (32, 8)))
    assert gates(scheme) == network(2, 32)
    assert scheme.coefficients(3) is None


def test_shared_is_one_network_for_each_size():
    scheme = LearnableScaling()
    scheme.prepare(skips_of((8, 4, 4), (8, 2, 2), (48, 2, 2)))
    assert gates(scheme) == network(1, 8, "size8.") | network(3, 48, "size48.")


def test_non_shared_is_one_network_a_skip_the_deepest_first():
    scheme = LearnableScaling(shared=False)
    scheme.prepare(skips_of((16, 4, 4), (32, 2, 2), (48, 2, 2)))  # level 3 has 48
    expected = network(3, 48, "0.") | network(2, 32, "1.") | network(1, 16, "2.")
    assert gates(scheme) == expected


@pytest.mark.parametrize(
    ("reduction", "hidden"), [(1, 32), (4, 8), (5, 6), (16, 2), (33, 1), (1000, 1)]
)
def test_reduction(reduction, hidden):
    scheme = LearnableScaling(reduction=reduction)
    scheme.prepare(skips_of((32, 8)))
    assert gates(scheme) == network(hidden, 32)


@pytest.mark.parametrize(
    ("shape", "pool", "expand"),
    [
        ((6, 5), lambda u: u.mean(2), lambda g: g[:, :, None]),  # tokens
        ((6, 5, 4), lambda u: u.mean((2, 3)), lambda g: g[:, :, None, None]),  # maps
        ((6, 2, 3, 4), lambda u: u.mean((2, 3, 4)), lambda g: g[:, :, None, None, None]),
        ((6,), lambda u: u, lambda g: g),  # vectors: a gate for every number
    ],
    ids=["tokens", "maps", "volumes", "vectors"],
)
def test_gate_by_hand(shape, pool, expand):
    scheme = LearnableScaling(reduction=2)
    scheme.prepare(skips_of(shape))
    u = randn(3, *shape)
    hidden = (pool(u) @ scheme.layer1.weight.T + scheme.layer1.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ scheme.layer2.weight.T + scheme.layer2.bias)))
    torch.testing.assert_close(scheme(u, 1), expand(gate) * u)
    assert ((scheme.gate(u, 1) > 0) & (scheme.gate(u, 1) < 1)).all()


@pytest.mark.parametrize("shared", [True, False])
def test_levels_use_their_own_network(shared):
    scheme = LearnableScaling(shared=shared)
    scheme.prepare(skips_of((8, 3), (8, 3)))
    u = randn(2, 8, 3)
    assert torch.equal(scheme(u, 1), scheme(u, 2)) is shared


def test_preparing_again_keeps_what_was_learned():
    scheme = LearnableScaling(shared=False)
    scheme.prepare(skips_of((8, 3), (8, 3)))
    before = dict(scheme.named_parameters())
    scheme.prepare(skips_of((8, 3), (8, 3)))
    assert dict(scheme.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in scheme.named_parameters())


def test_weights_come_from_the_generator_alone():
    def weights(generator=None):
        scheme = LearnableScaling(generator=generator)
        scheme.prepare(skips_of((64, 8)))
        return [p.detach() for p in scheme.parameters()]

    rng = torch.random.get_rng_state()
    first, again = weights(), weights()
    other = weights(torch.Generator().manual_seed(4))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_weights_have_the_distribution_of_a_linear_layer():
    scheme = LearnableScaling(reduction=1)
    scheme.prepare(skips_of((100, 8)))
    for p in scheme.parameters():  # U(-1/√100, 1/√100)
        assert p.abs().max() <= 0.1
        assert float(p.detach().abs().mean()) == pytest.approx(0.05, rel=0.3)


@pytest.mark.parametrize("reduction", [0, -1])
def test_reduction_rejects(reduction):
    with pytest.raises(
        StabilityProbeError, match=f"ls scaling: reduction must be at least 1, got {reduction}"
    ):
        LearnableScaling(reduction=reduction)


# ── names ────────────────────────────────────────────────────────────────────────────────────────


class TestFixed:
    def test_multiplies_every_level_by_its_number(self):
        scheme, u = FixedScaling([1.0, 0.5, 0.0]), randn(2, 3)
        assert scheme.coefficients(3) == [1.0, 0.5, 0.0]
        for level, kappa in enumerate((1.0, 0.5, 0.0), start=1):
            torch.testing.assert_close(scheme(u, level), kappa * u)

    def test_is_for_as_many_skips_as_it_has_numbers(self):
        scheme = FixedScaling([1.0, 0.5])
        scheme.prepare(skips_of((4, 3), (4, 3)))
        with pytest.raises(StabilityProbeError, match="has 2 numbers for 3 skips"):
            scheme.prepare(skips_of((4, 3), (4, 3), (4, 3)))

    @pytest.mark.parametrize("kappa", [[], [-0.1], [float("nan")], [float("inf"), 1.0]])
    def test_rejects(self, kappa):
        with pytest.raises(StabilityProbeError, match="needs finite numbers ≥ 0, one a skip"):
            FixedScaling(kappa)
