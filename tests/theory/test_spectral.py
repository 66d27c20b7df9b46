import pytest
import torch
from scipy import stats
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_probe import ConstantScaling, TheoryUNet, UViT, UViTConfig, find_skips, scale_skips
from stability_probe.theory import golub_kahan_norm, jacobian_norm, jacobian_products
from tests.oracles.dense import assert_matches_dense, dense_jacobian, random_matrices
from tests.oracles.zoo import ATTENTION, X, unet2d

SPECTRA = {
    "spread": [10.0, 5.0, 2.0, 1.0, 0.1],
    "equal": [3.0] * 5,
    "clustered": [1.0, 0.9999, 0.999, 0.998, 0.99],
    "two-clusters": [1.0, 0.999, 0.998, 1e-6, 1e-7],
    "geometric": [1.0, 1e-2, 1e-4, 1e-6, 1e-8],
    "rank-one": [2.0],
    "zero": [],
}
SHAPES = [(5, 5), (5, 40), (40, 5), (30, 30), (1, 7), (7, 1), (1, 1)]


def norm_of(matrices, *, seed=1, start=None, **options):
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(
            matrices.shape[0], matrices.shape[2], generator=generator, dtype=matrices.dtype
        )
    return golub_kahan_norm(
        lambda v: torch.einsum("bmn,bn->bm", matrices, v),
        lambda u: torch.einsum("bmn,bm->bn", matrices, u),
        start,
        **options,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_against_dense_svd(shape, spectrum):
    matrices = random_matrices(shape, [SPECTRA[spectrum][: min(shape)]] * 8)
    norm = norm_of(matrices)
    assert norm.converged
    assert (norm.upper <= 1.01 * norm.value).all()
    assert_matches_dense(norm, matrices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_gaussian_matrices(dtype):
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(6, 50, 80, generator=generator, dtype=dtype)
    norm = norm_of(matrices)
    assert norm.value.dtype == norm.upper.dtype == norm.right.dtype == dtype
    assert_matches_dense(norm, matrices, roundoff=1e-5 if dtype == torch.float32 else 1e-9)


def test_samples_of_very_different_norms_do_not_disturb_each_other():
    scales = [1e-9, 1.0, 1e9, 0.0, 1e-3]
    matrices = random_matrices((30, 30), [[s * (1 - k / 30) for k in range(30)] for s in scales])
    assert_matches_dense(norm_of(matrices), matrices)


def test_a_batch_that_settles_early_waits_for_the_slowest_unharmed():
    """Rank one, rank two and zero are done at once; the Gaussian one needs many products."""
    easy = random_matrices((40, 40), [[5.0], [3.0, 1.0], [], [1.0] * 40])
    hard = torch.randn(1, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices = torch.cat([easy, hard])
    norm = norm_of(matrices, rtol=1e-10)
    assert norm.products > 10
    assert_matches_dense(norm, matrices, rtol=1e-9)


def test_sigma_max_is_homogeneous():
    matrices = random_matrices((20, 20), [[1 - k / 20 for k in range(20)]])
    small, large = norm_of(matrices), norm_of(1e6 * matrices)
    torch.testing.assert_close(large.value, 1e6 * small.value)
    torch.testing.assert_close(large.upper, 1e6 * small.upper)
    torch.testing.assert_close(large.right, small.right)


def test_the_length_of_the_start_does_not_matter():
    matrices = random_matrices((9, 9), [[1 - k / 9 for k in range(9)]])
    start = torch.randn(1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        norm_of(matrices, start=start).value, norm_of(matrices, start=1e5 * start).value
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_gives_nan_for_its_sample_alone(bad):
    matrices = random_matrices((8, 8), [[2.0, 1.0]] * 3)
    matrices[1, 3, 4] = bad
    norm = norm_of(matrices)
    assert norm.value.isnan().tolist() == norm.upper.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(norm.value[[0, 2]], torch.full((2,), 2.0, dtype=torch.float64))


def test_too_few_products_are_admitted():
    matrices = random_matrices((60, 60), [[1 - k / 600 for k in range(60)]] * 3)
    norm = norm_of(matrices, rtol=1e-6, max_products=4)
    assert norm.products == 4
    assert not norm.converged
    assert (norm.upper > norm.value * (1 + 1e-6)).any()
    assert_matches_dense(norm, matrices)  # still an enclosure


def test_a_tighter_tolerance_costs_more_and_gives_more():
    matrices = random_matrices((60, 60), [[1 - k / 60 for k in range(60)]] * 3)
    loose, tight = norm_of(matrices, rtol=1e-1), norm_of(matrices, rtol=1e-8)
    assert loose.products < tight.products
    assert (loose.value <= tight.value).all()
    assert_matches_dense(tight, matrices, rtol=1e-7)


def test_never_more_products_than_columns():
    norm = norm_of(random_matrices((40, 3), [[3.0, 2.0, 1.0]]), rtol=0.0)
    assert norm.products == 3


@pytest.mark.parametrize("scale", [1e-12, 1e-16, 1e-18, 1e-22, 1e-30, 1e25])
def test_a_tiny_map_in_single_precision(scale):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 30, 30, generator=generator)
    matrices[1] = matrices[1, :, :1] @ matrices[1, :1] * scale  # rank one
    norm = norm_of(matrices, rtol=1e-5)
    assert_matches_dense(norm, matrices, roundoff=1e-5)


# ── Jacobians ────────────────────────────────────────────────────────────────────────────────────


def jacobian_norm_of(fn, x, **options):
    x = x.detach().clone().requires_grad_()
    return jacobian_norm(fn(x), x, generator=torch.Generator().manual_seed(0), **options)


def check(fn, x, rtol=1e-2):
    assert_matches_dense(jacobian_norm_of(fn, x), dense_jacobian(fn, x), rtol=rtol)


@pytest.mark.parametrize("merge", ["add", "concat"])
def test_theory_unet(merge):
    net = TheoryUNet(m=64, n_skips=4, merge=merge).double()
    x = X.double()
    with scale_skips(net, find_skips(net, x), ConstantScaling(0.7)):
        check(net, x)
    check(net, x)


def test_uvit():
    net = UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2)).double()
    with sdpa_kernel(SDPBackend.MATH):
        check(lambda x: net(x, torch.full((len(x),), 300)), X.double())


@pytest.mark.parametrize("changes", [{}, ATTENTION], ids=["plain", "attention"])
def test_unet2d(changes):
    net = unet2d(**changes).double()
    with sdpa_kernel(SDPBackend.MATH):
        check(lambda x: net(x, torch.full((len(x),), 300)).sample, X.double())


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: 3 * x,
        lambda x: x.sin() * x.flip(1),
        lambda x: torch.cat([x, 2 * x, x.square()], dim=1),
        lambda x: x.square().sum(1, keepdim=True),
        lambda x: 0 * x,
        lambda x: x.relu() - x,
    ],
    ids=["scaling", "product", "tall", "wide", "zero", "relu"],
)
def test_small_functions(fn):
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    check(fn, x)


