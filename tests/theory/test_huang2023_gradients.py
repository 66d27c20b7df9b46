import numpy as np
import pytest
import torch

from stability_probe import TheoryUNet, find_skips, scale_skips
from stability_probe.skips import Uniform
from stability_probe.theory import gradient_bound, gradient_scale
from stability_probe.theory.huang2023_gradients import gradient_energy_law

KAPPA = [1.0, 0.5, 2.0]  # sums of squares from i: 5.25, 4.25, 4


def test_scale_by_hand():
    scales = [float(gradient_scale(KAPPA, i, loss=2.0, input_energy=3.0)) for i in (1, 2, 3)]
    assert scales == [31.5, 25.5, 24.0]


def test_scale_is_per_sample():
    scale = gradient_scale([2.0], 1, loss=np.array([1.0, 0.0]), input_energy=np.array([3.0, 5.0]))
    np.testing.assert_array_equal(scale, [12.0, 0.0])


def test_bound_by_hand():
    loss, energy = np.array([1.0, 2.0]), np.array([10.0, 1.0])
    bound = gradient_bound(KAPPA, 2, loss, energy, c=0.5, c4=loss * energy)
    np.testing.assert_array_equal(bound, [0.5 * 42.5 + 10, 0.5 * 8.5 + 2])


def test_bound_without_constants_is_the_scale():
    assert gradient_bound(KAPPA, 3, 2.0, 3.0) == gradient_scale(KAPPA, 3, 2.0, 3.0) == 24.0


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("function", [gradient_scale, gradient_bound])
def test_there_are_no_blocks_outside_one_to_n(function, level):
    with pytest.raises(ValueError, match=rf"level must lie in 1\.\.3 .* got {level}"):
        function(KAPPA, level, 1.0, 1.0)


def test_a_network_without_skips_has_no_such_blocks():
    with pytest.raises(ValueError, match=r"level must lie in 1\.\.0"):
        gradient_scale([], 1, 1.0, 1.0)


class TestEnergyLaw:
    def test_by_hand(self):
        """N = 1, κ = 1/2, all gains 2, ‖x‖² = 1, m = 2, no target; concatenated.

        ‖u‖² = 2, ‖z_1‖² = 4, ‖merged‖² = 4.5, ‖z_0‖² = 9; s = 1 at z_0, then s = 2 and
        R = 2·3·9 = 54 at the merge; s = 4 and R = 2(3·4·4 + 54) = 204 from the middle to u_1, and
        s = 1/4 · 2, R = 1/4 · 54 through the skip.
        """
        law = gradient_energy_law(
            [0.5], 2, 1.0, 0.0, alpha=2.0, beta=2.0, gamma=2.0, merge="concat"
        )
        s2, r = 4.5**2, 204 + 13.5
        np.testing.assert_allclose(law[1, 0], [3 * 9 * 4.5, 9 * 4.5])
        np.testing.assert_allclose(law[0, 0], [3 * s2 * 2 + r, s2 * 2 + r])

    def test_additive_merges_add_noise_by_hand(self):
        """As above: s²κ²‖u‖² = 2 more at z_1, and s²κ²‖z_1‖² = 4 more at u_1."""
        law = gradient_energy_law([0.5], 2, 1.0, 0.0, alpha=2.0, beta=2.0, gamma=2.0)
        s2, r = 4.5**2, 204 + 2 * 2 + 13.5 + 4
        np.testing.assert_allclose(law[0, 0], [3 * s2 * 2 + r, s2 * 2 + r])

    def test_large_targets_give_theorem_3_3(self):
        """c = 4/m and c_4 = c ℓ‖x‖², for every block."""
        x, y, m = 3.0, 1e12, 16
        law = gradient_energy_law(KAPPA, m, x, y)[:, :, 1]
        for i in (1, 2, 3):
            bound = gradient_bound(KAPPA, i, y / m, x, c=4 / m, c4=4 / m * y / m * x)
            np.testing.assert_allclose(law[:, i - 1], bound, rtol=1e-9)

    def test_is_linear_in_the_inputs_and_targets_energies(self):
        one, both = (gradient_energy_law(KAPPA, 8, 2.0 * c, 5.0 * c) for c in (1, 3))
        np.testing.assert_allclose(both, 9 * one)
        for merge in ("add", "concat"):
            parts = [gradient_energy_law(KAPPA, 8, 2.0, y, merge=merge) for y in (0.0, 5.0, 10.0)]
            np.testing.assert_allclose(parts[2] - parts[1], parts[1] - parts[0])

    def test_gains_of_their_own(self):
        """By hand, for a target so large that the gradient is all noise, R = 4‖y‖²/m² = ‖y‖²."""
        law = gradient_energy_law([1.0, 0.5], 2, 1.0, 1e12, alpha=[1.0, 3.0], beta=[2.0, 1.0])
        # u: 1, 3; z_2 = 3; merged_2 = 3/4 + 3, z_1 the same; merged_1 = 1 + 15/4
        # gradients: z_0 1; z_1 and skip 1 2; z_2 2, skip 2 1/2; u_2 5/2; u_1 3 · 5/2 + 2
        last = np.array([[9.5 * 1, 2.5 * 1], [1 * 4.75, 2 * 3.75]])
        gains = np.array([[1.0, 3.0], [2.0, 1.0]])
        np.testing.assert_allclose(law[..., 1] / 1e12, last, rtol=1e-9)
        np.testing.assert_allclose(law[..., 0] / 1e12, gains / 2 * last, rtol=1e-9)

    def test_unknown_merges(self):
        with pytest.raises(ValueError, match=r"must be .* or .*, got 'mul'"):
            gradient_energy_law([1.0], 2, 1.0, 1.0, merge="mul")


