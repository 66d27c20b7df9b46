"""Certified constants against dense matrices and dense grids of numbers, in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from stability_probe.theory import lipschitz
from stability_probe.theory.lipschitz import (
    ACTIVATION_CONSTANTS,
    average_pooling_norm,
    convolution_norm,
    elu_constant,
    leaky_relu_constant,
    linear_norm,
    max_pooling_constant,
)

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dense_norm(fn, *shape):
    """The norm of a linear map of tensors of a shape, from its matrix."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return float(torch.linalg.matrix_norm(fn(basis).flatten(1), ord=2))


def convolution_of(weight, groups=1, **how):
    fn = CONVOLUTIONS[weight.ndim - 2]
    return lambda x: fn(x, weight, groups=groups, **how)


class TestLinear:
    def test_is_the_largest_singular_value(self):
        u, v = (torch.linalg.qr(normal(5, 5, seed=s)).Q for s in (1, 2))
        matrix = u[:, :4] @ torch.diag(torch.tensor([4.0, 3, 2, 1]).double()) @ v[:4]
        assert linear_norm(matrix) == pytest.approx(4.0, rel=1e-12)
        assert linear_norm(matrix.float()) == pytest.approx(4.0, rel=1e-6)

    def test_of_several_matrices_is_that_of_the_largest(self):
        assert linear_norm(torch.stack([torch.eye(3), -5 * torch.eye(3)])) == 5.0
        assert linear_norm(torch.zeros(0, 3)) == 0.0


class TestConvolution:
    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_is_never_below_the_dense_norm(self, data):
        d = data.draw(st.sampled_from([1, 1, 2, 2, 2, 3]))

        def one_each(low, high):
            return data.draw(st.lists(st.integers(low, high), min_size=d, max_size=d))

        size = one_each(1, {1: 12, 2: 6, 3: 3}[d])
        kernel, stride, padding, dilation = (one_each(lo, hi) for lo, hi in LIMITS)
        reach = [g * (k - 1) + 1 for k, g in zip(kernel, dilation, strict=True)]
        padding = [
            max(p, -((n - r) // 2)) for n, r, p in zip(size, reach, padding, strict=True)
        ]  # so that there is an output
        groups = data.draw(st.integers(1, 2))
        seed = data.draw(st.integers(0, 99))
        weight = normal(groups * data.draw(st.integers(1, 2)), 2, *kernel, seed=seed)
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        bound = convolution_norm(weight, size, **how)
        dense = dense_norm(convolution_of(weight, **how), 2 * groups, *size)
        assert bound >= dense * (1 - 1e-12)

    @pytest.mark.parametrize(
        ("kernel", "how", "factor"),
        [
            (3, {"padding": 1}, 1.1),
            (3, {"padding": 1, "stride": 2}, 1.1),
            (4, {"padding": 1, "stride": 2}, 1.1),
            (3, {}, 1.15),
            (5, {"padding": 2}, 1.25),
            (3, {"padding": 2, "dilation": 2}, 1.25),
            (2, {"stride": 2}, 1 + 1e-9),
            (1, {}, 1 + 1e-9),
            (1, {"stride": 2}, 1 + 1e-9),
        ],
    )
    def test_is_close_at_8_by_8(self, kernel, how, factor):
        for seed in range(4):
            weight = normal(3, 4, kernel, kernel, seed=seed)
            dense = dense_norm(convolution_of(weight, **how), 4, 8, 8)
            assert dense * (1 - 1e-12) <= convolution_norm(weight, [8, 8], **how) <= factor * dense

    def test_comes_closer_the_larger_the_input(self):
        weight = normal(2, 2, 3, seed=3)
        excess = [
            convolution_norm(weight, [n], padding=1)
            / dense_norm(convolution_of(weight, padding=1), 2, n)
            - 1
            for n in (2, 8, 32, 128)
        ]
        assert all(later < 0.3 * earlier for earlier, later in pairwise(excess))
        assert excess[-1] < 2e-3

    def test_is_exact_for_a_circular_convolution(self):
        """Nothing is cropped and no zeros are read if the input itself lies on a ring."""
        weight = normal(3, 2, 3, 3, seed=5)

        def circular(x):
            return F.conv2d(F.pad(x, (0, 2, 0, 2), mode="circular"), weight)

        dense = dense_norm(circular, 2, 7, 6)
        assert convolution_norm(weight, [7, 6]) == pytest.approx(dense, rel=1e-12)

    @pytest.mark.parametrize("d", [1, 2, 3])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_serves_the_transposed_convolution_by_its_output_size(self, d, stride):
        weight, size = normal(2, 3, *[3] * d, seed=d), [4] * d
        how = {"stride": stride, "padding": 1, "output_padding": stride - 1}
        out = TRANSPOSED[d](torch.zeros(1, 2, *size).double(), weight, **how).shape[2:]
        dense = dense_norm(lambda x: TRANSPOSED[d](x, weight, **how), 2, *size)
        bound = convolution_norm(weight, out, stride, 1)
        assert dense * (1 - 1e-12) <= bound <= 1.5 * dense

    def test_takes_groups_apart(self):
        one, other = normal(2, 3, 3, seed=1), 5 * normal(2, 3, 3, seed=2)
        both = convolution_norm(torch.cat([one, other]), [8], padding=1, groups=2)
        assert both == pytest.approx(convolution_norm(other, [8], padding=1), rel=1e-12)

    def test_a_smoothing_kernel_by_hand(self):
        """[1 2 1]/4 passes the frequency 0 whole; [1 -2 1] doubles its alternation twice."""
        smooth = torch.tensor([[[1.0, 2.0, 1.0]]]) / 4
        assert convolution_norm(smooth, [9], padding=1) == pytest.approx(1.0)
        second = torch.tensor([[[1.0, -2.0, 1.0]]])
        assert convolution_norm(second, [9], padding=1) == pytest.approx(4.0)  # a ring of 10
        assert convolution_norm(second, [8], padding=1) == pytest.approx(2 + 2 * np.cos(np.pi / 9))

    def test_frequencies_may_be_taken_in_pieces(self, monkeypatch):
        weight = normal(3, 4, 3, 3, seed=7)
        whole = convolution_norm(weight, [9, 8], padding=1)
        monkeypatch.setattr(lipschitz, "_CHUNK", 25)
        assert convolution_norm(weight, [9, 8], padding=1) == pytest.approx(whole, rel=1e-13)

    def test_refuses_sizes_that_do_not_fit(self):
        with pytest.raises(ValueError, match="needs 2 input sizes, got"):
            convolution_norm(normal(1, 1, 3, 3), [8])


LIMITS = ((1, 4), (1, 3), (0, 3), (1, 2))


class TestPooling:
    @pytest.mark.parametrize("kernel", [1, 2, 3])
    @pytest.mark.parametrize("stride", [1, 2, 3])
    def test_averages_are_bounded_and_exactly_where_windows_tile(self, kernel, stride):
        dense = dense_norm(lambda x: F.avg_pool2d(x, kernel, stride), 1, 6, 6)
        bound = average_pooling_norm([kernel] * 2, [stride] * 2)
        assert bound >= dense * (1 - 1e-12)
        if kernel <= stride:
            assert bound == pytest.approx(dense)

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 999))
    def test_maxima_never_move_further(self, kernel, stride, seed):
        x, y = normal(2, 1, 1, 6, 6, seed=seed)
        change = F.max_pool2d(x, kernel, stride) - F.max_pool2d(y, kernel, stride)
        bound = max_pooling_constant([kernel] * 2, [stride] * 2)
        assert change.norm() <= bound * (x - y).norm()

    def test_the_constant_of_overlapping_maxima_is_reached(self):
        """One peak in the middle is the maximum of all four windows."""
        x = torch.zeros(1, 1, 3, 3).double()
        peak = x.clone()
        peak[0, 0, 1, 1] = 1.0
        change = (F.max_pool2d(peak, 2, 1) - F.max_pool2d(x, 2, 1)).norm()
        assert change.item() == max_pooling_constant([2, 2], [1, 1]) == 2.0