def test_of_an_inner_tensor():
    """The input may be any node of the graph, not just a leaf."""
    weight = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    inner = x.exp()
    norm = jacobian_norm(inner @ weight, inner, generator=torch.Generator().manual_seed(0))
    assert_matches_dense(norm, weight.T.expand(2, 6, 6))


def test_the_graph_stays_and_no_gradient_is_left():
    x = torch.ones(2, 3, requires_grad=True)
    weight = torch.eye(3).mul(2).requires_grad_()
    out = (x @ weight).sin()
    values = [
        jacobian_norm(out, x, generator=torch.Generator().manual_seed(s)).value for s in (0, 0, 1)
    ]
    assert torch.equal(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    assert x.grad is None
    assert weight.grad is None
    out.sum().backward()


def test_only_the_generator_that_is_passed_is_drawn_from():
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(2, 3, requires_grad=True)
    jacobian_norm(2 * x, x, generator=generator)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_one_number_a_sample():
    check(lambda x: x.square().sum(1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_function_that_is_not_finite_has_no_norm(bad):
    """The derivative of a ReLU is finite even where its input is not."""
    x = torch.ones(3, 4, dtype=torch.float64)
    x[1, 2] = bad
    for fn in (torch.relu, lambda v: v + 0):
        value = jacobian_norm_of(fn, x).value
        assert value.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(value[[0, 2]], torch.ones(2, dtype=torch.float64))
    inner = torch.ones(3, 4, dtype=torch.float64)
    value = jacobian_norm_of(lambda v: v + x, inner).value  # the output alone is not finite
    assert value.isnan().tolist() == [False, True, False]


def test_via_takes_the_paths_through_a_tensor_alone():
    generator = torch.Generator().manual_seed(3)
    first, second, around = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 6, generator=generator, dtype=torch.float64).requires_grad_()
    inner = (x @ first).tanh()
    out = inner @ second + x @ around
    norm = jacobian_norm(out, x, via=inner, generator=generator, rtol=1e-6)
    slope = 1 - inner.detach().square()
    path = torch.stack([(first * d) @ second for d in slope]).mT
    assert_matches_dense(norm, path, rtol=1e-6)
    whole = jacobian_norm(out, x, generator=generator, rtol=1e-6)
    assert_matches_dense(whole, path + around.T, rtol=1e-6)


def test_a_sample_may_take_several_rows():
    """Two samples of three frames that mix: their Jacobians are 12 x 12, not 4 x 4 a frame."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    out = (x.view(2, 12) @ mixing).view(6, 4)
    norm = jacobian_norm(out, x, samples=2, generator=generator, rtol=1e-6)
    assert_matches_dense(norm, mixing.T.expand(2, 12, 12), rtol=1e-6)


class Once(torch.autograd.Function):
    """2x, whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


def test_a_derivative_that_cannot_be_differentiated_is_refused():
    """Autograd would leave that path out of products with J, and not out of those with Jᵀ."""
    x = torch.ones(2, 3, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="do not belong together"):
        jacobian_norm(Once.apply(x) + x, x, generator=generator)
    norm = jacobian_norm(2 * x + x, x, generator=generator)
    torch.testing.assert_close(norm.value, torch.full((2,), 3.0))


def test_derivatives_that_cancel_are_no_fault():
    """The mean of what a normalisation has centred: 0, and in float32 rounding."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    gate = torch.nn.functional.layer_norm(x @ weight, (64,)).mean(1, keepdim=True).sigmoid()
    norm = jacobian_norm(gate, x, generator=torch.Generator().manual_seed(2))
    assert (norm.value < 1e-6).all()
    push, pull = jacobian_products(gate, x)
    start = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match="do not belong together"):  # taken for a derivative
        golub_kahan_norm(push, pull, start)


def test_maps_that_are_not_each_others_transpose():
    a = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))

    def apply(m):
        return lambda v: (m @ v[..., None])[..., 0]

    golub_kahan_norm(apply(a), apply(a.mT), torch.ones(1, 4))
    with pytest.raises(ValueError, match="do not belong together"):
        golub_kahan_norm(apply(a), apply(a), torch.ones(1, 4))


# ── The certificate ──────────────────────────────────────────────────────────────────────────────


def shares_of_failure(matrix, starts, products, failure):
    """How many of the starts give an upper bound below the true value, after some products."""
    batch = matrix.expand(len(starts), *matrix.shape)
    norm = norm_of(batch, start=starts, rtol=0.0, failure=failure, max_products=products)
    sigma = torch.linalg.matrix_norm(matrix, ord=2)
    return int((norm.upper < sigma * (1 - 1e-9)).sum()), norm.upper / sigma


@pytest.mark.parametrize("products", [1, 3, 6])
@pytest.mark.parametrize("failure", [0.05, 0.2])
@pytest.mark.parametrize("spectrum", ["flat", "gap", "outlier"])
def test_upper_bounds_fail_no_more_often_than_stated(spectrum, failure, products):
    """Over 2,000 Gaussian starts; where one value stands alone, about as often."""
    n = 40
    sigma = {
        "flat": torch.linspace(1, 0.5, n),
        "gap": torch.cat([torch.ones(1), torch.linspace(0.7, 0.1, n - 1)]),
        "outlier": torch.cat([torch.ones(1), torch.full((n - 1,), 1e-3)]),
    }[spectrum].double()
    generator = torch.Generator().manual_seed(products)
    starts = torch.randn(2000, n, generator=generator, dtype=torch.float64)
    failed, _ = shares_of_failure(torch.diag(sigma), starts, products, failure)
    most = stats.binom.ppf(1 - 1e-4, len(starts), failure)
    assert failed <= most
    if spectrum == "outlier" and products == 1:
        assert failed >= stats.binom.ppf(1e-4, len(starts), failure)


def test_a_start_without_the_leading_vector_is_what_failure_means():
    """Orthogonal to the leading vector, no product ever sees it: the certificate is wrong then."""
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    blind = torch.tensor([[0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    norm = norm_of(matrix[None], start=blind)
    torch.testing.assert_close(norm.upper, torch.tensor([2.0], dtype=torch.float64))


def test_a_smaller_probability_of_failure_has_a_larger_bound():
    matrices = random_matrices((60, 60), [[1 - k / 60 for k in range(60)]])
    bounds = [
        norm_of(matrices, rtol=0.0, max_products=6, failure=f).upper for f in (0.1, 1e-3, 1e-9)
    ]
    assert bounds[0] < bounds[1] < bounds[2]


def test_after_one_product_by_hand():
    """K = 1 + p₁(t²)² with p₁(s) = (s − α²)/(αβ): the root is t² = α² + αβ √(1/δ² − 1)."""
    matrix = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)  # α = 2, Aᵀu = (2, 1): β = 1
    norm = norm_of(matrix[None], start=start, rtol=0.0, max_products=1, failure=0.5)
    torch.testing.assert_close(norm.value, torch.tensor([2.0], dtype=torch.float64))
    least = 0.5  # of cos² of a uniform angle
    root = (4 + 2 * (1 / least - 1) ** 0.5) ** 0.5
    torch.testing.assert_close(
        norm.upper, torch.tensor([root], dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_products_of_a_graph_are_those_of_the_dense_jacobian():
    def fn(x):
        return x.sin() * x.flip(1)

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    push, pull = jacobian_products(fn(x), x)
    dense = dense_jacobian(fn, x)
    v, w = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(push(v), torch.einsum("bmn,bn->bm", dense, v))
    torch.testing.assert_close(pull(w), torch.einsum("bmn,bm->bn", dense, w))


def test_half_precision_is_iterated_in_single():
    """In bfloat16 itself the recurrence ends at the first product, 3 % or more below the norm."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(8, 40, 40, generator=generator).bfloat16()
    found = norm_of(matrices, rtol=1e-2)
    exact = torch.linalg.matrix_norm(matrices.double(), 2)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value.double(), exact, rtol=2e-2, atol=0)
