import numpy as np
import pytest

from stability_probe.theory import gradient_bound, gradient_scale

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
