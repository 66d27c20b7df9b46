import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe import ConstantScaling, TheoryUNet, find_skips, scale_skips
from stability_probe.theory import blockwise_bound, max_block_gain, pathwise_bound, robustness_bound
from tests.oracles.dense import dense_jacobian

laws = settings(deadline=None, derandomize=True, max_examples=100)
lipschitz = st.floats(0.0, 3.0)


@st.composite
def networks(draw):
    """(kappa, lip_a, lip_b, l0) of a network of one to six skips."""
    n = draw(st.integers(1, 6))
    kappa = draw(st.lists(st.floats(0.0, 2.0), min_size=n, max_size=n))
    lip_a, lip_b = (np.array(draw(st.lists(lipschitz, min_size=n, max_size=n))) for _ in range(2))
    return kappa, lip_a, lip_b, draw(lipschitz)


def test_paper_form_by_hand():
    kappa = [1.0, 0.5, 0.25]
    assert robustness_bound(kappa, m0=2.0, l0=3.0) == 2 + 0.5 * 4 + 0.25 * 8 + 8 * 3
    assert robustness_bound(kappa, m0=2.0, l0=3.0, c0=1.0) == 2 + 0.5 * 4 + 0.25 * 8 + 1
    assert robustness_bound(kappa, m0=2.0, l0=3.0, c0=0.0) == 6  # 0 is a constant, not "none"


def test_paper_form_over_points():
    bound = robustness_bound([1.0, 0.5], m0=np.array([2.0, 0.0]), l0=np.array([3.0, 7.0]))
    np.testing.assert_array_equal(bound, [2 + 2 + 12, 0.0])


def test_paper_form_without_skips_is_the_middle_block():
    assert robustness_bound([], m0=5.0, l0=3.0) == 3.0


def test_the_sum_is_of_coefficients_not_of_their_squares():
    change = robustness_bound([0.5], 1.0, 0.0) - robustness_bound([0.0], 1.0, 0.0)
    assert change == 0.5


def test_blockwise_by_hand():
    lip_a, lip_b = np.array([2.0, 1.0, 3.0]), np.array([0.5, 4.0, 1.0])  # products 1, 4, 12
    assert blockwise_bound([1.0, 0.5, 0.25], lip_a, lip_b, 2.0) == 1 + 0.5 * 4 + 0.25 * 12 + 2 * 12


def test_blockwise_over_points():
    lip_a = np.array([[2.0, 1.0], [3.0, 1.0]])  # two blocks at two points
    bound = blockwise_bound([1.0, 0.5], lip_a, np.ones((2, 2)), np.array([1.0, 10.0]))
    np.testing.assert_array_equal(bound, [2 + 3 + 6, 1 + 0.5 + 10])


def test_coefficients_may_differ_between_points():
    kappa = np.array([[1.0, 0.5], [0.5, 0.0]])  # two skips at two points
    lip_a = np.array([[2.0, 1.0], [3.0, 1.0]])
    l0 = np.array([1.0, 10.0])
    blockwise = blockwise_bound(kappa, lip_a, np.ones((2, 2)), l0)
    np.testing.assert_array_equal(blockwise, [2 + 0.5 * 6 + 6, 0.5 + 10])
    paper = robustness_bound(kappa, max_block_gain(lip_a, np.ones((2, 2))), l0)
    np.testing.assert_array_equal(paper, [3 + 0.5 * 9 + 9, 0.5 + 10])


def test_max_block_gain_is_of_products_at_each_point():
    lip_a, lip_b = np.array([[4.0, 1.0], [1.0, 2.0]]), np.array([[0.5, 1.0], [3.0, 3.0]])
    np.testing.assert_array_equal(max_block_gain(lip_a, lip_b), [3.0, 6.0])


@pytest.mark.parametrize(("n_a", "n_b"), [(1, 2), (2, 1), (3, 3)])
def test_blockwise_needs_one_constant_a_block(n_a, n_b):
    with pytest.raises(ValueError, match=rf"for 2 skips, got {n_a} for a and {n_b} for b"):
        blockwise_bound([1.0, 1.0], np.ones(n_a), np.ones(n_b), 1.0)


@laws
@given(networks())
def test_blockwise_never_exceeds_the_papers_form(network):
    kappa, lip_a, lip_b, l0 = network
    paper = robustness_bound(kappa, max_block_gain(lip_a, lip_b), l0)
    assert blockwise_bound(*network) <= paper * (1 + 1e-12)


@laws
@given(networks(), st.floats(0.0, 2.0))
def test_forms_agree_for_equal_blocks(network, gain):
    kappa, lip_a, _, l0 = network
    blockwise = blockwise_bound(kappa, np.full_like(lip_a, gain), np.ones_like(lip_a), l0)
    np.testing.assert_allclose(blockwise, robustness_bound(kappa, gain, l0), rtol=1e-12)


