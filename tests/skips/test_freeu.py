import copy
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import apply_freeu
from diffusers.utils.torch_utils import fourier_filter as published_filter
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe import StabilityProbeError, find_skips, scale_skips
from stability_probe.skips.freeu import FreeU, boost, fourier_filter, real_gain
from tests.oracles.skips import skips_of

laws = settings(deadline=None, derandomize=True, max_examples=20)
SIZES = [
    (1, 1),
    (1, 2),
    (2, 2),
    (1, 3),
    (2, 3),
    (3, 3),
    (1, 4),
    (2, 4),
    (3, 4),
    (4, 4),
    (5, 5),
    (6, 5),
]


def prepared(**factors):
    """Levels 1, 2 at 8x8 (untouched), 3 at 4x4 (stage 2), 4, 5 at 2x2 (stage 1)."""
    scheme = FreeU(**factors)
    scheme.prepare(skips_of((4, 8, 8), (4, 8, 8), (6, 4, 4), (6, 2, 2), (8, 2, 2)))
    return scheme


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ── the filter ───────────────────────────────────────────────────────────────────────────────────


def dense(height, width, s):
    """The filter as a matrix, column by column."""
    basis = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    return fourier_filter(basis, s).view(-1, height * width).T


def dft(n):
    """The unitary DFT matrix with rows in the order -n//2, ..., 0, ..., (n-1)//2."""
    k = torch.arange(n, dtype=torch.float64) - n // 2
    angle = -2 * torch.pi * k[:, None] * torch.arange(n, dtype=torch.float64) / n
    return torch.complex(angle.cos(), angle.sin()) / n**0.5


def oracle(height, width, s):
    """Re(Fᴴ diag(g) F) with g = s on the two rows and columns that end at zero frequency."""
    transform = torch.kron(dft(height), dft(width))
    g = torch.ones(height, width, dtype=torch.float64)
    h, w = height // 2, width // 2
    g[max(h - 1, 0) : h + 1, max(w - 1, 0) : w + 1] = s
    return (transform.mH @ torch.diag(g.flatten()).to(transform) @ transform).real


@pytest.mark.parametrize("s", [0.0, 0.2, 0.9, 1.0, 1.7])
@pytest.mark.parametrize("size", SIZES)
def test_filter_against_a_dense_matrix(size, s):
    torch.testing.assert_close(dense(*size, s), oracle(*size, s), rtol=0, atol=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.2, 0.9, 1.0, 1.7])
@pytest.mark.parametrize("size", SIZES)
def test_operator_norm_against_a_dense_matrix(size, s):
    scheme = FreeU(s1=s)
    scheme.prepare(skips_of((2, *size)))
    expected = torch.linalg.matrix_norm(oracle(*size, s), ord=2)
    assert scheme.operator_norm(1, size) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("size", "below_one"),
    [
        ((1, 1), 0.5),
        ((2, 2), 0.5),
        ((1, 3), 0.75),
        ((2, 3), 0.75),
        ((3, 3), 1),
        ((2, 4), 1),
        ((8, 8), 1),
    ],
)
def test_operator_norm_as_documented(size, below_one):
    for s, expected in [(0.5, below_one), (3.0, 3.0)]:
        scheme = FreeU(s1=s)
        scheme.prepare(skips_of((2, *size)))
        assert scheme.operator_norm(1, size) == expected


def test_filter_by_hand():
    constant, stripes = torch.ones(1, 1, 4, 4), torch.tensor([1.0, -1.0]).repeat(1, 1, 4, 2)
    wave = torch.tensor([1.0, 0.0, -1.0, 0.0]).expand(1, 1, 4, 4)  # cos(2πx/4): ±1 on one axis
    u = 3 * constant + 5 * stripes + 7 * wave
    expected = 0.2 * 3 * constant + 5 * stripes + 0.6 * 7 * wave
    torch.testing.assert_close(fourier_filter(u, 0.2), expected)


def test_zero_removes_the_mean_and_is_not_off():
    u = randn(2, 3, 4, 6)
    filtered = fourier_filter(u, 0.0)
    torch.testing.assert_close(
        filtered.mean((2, 3)), torch.zeros(2, 3).double(), rtol=0, atol=1e-12
    )
    assert (filtered - u).abs().max() > 0.1


