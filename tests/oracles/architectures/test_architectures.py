"""The zoo itself: every model builds, runs, and has the modules that its expected skips name."""

import pytest
import torch
from torch import nn

from tests.oracles.architectures import (
    NESTED,
    WITHOUT,
    ZOO,
    Architecture,
    recursive,
    segmentation,
    tensors,
    unets,
)
from tests.oracles.architectures.architecture import noise

EVERY = ZOO | WITHOUT | NESTED


def by_name(zoo: dict[str, Architecture]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("architecture", zoo.values(), ids=zoo)


def outputs(
    architecture: Architecture, model: nn.Module, change: bool = False
) -> list[torch.Tensor]:
    """The tensors put out, with the global generator at a fixed state; `change` swaps the batch."""
    first, *rest = architecture.args
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(
            model(first.roll(1, dims=0) if change else first, *rest, **architecture.kwargs)
        )


def test_names_are_in_one_dictionary():
    assert len(EVERY) == len(ZOO) + len(WITHOUT) + len(NESTED)
    assert all(architecture.skips for architecture in ZOO.values())
    assert not any(architecture.skips for architecture in (WITHOUT | NESTED).values())


@by_name(EVERY)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_runs(architecture, training):
    """Finite outputs that depend on the input and are the same for a model built again."""
    state = torch.random.get_rng_state()
    model, again = architecture.build().train(training), architecture.build().train(training)
    assert torch.equal(torch.random.get_rng_state(), state)
    out = outputs(architecture, model)
    assert out
    assert all(t.isfinite().all() for t in out)
    repeated = outputs(architecture, again)
    assert all(torch.equal(a, b) for a, b in zip(out, repeated, strict=True))
    changed = outputs(architecture, model, change=True)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(out, changed, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_every_part_takes_part(name):
    """A gradient reaches the parameters, but for a few that the example leaves unused."""
    model = EVERY[name].build().eval()
    if name == "autoencoder-tiny":
        model = model.decoder  # its latents are rounded to bytes: no gradient passes
        out = [model(noise(2, 4, 4, 4))]
    else:
        out = EVERY[name].run(model)
    torch.stack([t.square().mean() for t in out]).sum().backward()
    idle = [
        path
        for path, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert len(idle) <= 2, idle


# Where u_i does not arrive in the merge as its source put it out: (network, level) and why.
CHANGED = {
    ("projected", 1): "1x1 convolution", ("projected", 2): "1x1 convolution",
    ("normalised", 1): "norm", ("normalised", 2): "norm",
    ("scaled", 1): "factor", ("scaled", 2): "factor",
    ("attention-unet", 1): "gate", ("attention-unet", 2): "gate",
    ("unpadded-3d", 1): "crop", ("unpadded-3d", 2): "crop",
    ("unet-1d", 1): "activation", ("unet-1d", 2): "activation",
    ("identity-after", 1): "activation", ("identity-after", 2): "activation",
    ("flat-diffusion", 3): "residual", ("flat-diffusion", 5): "residual",
    ("unet2d-skip", 3): "sum with the image", ("unet2d-attention-skip", 3): "sum with the image",
    ("unet2d-condition-freeu", 1): "filter", ("unet2d-condition-freeu", 2): "filter",
    ("unet2d-condition-freeu", 3): "filter", ("unet2d-condition-freeu", 4): "filter",
    ("unet2d-condition-controlled", 1): "sum", ("unet2d-condition-controlled", 2): "sum",
    ("unet2d-condition-controlled", 3): "sum", ("unet2d-condition-controlled", 4): "sum",
}  # fmt: skip


def is_part(u, merged):
    """Whether `u` is the first or the last part of `merged` along a dimension."""
    for view in (u, u.movedim(1, -1)):
        for dim in range(1, view.ndim):
            if merged.ndim == view.ndim and merged.shape[dim] > view.shape[dim]:
                size = view.shape[dim]
                for start in (0, merged.shape[dim] - size):
                    part = merged.narrow(dim, start, size)
                    if part.shape == view.shape and torch.equal(part, view):
                        return True
    return False


def cropped(u, shape):
    """The middle of a feature map."""
    for dim, size in enumerate(shape[1:], start=2):
        u = u.narrow(dim, (u.shape[dim] - size) // 2, size)
    return u


@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"read-twice"}))  # its sources run once
def test_expected_skips(name):
    """Sources run in the order of the levels and sinks in the opposite one; u_i joins there."""
    architecture = ZOO[name]
    model = architecture.build().eval()
    ran: list[tuple[str, str]] = []
    features, merged = [], []

    def source_hook(path):
        def hook(module, args, output):
            (tensor,) = tensors(output)
            ran.append(("source", path))
            features.append(tensor.clone())

        return hook

    def sink_hook(path):
        def hook(module, args, kwargs):
            ran.append(("sink", path))
            merged.append(tensors([args, kwargs])[0].clone())

        return hook

    for source in {source for source, *_ in architecture.skips}:
        if source:
            model.get_submodule(source).register_forward_hook(source_hook(source))
        else:
            features.append(architecture.args[0])
    for sink in {sink for _, sink, *_ in architecture.skips}:
        assert sink
        model.get_submodule(sink).register_forward_pre_hook(sink_hook(sink), with_kwargs=True)
    with torch.no_grad():
        architecture.run(model)

    expected = [("source", source) for source, *_ in architecture.skips if source]
    expected += [("sink", sink) for _, sink, *_ in reversed(architecture.skips)]
    assert ran == expected
    joins = zip(architecture.skips, features, reversed(merged), strict=True)
    for level, ((_, _, merge, shape), u, tensor) in enumerate(joins, start=1):
        if CHANGED.get((name, level)) == "crop":
            assert u.shape[2:] != shape[1:]
            assert is_part(cropped(u, shape), tensor)
            continue
        assert tuple(u.shape[1:]) == shape
        assert merge in ("add", "concat")
        if merge == "concat":
            assert is_part(u, tensor) != ((name, level) in CHANGED)


# ── the networks compute what their names say ────────────────────────────────────────────────────


def test_recursive_mlp_is_the_recursion():
    model, x = recursive.recursive_mlp(2), noise(3, 12)
    u1 = model.a(x)
    u2 = model.inner.a(u1)
    z1 = model.inner.b(u2 + model.inner.inner(u2))
    assert torch.equal(model(x), model.b(u1 + z1))


def test_pix2pix_in_place_joins_the_activated_feature():
    x = noise(2, 1, 16, 16)
    inplace, plain = (ZOO[name].build() for name in ("pix2pix", "pix2pix-out-of-place"))
    plain.load_state_dict(inplace.state_dict())
    joined = {}
    for name, model in (("inplace", inplace), ("plain", plain)):
        model.model[1].register_forward_hook(
            lambda m, a, out, name=name: joined.update({name: out.clone()})
        )
        model(x)
    leaky = nn.functional.leaky_relu(joined["plain"][:, :4], 0.2)
    torch.testing.assert_close(joined["inplace"][:, :4], leaky)


def test_small_unet_by_hand():
    model, x = ZOO["skip-last"].build(), noise(2, 1, 8, 8)
    pool, up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
    u1 = model.enc1(x)
    u2 = model.enc2(pool(u1))
    z1 = model.dec2(torch.cat([up(model.bottom(pool(u2))), u2], dim=1))
    z0 = model.dec1(torch.cat([up(z1), u1], dim=1))
    assert torch.equal(model(x), model.head(z0))


def test_additive_in_place_or_not():
    x = noise(2, 1, 8, 8)
    a, b = ZOO["additive"].build(), ZOO["additive-in-place"].build()
    assert isinstance(b, unets.InPlace)
    torch.testing.assert_close(a(x), b(x))


def test_a_checkpointed_block_runs_twice_with_gradients():
    model, calls = ZOO["checkpointed"].build(), []
    model.dec1.body.register_forward_pre_hook(lambda *_: calls.append(1))  # its end is not run
    model(noise(2, 1, 8, 8)).sum().backward()
    assert len(calls) == 2


def test_odd_sizes_are_kept():
    assert segmentation.OddSizesUNet()(noise(1, 1, 13, 11)).shape == (1, 1, 13, 11)