M, NETWORKS, C = 128, 80, 0.7


def measured(*, merge="add", unit_gain=True, target=1.0, final_relu=False, follow=0.0):
    """‖∇_W ℓ‖² of random networks with N = 2, over the law: (networks, 2, N, 2)."""
    rows = []
    skips = find_skips(TheoryUNet(M, 2, merge=merge), torch.zeros(1, M))
    for seed in range(NETWORKS):
        generator = torch.Generator().manual_seed(seed)
        net = TheoryUNet(
            M, 2, merge=merge, unit_gain=unit_gain, final_relu=final_relu, generator=generator
        )
        x, y = torch.randn(2, 1, M, generator=generator)
        x, y = M**0.5 * x / x.norm(), target * M**0.5 * y / y.norm()
        with scale_skips(net, skips, Uniform(C)):
            out = net(x)
            loss = (out - y - follow * out.detach()).square().mean()
            blocks = [*net.encoder, *(d.block for d in net.decoder)]
            weights = [w for b in blocks for w in (b.layer1.weight, b.layer2.weight)]
            grads = torch.autograd.grad(loss, weights)
        rows.append(torch.stack([g.square().sum() for g in grads]).view(2, 2, 2).numpy())
    gain = 1.0 if unit_gain else 2.0
    law = gradient_energy_law(
        [C] * 2, M, float(M), target**2 * M, alpha=gain, beta=gain, gamma=gain, merge=merge
    )
    return np.stack(rows) / law


class TestRandomNetworks:
    @pytest.mark.parametrize("merge", ["add", "concat"])
    @pytest.mark.parametrize(("unit_gain", "target"), [(True, 1.0), (False, 1.0), (True, 30.0)])
    def test_obey_the_law_at_every_weight(self, merge, unit_gain, target):
        ratio = measured(merge=merge, unit_gain=unit_gain, target=target)
        error = ratio.std(0, ddof=1) / NETWORKS**0.5
        assert (np.abs(ratio.mean(0) - 1) < 4 * error + 10 / M).all()
        assert error.max() < 0.16

    @pytest.mark.parametrize("broken", [{"final_relu": True}, {"follow": -1.0}], ids=str)
    def test_do_not_if_a_premise_is_broken(self, broken):
        """Blocks that end in a ReLU; a target that depends on the output."""
        assert (np.abs(measured(**broken).mean(0) - 1) > 0.5).all()