def test_gain_is_even():
    for size in SIZES:
        gain = real_gain(*size, 0.3)
        mirrored = gain[(-torch.arange(size[0])) % size[0]][:, (-torch.arange(size[1])) % size[1]]
        assert torch.equal(gain, mirrored)


@laws
@given(st.floats(0, 3), st.floats(-5, 5), st.integers(1, 7), st.integers(1, 7))
def test_filter_is_linear(s, c, height, width):
    u, v = randn(1, 2, height, width), randn(1, 2, height, width, seed=1)
    together = fourier_filter(u + c * v, s)
    torch.testing.assert_close(together, fourier_filter(u, s) + c * fourier_filter(v, s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(4, 4), (5, 6), (7, 3)])
def test_filter_keeps_the_dtype_at_every_size(dtype, size):
    u = randn(2, 3, *size).to(dtype)
    filtered = fourier_filter(u, 0.2)
    assert filtered.dtype == dtype
    work = u.double() if dtype == torch.float64 else u.float()
    torch.testing.assert_close(filtered, fourier_filter(work, 0.2).to(dtype))


# ── the boost ────────────────────────────────────────────────────────────────────────────────────


def test_boost_version_1_by_hand():
    z = torch.arange(1.0, 6.0).view(1, 5, 1, 1)  # half of five channels is two
    assert boost(z, 1.5, version=1).flatten().tolist() == [1.5, 3.0, 3.0, 4.0, 5.0]
    assert boost(z, 0.0, version=1).flatten().tolist() == [0, 0, 3, 4, 5]


def test_boost_version_2_by_hand():
    # channel means 1, 2, 3, 5 -> m = 0, 1/4, 1/2, 1; a second sample has its own scale
    first = torch.tensor([[1.0, 3.0, 2.0, 6.0], [1.0, 1.0, 4.0, 4.0]]).view(2, 2, 2)
    z = torch.stack([first, 10 * first - 3])
    factor = torch.tensor([1.0, 1.25, 1.5, 2.0]).view(2, 2)
    boosted = boost(z, 2.0, version=2)
    torch.testing.assert_close(boosted[:, 0], z[:, 0] * factor)
    assert torch.equal(boosted[:, 1], z[:, 1])
    torch.testing.assert_close(boost(z, 0.0, version=2)[:, 0], z[:, 0] * (2 - factor))


def test_boost_version_2_leaves_a_constant_mean_alone():
    z = randn(2, 4, 1, 1)  # one position: 0/0 in the published code
    assert torch.equal(boost(z, 1.6, version=2), z)


@pytest.mark.parametrize("version", [1, 2])
def test_the_operands_are_not_written_to(version):
    scheme = prepared(version=version)
    u, z = randn(2, 6, 4, 4), randn(2, 6, 4, 4, seed=1)
    before = u.clone(), z.clone()
    scheme(u, 3), scheme.backbone(z, 3)
    assert torch.equal(u, before[0]) and torch.equal(z, before[1])


# ── the scheme ───────────────────────────────────────────────────────────────────────────────────


def test_stages_are_the_two_coarsest_resolutions():
    scheme = prepared()
    assert [scheme.stage(level) for level in range(1, 6)] == [None, None, 1, 0, 0]


def test_stages_of_one_resolution():
    scheme = FreeU()
    scheme.prepare(skips_of((4, 6, 6), (8, 6, 6)))
    assert [scheme.stage(level) for level in (1, 2)] == [0, 0]


def test_coarser_is_fewer_positions():
    scheme = FreeU()
    scheme.prepare(skips_of((4, 2, 16), (4, 4, 4), (4, 1, 4)))  # 32, 16 and 4 positions
    assert [scheme.stage(level) for level in (1, 2, 3)] == [None, 1, 0]


