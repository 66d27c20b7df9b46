"""Clean samples from folders and files."""

import numpy as np
import pytest
import torch
from PIL import Image

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.samples import load_arguments, load_samples


@pytest.fixture
def images(tmp_path):
    """Three images of different sizes and modes, red in the middle, and a file that is none."""
    for k, (mode, size) in enumerate([("RGB", (40, 20)), ("L", (16, 16)), ("RGBA", (9, 30))]):
        Image.new(mode, size, "red" if mode != "L" else 76).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


class TestImages:
    def test_are_cropped_resized_and_scaled(self, images):
        found = load_samples(images, (3, 8, 8), most=9)
        assert found.x0.shape == (3, 3, 8, 8)
        assert found.x0.dtype == torch.float32
        red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 8, 8)
        torch.testing.assert_close(found.x0[0], red)
        torch.testing.assert_close(found.x0[1], torch.full((3, 8, 8), 76 / 127.5 - 1))
        assert "3 images of" in found.note
        assert found.given == {}

    def test_in_the_order_of_their_names_and_no_more_than_asked_for(self, images):
        found = load_samples(images, (1, 4, 4), most=2)
        assert found.x0.shape == (2, 1, 4, 4)

    def test_the_middle_is_kept(self, tmp_path):
        wide = np.zeros((10, 30), np.uint8)
        wide[:, 10:20] = 255
        Image.fromarray(wide).save(tmp_path / "a.png")
        assert (load_samples(tmp_path, (1, 10, 10), 1).x0 == 1).all()

    @pytest.mark.parametrize("shape", [None, (4, 8, 8), (3, 4, 8, 8), (8,)])
    def test_networks_that_take_no_images(self, images, shape):
        with pytest.raises(StabilityProbeError, match=r"1 or 3 channels, and the network takes"):
            load_samples(images, shape, 1)

    def test_no_images(self, tmp_path):
        with pytest.raises(StabilityProbeError, match="has no images in it"):
            load_samples(tmp_path, (3, 8, 8), 1)

    def test_a_damaged_image(self, images):
        (images / "0.png").write_bytes((images / "0.png").read_bytes()[:40])
        with pytest.raises(StabilityProbeError, match=r"0\.png: cannot be read as an image"):
            load_samples(images, (3, 8, 8), 1)


class TestArrays:
    def save(self, path, **arrays):
        np.savez(path, **arrays)
        return path

    def test_npy_as_it_is(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(5, 2, 3))
        np.save(tmp_path / "x.npy", x)
        found = load_samples(tmp_path / "x.npy", None, most=4)
        torch.testing.assert_close(found.x0, torch.from_numpy(x[:4]).float())
        assert "4 samples of" in found.note

    def test_whole_numbers_are_pixels(self, tmp_path):
        np.save(tmp_path / "x.npy", np.array([[0, 255]], np.uint8))
        assert load_samples(tmp_path / "x.npy", None, 1).x0.tolist() == [[-1.0, 1.0]]

    def test_npz_has_other_arguments(self, tmp_path):
        x, labels = np.zeros((4, 3)), np.arange(4)
        path = self.save(tmp_path / "x.npz", x=x, labels=labels, table=np.ones((9, 2)))
        found = load_samples(path, (3,), most=2)
        assert found.given["labels"].tolist() == [0, 1]
        assert found.given["table"].shape == (9, 2)
        assert "x" not in found.given

    def test_the_only_array_needs_no_name(self, tmp_path):
        path = self.save(tmp_path / "x.npz", images=np.zeros((4, 3)))
        assert load_samples(path, None, 9).x0.shape == (4, 3)

    @pytest.mark.parametrize(
        ("arrays", "shape", "message"),
        [
            ({"a": np.zeros((2, 3)), "b": np.zeros(2)}, None, "needs an array named x, has a, b"),
            ({"x": np.zeros((2, 3))}, (4,), r"samples are \(3,\) and the network takes \(4,\)"),
            ({"x": np.zeros(3)}, None, r"must be \(samples, \.\.\.\), got shape \(3,\)"),
            ({"x": np.zeros((0, 3))}, None, r"must be \(samples, \.\.\.\)"),
            ({"x": np.array([["a"]])}, None, "samples must be numbers"),
            ({"x": np.array([[np.nan]])}, None, "samples must be finite"),
            ({}, None, "needs an array named x, has none"),
        ],
    )
    def test_arrays_that_do_not_fit(self, tmp_path, arrays, shape, message):
        path = self.save(tmp_path / "x.npz", **arrays)
        with pytest.raises(StabilityProbeError, match=message):
            load_samples(path, shape, 1)

    def test_pickles_in_an_array_are_not_read(self, tmp_path):
        np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(StabilityProbeError, match="cannot be read as an array of numpy"):
            load_samples(tmp_path / "x.npy", None, 1)

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"hello"])
    def test_damaged_files(self, tmp_path, content):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(StabilityProbeError, match="cannot be read as"):
            load_samples(tmp_path / "x.npz", None, 1)

    def test_arguments_alone(self, tmp_path):
        path = self.save(tmp_path / "k.npz", y=np.arange(3))
        assert load_arguments(path)["y"].tolist() == [0, 1, 2]
        with pytest.raises(StabilityProbeError, match=r"cannot be read as a \.npz file"):
            load_arguments(tmp_path / "absent.npz")
        np.save(tmp_path / "x.npy", np.zeros(3))
        with pytest.raises(StabilityProbeError, match=r"cannot be read as a \.npz file"):
            load_arguments(tmp_path / "x.npy")