@laws
@given(networks(), st.data())
def test_bounds_grow_with_each_coefficient(network, data):
    kappa, *rest = network
    more = list(kappa)
    more[data.draw(st.integers(0, len(kappa) - 1))] += 0.5
    gain = max_block_gain(rest[0], rest[1])
    assert blockwise_bound(more, *rest) >= blockwise_bound(kappa, *rest)
    assert robustness_bound(more, gain, rest[2]) >= robustness_bound(kappa, gain, rest[2])


def test_blockwise_is_attained_by_a_linear_network():
    """Blocks that are multiples of one rotation: no path is out of line with another."""
    kappa, a, b, l0 = [1.0, 0.7, 0.49], np.array([2.0, 0.5, 3.0]), np.array([1.0, 2.0, 0.1]), 4.0
    x = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(v):
        u = [v]
        for gain in a:
            u.append(u[-1] * gain)
        z = l0 * u.pop()
        for j in range(3, 0, -1):
            z = b[j - 1] * (kappa[j - 1] * a[:j].prod() * v + z)
        return z

    exact = torch.linalg.svdvals(dense_jacobian(network, x))[0, 0].item()
    np.testing.assert_allclose(blockwise_bound(kappa, a, b, l0), exact, rtol=1e-12)
    assert blockwise_bound(kappa, a, b, 0.9 * l0) < exact  # understated L_0: no bound


@pytest.mark.parametrize("seed", range(5))
def test_chain_at_a_point(seed):
    """secant ≤ exact ≤ blockwise ≤ paper, with block Jacobians' norms at the point."""
    generator = torch.Generator().manual_seed(seed)
    net = TheoryUNet(m=12, n_skips=3, generator=generator).double()
    x = torch.randn(1, 12, dtype=torch.float64, generator=generator)
    scheme = ConstantScaling(0.7)
    norms, calls = {}, {}
    for name in [*(f"encoder.{i}" for i in range(3)), "middle"]:
        net.get_submodule(name).register_forward_hook(
            lambda m, args, _out, name=name: calls.update({name: (m, args[0])})
        )
    for i in range(3):
        block = net.decoder[i].block
        block.register_forward_hook(lambda m, args, _, i=i: calls.update({f"b{i}": (m, args[0])}))
    with scale_skips(net, find_skips(net, x), scheme):
        out = net(x)
        points = dict(calls)
        exact = torch.linalg.svdvals(dense_jacobian(net, x))[0, 0].item()
        delta = 1e-6 * torch.randn(1, 12, dtype=torch.float64, generator=generator)
        secant = ((net(x + delta) - out).norm() / delta.norm()).item()
    for name, (module, v) in points.items():
        norms[name] = torch.linalg.svdvals(dense_jacobian(module, v))[0, 0].item()
    lip_a = np.array([norms[f"encoder.{i}"] for i in range(3)])
    lip_b = np.array([norms[f"b{i}"] for i in range(3)])
    kappa = scheme.coefficients(3)
    blockwise = blockwise_bound(kappa, lip_a, lip_b, norms["middle"])
    paper = robustness_bound(kappa, max_block_gain(lip_a, lip_b), norms["middle"])
    assert 0 < secant <= exact * (1 + 1e-6) <= blockwise <= paper


def test_pathwise_by_hand():
    assert pathwise_bound([2.0, 0.5], 0.25) == 2.75
    over_points = pathwise_bound(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5, 0.25]))
    np.testing.assert_array_equal(over_points, [4.5, 6.25])


@pytest.mark.parametrize("seed", range(5))
def test_pathwise_lies_between_exact_and_blockwise_on_linear_networks(seed):
    """P_i = B_1..B_i A_i..A_1, written out; equal to the exact norm where all paths align."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 3, 6, 6)) / 2
    middle, kappa = rng.normal(size=(6, 6)), [1.0, 0.7, 0.49]
    down, up, paths, lip = np.eye(6), np.eye(6), [], []
    for i in range(3):
        down, up = a[i] @ down, up @ b[i]
        paths.append(kappa[i] * up @ down)
        lip.append((np.linalg.norm(a[i], 2), np.linalg.norm(b[i], 2)))
    paths.append(up @ middle @ down)
    norms = [np.linalg.norm(p, 2) for p in paths]
    exact = np.linalg.norm(sum(paths), 2)
    lip_a, lip_b = np.transpose(lip)
    blockwise = blockwise_bound(kappa, lip_a, lip_b, np.linalg.norm(middle, 2))
    pathwise = pathwise_bound(norms[:3], norms[3])
    assert exact <= pathwise <= blockwise
    assert pathwise_bound(norms[:2], norms[3]) < pathwise  # a path left out