def test_each_stage_has_its_own_factors():
    scheme = prepared(b1=2.0, b2=3.0, s1=0.0, s2=0.5)
    coarse, next_coarse, fine = randn(2, 8, 2, 2), randn(2, 6, 4, 4), randn(2, 4, 8, 8)
    torch.testing.assert_close(scheme(coarse, 5), 0 * coarse, rtol=0, atol=1e-12)  # all is low
    torch.testing.assert_close(scheme(next_coarse, 3), fourier_filter(next_coarse, 0.5))
    torch.testing.assert_close(scheme.backbone(coarse, 5), boost(coarse, 2.0, 1))
    torch.testing.assert_close(scheme.backbone(next_coarse, 3), boost(next_coarse, 3.0, 1))
    assert scheme(fine, 1) is fine
    assert scheme.backbone(fine, 1) is fine
    assert scheme.operator_norm(1, (8, 8)) == 1
    assert scheme.coefficients(5) is None
    assert scheme.name == "freeu"


@pytest.mark.parametrize("version", [1, 2])
def test_one_leaves_the_tensor_itself(version):
    scheme = prepared(b1=1.0, b2=1.0, s1=1.0, s2=1.0, version=version)
    for level, shape in [(3, (2, 6, 4, 4)), (4, (2, 6, 2, 2)), (5, (2, 8, 2, 2))]:
        u = randn(*shape)
        assert scheme(u, level) is u
        assert scheme.backbone(u, level) is u


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("level", [3, 5])
def test_gradients(version, level):
    scheme = prepared(b1=1.5, b2=0.4, s1=0.3, s2=0.0, version=version)
    shape = {3: (1, 2, 3, 4), 5: (2, 3, 2, 2)}[level]
    u = randn(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: scheme(u, level), u)
    assert torch.autograd.gradgradcheck(lambda u: scheme(u, level), u)
    assert torch.autograd.gradcheck(lambda z: scheme.backbone(z, level), u)


def test_copies_behave_the_same():
    scheme = prepared(s2=0.1, version=2)
    u = randn(2, 6, 4, 4)
    fresh = prepared(s2=0.1, version=2)
    fresh.load_state_dict(scheme.state_dict())
    for other in (copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme)), fresh):
        assert torch.equal(other(u, 3), scheme(u, 3))
        assert torch.equal(other.backbone(u, 3), scheme.backbone(u, 3))
    assert not list(scheme.parameters())


def test_preparing_again_for_the_same_stages_is_allowed():
    scheme = prepared()
    scheme.prepare(skips_of((4, 16, 16), (4, 16, 16), (6, 8, 8), (6, 4, 4), (8, 4, 4)))
    assert scheme.stage(5) == 0


# ── diffusers ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("s", [0.0, 0.2, 0.9, 1.7])
@pytest.mark.parametrize("size", SIZES)
def test_filter_is_that_of_diffusers(size, s):
    u = randn(2, 3, *size, dtype=torch.float32)
    expected = published_filter(u, threshold=1, scale=s)
    torch.testing.assert_close(fourier_filter(u, s), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("stage", "level", "shape"), [(0, 5, (2, 8, 2, 2)), (1, 3, (2, 7, 4, 4))])
def test_version_1_is_that_of_diffusers(stage, level, shape):
    factors = {"b1": 1.5, "b2": 1.6, "s1": 0.9, "s2": 0.2}
    scheme = prepared(**factors)
    z, u = randn(*shape, dtype=torch.float32), randn(*shape, seed=1, dtype=torch.float32)
    main, skip = apply_freeu(stage, z.clone(), u.clone(), **factors)
    torch.testing.assert_close(scheme.backbone(z, level), main, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheme(u, level), skip, rtol=0, atol=1e-6)


def condition(**changes):
    """A conditional UNet of four resolutions, as Stable Diffusion has, with seeded weights."""
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    sizes = {
        "sample_size": 16, "in_channels": 2, "out_channels": 2, "layers_per_block": 1,
        "block_out_channels": (4, 8, 12, 12), "norm_num_groups": 2, "cross_attention_dim": 4,
        "attention_head_dim": 2,
        "down_block_types": (*[cross.format("Down")] * 3, plain.format("Down")),
        "up_block_types": (plain.format("Up"), *[cross.format("Up")] * 3),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**(sizes | changes)).eval()


INPUT = {
    "sample": randn(2, 2, 16, 16, dtype=torch.float32),
    "timestep": torch.tensor([20, 700]),
    "encoder_hidden_states": randn(2, 3, 4, seed=1, dtype=torch.float32),
}