FUNCTIONS = {
    "abs": torch.abs,
    "clamp": lambda x: torch.clamp(x, -1, 2),
    "clamp_max": lambda x: torch.clamp_max(x, 1),
    "clamp_min": lambda x: torch.clamp_min(x, -1),
    "hardtanh": F.hardtanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class TestActivations:
    GRID = torch.linspace(-12, 12, 200_001, dtype=torch.float64)

    def steepest(self, fn):
        values = fn(self.GRID)
        return float((values.diff() / self.GRID.diff()).abs().max())

    @pytest.mark.parametrize("name", ACTIVATION_CONSTANTS)
    def test_constants_are_the_steepest_slopes(self, name):
        assert self.steepest(FUNCTIONS[name]) == pytest.approx(ACTIVATION_CONSTANTS[name], rel=1e-4)

    @pytest.mark.parametrize("slope", [0.01, -3.0, 2.0])
    def test_leaky_relu(self, slope):
        steepest = self.steepest(lambda x: F.leaky_relu(x, slope))
        assert leaky_relu_constant(slope) == pytest.approx(steepest, rel=1e-9)

    @pytest.mark.parametrize("about", [(1.0,), (0.5,), (2.5,), (1.6733, 1.0507), (2.0, 1.5, 3.0)])
    def test_elu(self, about):
        steepest = self.steepest(lambda x: torch.ops.aten.elu(x, *about))
        assert elu_constant(*about) == pytest.approx(steepest, rel=1e-3)

    def test_elu_that_grows_exponentially_has_none(self):
        with pytest.raises(ValueError, match="input_scale must not be negative, got -1"):
            elu_constant(1.0, 1.0, -1.0)
