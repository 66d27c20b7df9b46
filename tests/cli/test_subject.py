"""From a checkpoint to a network, inputs and skips."""

import numpy as np
import pytest
import torch
from torch import nn

from stability_probe import (
    LearnableScaling,
    StabilityProbeError,
    UViT,
    UViTConfig,
    find_skips,
    scale_skips,
)
from stability_probe.checkpoints import load_checkpoint
from stability_probe.cli.options import SubjectOptions
from stability_probe.cli.subject import learned_scaling, open_subject
from tests.checkpoints.saved_files import FACTORY, conv_unet, diffusers_unet, save_export

CONFIG = UViTConfig(embed_dim=16, depth=5, num_heads=2)


@pytest.fixture
def unet(tmp_path):
    diffusers_unet().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.fixture
def plain(tmp_path):
    torch.save(conv_unet().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def opened(path, **options):
    return open_subject(SubjectOptions(path, **options))


def test_a_diffusers_folder_says_everything_itself(unet):
    subject = opened(unet, batch=3)
    assert subject.inputs.args[0].shape == (3, 1, 8, 8)
    assert subject.skips[0].source == "conv_in"
    assert len(subject.skips) == 4
    assert subject.samples is None


def test_weights_with_a_factory_and_a_shape(plain):
    subject = opened(plain, model=FACTORY, input="1,8,8")
    assert [(s.source, s.sink) for s in subject.skips] == [("inp", "out")]


def test_arguments_of_the_factory(tmp_path):
    torch.save(conv_unet(width=6).state_dict(), tmp_path / "net.pt")
    subject = opened(tmp_path / "net.pt", model=FACTORY, model_args='{"width": 6}', input="1,8,8")
    assert subject.model.inp.out_channels == 6


def test_samples_from_a_file(unet, tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    subject = opened(unet, input=str(tmp_path / "x.npz"), batch=4)
    assert torch.equal(subject.samples.x0, torch.from_numpy(x[:4]))
    assert subject.inputs.args[0].shape == (4, 1, 8, 8)


def test_images_take_the_shape_that_the_network_says(unet, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "images" / "a.png")
    subject = opened(unet, input=str(tmp_path / "images"))
    assert subject.samples.x0.shape == (1, 1, 8, 8)


def test_arguments_by_name(unet, tmp_path):
    np.savez(tmp_path / "k.npz", timestep=np.array([7.0, 9.0]))
    subject = opened(unet, kwargs=tmp_path / "k.npz")
    assert subject.inputs.kwargs["timestep"].tolist() == [7.0, 9.0]


def test_precision(unet):
    subject = opened(unet, dtype="float64")
    assert subject.inputs.args[0].dtype == torch.float64
    assert {p.dtype for p in subject.model.parameters()} == {torch.float64}


def test_chosen_skips(unet):
    subject = opened(unet, skips=["conv_in=up_blocks.1.*"])
    assert [(s.level, s.source) for s in subject.skips] == [(1, "conv_in")]


def test_a_seed_gives_the_same_inputs(unet):
    a, b, c = (opened(unet, seed=seed).inputs.args[0] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.filterwarnings("ignore:.*trusted")
def test_an_exported_program_is_given_batches_of_its_size(tmp_path, capsys):
    subject = opened(save_export(tmp_path), trust_pickle=True, batch=5)
    assert subject.inputs.args[0].shape == (1, 1, 8, 8)
    assert subject.whole
    assert "exported for batches of 1" in capsys.readouterr().err


def test_weights_that_do_not_fit_only_if_allowed(plain, tmp_path):
    state = torch.load(plain) | {"extra": torch.ones(1)}
    torch.save(state, tmp_path / "more.pt")
    with pytest.raises(StabilityProbeError, match="1 unexpected"):
        opened(tmp_path / "more.pt", model=FACTORY, input="1,8,8")
    subject = opened(tmp_path / "more.pt", model=FACTORY, input="1,8,8", partial=True)
    assert subject.checkpoint.unexpected == ["extra"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "--device 'cuda:99': cannot be used"),
        ({"device": "abacus"}, "--device 'abacus': cannot be used"),
        ({"dtype": "int8"}, "--dtype 'int8': must be one of float32"),
        ({"batch": 0}, "--batch: must be at least 1, got 0"),
        ({"input": "nowhere"}, "--input 'nowhere': neither a shape such as 3,32,32 nor a file"),
        ({"input": "2,8,8"}, r"UNet2DModel fails on an input of shape \(2, 2, 8, 8\)"),
        ({"skips": ["a"]}, "must be SOURCE=SINK"),
        ({"skips": ["no=where"]}, "no merge from 'no' into 'where'"),
        ({"model_args": "3"}, "--model-args: must be a JSON object"),
    ],
)
def test_bad_options(unet, options, message):
    with pytest.raises(StabilityProbeError, match=message):
        opened(unet, **options)


class TestLearnedScaling:
    @pytest.fixture(params=[True, False], ids=["shared", "one a skip"])
    def trained(self, request, tmp_path):
        """A U-ViT with learned gates, its weights saved as ScaleLong does, and an output."""
        net, x, t = UViT(CONFIG), torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
        generator = torch.Generator().manual_seed(5)
        scheme = LearnableScaling(request.param, generator=generator)
        with scale_skips(net, find_skips(net, x, t), scheme):
            torch.save(net.state_dict(), tmp_path / "ls.pth")
            return tmp_path / "ls.pth", x, t, net(x, t)

    def test_is_applied_as_it_was_trained(self, trained):
        path, x, t, expected = trained
        checkpoint = load_checkpoint(path, factory_args={"num_heads": 2})
        skips = find_skips(checkpoint.model, x, t)
        scheme = learned_scaling(checkpoint, skips)
        assert not torch.allclose(checkpoint.model(x, t), expected, atol=1e-4)
        with scale_skips(checkpoint.model, skips, scheme):
            assert torch.equal(checkpoint.model(x, t), expected)

    def test_gates_of_another_network(self, trained):
        path, x, t, _ = trained
        checkpoint = load_checkpoint(path, factory_args={"num_heads": 2})
        skips = find_skips(checkpoint.model, x, t)
        wrong = {f"{k}x": v for k, v in checkpoint.scaling_state.items() if "layer2" in k}
        checkpoint.scaling_state.update(wrong)
        with pytest.raises(StabilityProbeError, match=r"learnable scaling .* does not fit"):
            learned_scaling(checkpoint, skips)

    def test_there_may_be_none(self, unet):
        assert learned_scaling(load_checkpoint(unet), []) is None


class Brittle(nn.Module):
    """A network that raises something of its own, on two lines."""

    def forward(self, x):
        raise KeyError("no\nway")


def test_what_a_network_raises_is_told_in_a_line(tmp_path):
    torch.save(Brittle(), tmp_path / "whole.pt")
    with (
        pytest.warns(UserWarning, match="trusted"),
        pytest.raises(StabilityProbeError, match="Brittle fails on an input of shape") as error,
    ):
        opened(tmp_path / "whole.pt", trust_pickle=True, input="3,4,4")
    assert "\n" not in str(error.value)