@pytest.mark.parametrize(
    "factors",
    [
        {"b1": 1.5, "b2": 1.6, "s1": 0.9, "s2": 0.2},
        {"b1": 3.0, "b2": 1.0, "s1": 1.0, "s2": 1.0},
        {"b1": 1.0, "b2": 0.3, "s1": 1.0, "s2": 1.0},
        {"b1": 1.0, "b2": 1.0, "s1": 0.1, "s2": 1.0},
        {"b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 3.0},
    ],
)
@torch.no_grad()
def test_a_whole_network_is_that_of_diffusers(factors):
    """Its stages are the first two decoder blocks, which here are the two coarsest sizes."""
    model = condition()
    skips = find_skips(model, **INPUT)
    plain = model(**INPUT).sample
    scheme = FreeU(**factors)
    with scale_skips(model, skips, scheme):
        assert [scheme.stage(s.level) for s in skips] == [None] * 4 + [1, 1, 0, 0]
        ours = model(**INPUT).sample
    model.enable_freeu(**factors)
    theirs = model(**INPUT).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert (theirs - plain).abs().max() > 100 * (ours - theirs).abs().max()


@torch.no_grad()
def test_version_2_in_a_whole_network_boosts_by_the_map():
    model = condition()
    skips = find_skips(model, **INPUT)
    factors = {"b1": 1.5, "b2": 1.6, "s1": 1.0, "s2": 1.0}
    with scale_skips(model, skips, FreeU(**factors, version=2)):
        ours = model(**INPUT).sample

    def boosted(stage):
        def hook(module, args):
            joined = args[0]
            skip = next(s for s in skips if model.get_submodule(s.sink) is module)
            z, u = joined.split([joined.shape[1] - skip.shape[0], skip.shape[0]], dim=1)
            return (torch.cat([boost(z, (1.5, 1.6)[stage], version=2), u], dim=1), *args[1:])

        return hook

    for stage in (0, 1):
        for resnet in model.up_blocks[stage].resnets:
            resnet.register_forward_pre_hook(boosted(stage))
    torch.testing.assert_close(ours, model(**INPUT).sample, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_factor_of_zero_is_zero_and_is_off_in_diffusers():
    model = condition()
    plain, skips = model(**INPUT).sample, find_skips(model, **INPUT)
    model.enable_freeu(b1=1.5, b2=1.6, s1=0.0, s2=0.2)
    assert torch.equal(model(**INPUT).sample, plain)
    model.disable_freeu()
    near = {}
    for s1 in (0.0, 1e-6):
        with scale_skips(model, skips, FreeU(s1=s1)):
            near[s1] = model(**INPUT).sample
    assert not torch.allclose(near[0.0], plain, atol=1e-4)
    torch.testing.assert_close(near[0.0], near[1e-6], rtol=1e-3, atol=1e-5)


def test_the_defaults_are_those_of_stable_diffusion_1_5():
    assert (FreeU().b, FreeU().s, FreeU().version) == ((1.5, 1.6), (0.9, 0.2), 1)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["b1", "b2", "s1", "s2"])
@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_rejects_a_factor(name, factor):
    with pytest.raises(
        StabilityProbeError, match=rf"freeu: {name} must be a finite number ≥ 0, got {factor:g}"
    ):
        FreeU(**{name: factor})


def test_rejects_a_version():
    with pytest.raises(StabilityProbeError, match="freeu: version must be 1 or 2, got 3"):
        FreeU(version=3)


@pytest.mark.parametrize("shape", [(8,), (16, 8), (4, 2, 3, 4)])
def test_rejects_other_features(shape):
    with pytest.raises(
        StabilityProbeError, match=r"two spatial dimensions.*skip 2 has shape \(.*choose another"
    ):
        FreeU().prepare(skips_of((4, 8, 8), shape))


def test_rejects_other_skips():
    scheme = prepared()
    with pytest.raises(StabilityProbeError, match="prepared for other skips; make one for each"):
        scheme.prepare(skips_of((4, 8, 8)))


@pytest.mark.parametrize("use", ["forward", "backbone"])
def test_rejects_an_unknown_level(use):
    with pytest.raises(StabilityProbeError, match=r"level 1 is unknown; call prepare\(skips\)"):
        getattr(FreeU(), use)(randn(1, 2, 2, 2), 1)
