"""The clean samples that a network is probed on: images in a folder, or arrays in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stability_probe.checkpoints.reading import problem, reading

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Samples:
    """Clean samples.

    Attributes:
        x0: (samples, ...).
        given: values of other arguments, by name, as long as x0 where they are batched.
        note: one sentence on where they are from.
    """

    x0: Tensor
    given: dict[str, Tensor]
    note: str


def load_samples(path: Path, shape: tuple[int, ...] | None, most: int) -> Samples:
    """Samples from a folder of images, or from a `.npy` or `.npz` file.

    Images are cropped to the middle and resized to `shape`, in [−1, 1]. Arrays are (samples, ...);
    whole numbers 0..255 become [−1, 1], others stay. In a `.npz`, `x` (or the only array) is the
    samples, and the others are arguments of the network by name.

    Args:
        path: folder or file.
        shape: of one sample, (C, H, W) for images; `None` takes what the file has.
        most: how many to take.

    Raises:
        StabilityProbeError: if there are none, or they do not fit.
    """
    if path.is_dir():
        return _from_images(path, shape, most)
    with reading(path, "an array of numpy"):
        loaded: Any = np.load(path, allow_pickle=False)
        arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    name = "x" if "x" in arrays else next(iter(arrays), "x")
    if "x" not in arrays and len(arrays) != 1:
        raise problem(path, f"needs an array named x, has {', '.join(arrays) or 'none'}")
    x0 = _values(path, arrays.pop(name))
    if x0.ndim < 2 or not len(x0):
        raise problem(path, f"samples must be (samples, ...), got shape {tuple(x0.shape)}")
    if shape is not None and tuple(x0.shape[1:]) != shape:
        raise problem(path, f"samples are {tuple(x0.shape[1:])} and the network takes {shape}")
    n = min(most, len(x0))
    others = {
        key: torch.as_tensor(value)[:n] if len(value) == len(x0) else torch.as_tensor(value)
        for key, value in arrays.items()
    }
    return Samples(x0[:n], others, f"{n} samples of {path}")


def load_arguments(path: Path) -> dict[str, Tensor]:
    """Arguments of a network by name, from a `.npz` file.

    Raises:
        StabilityProbeError: if the file is something else.
    """
    with reading(path, "a .npz file of numpy"):
        return {name: torch.as_tensor(value) for name, value in np.load(path).items()}


def _from_images(folder: Path, shape: tuple[int, ...] | None, most: int) -> Samples:
    from PIL import Image, ImageOps

    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES)[:most]
    if not files:
        raise problem(folder, f"has no images in it ({', '.join(IMAGES)})")
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise problem(folder, f"images have 1 or 3 channels, and the network takes {shape}; "
                      "give its samples as an array in a .npy file")  # fmt: skip
    channels, height, width = shape
    rows = []
    for file in files:
        with reading(file, "an image"), Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
            rows.append(np.asarray(fitted).reshape(height, width, channels))
    x0 = torch.from_numpy(np.stack(rows)).movedim(-1, 1).float() / 127.5 - 1
    return Samples(x0, {}, f"{len(files)} images of {folder}, cropped and resized")


def _values(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise problem(path, f"samples must be numbers, got {array.dtype}")
    whole = array.dtype.kind in "iu"
    x0 = torch.as_tensor(array.astype(np.float32))
    if not x0.isfinite().all():
        raise problem(path, "samples must be finite; some are infinite or NaN")
    return x0 / 127.5 - 1 if whole else x0
