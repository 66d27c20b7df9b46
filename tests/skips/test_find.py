import pickle

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from stability_probe import (
    ConstantScaling,
    FreeU,
    LearnableScaling,
    SCTuner,
    StabilityProbeError,
    TheoryUNet,
    Uniform,
    UViT,
    UViTConfig,
    choose_skips,
    find_skips,
    scale_skips,
)
from stability_probe.skips import OutputTap, Scaling, SkipWarning
from stability_probe.skips.find import evaluating
from tests.oracles.architectures.layers import ConvBlock
from tests.oracles.architectures.unets import Additive, SmallUNet
from tests.oracles.zoo import ATTENTION, CASES, T, X, hook_count, unet2d

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def described(skips):
    return [(s.level, s.source, s.sink, s.merge, s.shape) for s in skips]


# ── which skips there are, by hand ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("merge", ["add", "concat"])
def test_theory_unet(merge):
    skips = find_skips(TheoryUNet(m=64, n_skips=3, merge=merge), X)
    assert described(skips) == [
        (1, "encoder.0", "decoder.0.block", merge, (64,)),
        (2, "encoder.1", "decoder.1.block", merge, (64,)),
        (3, "encoder.2", "decoder.2.block", merge, (64,)),
    ]


def test_uvit():
    skips = find_skips(UViT(UViTConfig(embed_dim=16, depth=7, num_heads=2)), X, T)
    assert described(skips) == [
        (1, "in_blocks.0", "out_blocks.2.skip_linear", "concat", (17, 16)),
        (2, "in_blocks.1", "out_blocks.1.skip_linear", "concat", (17, 16)),
        (3, "in_blocks.2", "out_blocks.0.skip_linear", "concat", (17, 16)),
    ]


def test_uvit_with_labels():
    model = UViT(UViTConfig(embed_dim=16, depth=3, num_heads=2, num_classes=4, patch_size=4))
    skips = find_skips(model, X, timesteps=T, y=torch.tensor([0, 3]))
    assert described(skips) == [(1, "in_blocks.0", "out_blocks.0.skip_linear", "concat", (6, 16))]


def test_unet2d():
    assert described(find_skips(unet2d(), X, T)) == [
        (1, "conv_in", "up_blocks.1.resnets.1", "concat", (8, 8, 8)),
        (2, "down_blocks.0.resnets.0", "up_blocks.1.resnets.0", "concat", (8, 8, 8)),
        (3, "down_blocks.0.downsamplers.0", "up_blocks.0.resnets.1", "concat", (8, 4, 4)),
        (4, "down_blocks.1.resnets.0", "up_blocks.0.resnets.0", "concat", (16, 4, 4)),
    ]


def test_unet2d_with_two_layers_a_block():
    assert described(find_skips(unet2d(layers_per_block=2), X, T)) == [
        (1, "conv_in", "up_blocks.1.resnets.2", "concat", (8, 8, 8)),
        (2, "down_blocks.0.resnets.0", "up_blocks.1.resnets.1", "concat", (8, 8, 8)),
        (3, "down_blocks.0.resnets.1", "up_blocks.1.resnets.0", "concat", (8, 8, 8)),
        (4, "down_blocks.0.downsamplers.0", "up_blocks.0.resnets.2", "concat", (8, 4, 4)),
        (5, "down_blocks.1.resnets.0", "up_blocks.0.resnets.1", "concat", (16, 4, 4)),
        (6, "down_blocks.1.resnets.1", "up_blocks.0.resnets.0", "concat", (16, 4, 4)),
    ]


def test_unet2d_with_attention():
    skips = find_skips(unet2d(**ATTENTION, layers_per_block=2), X, T)
    assert described(skips) == [
        (1, "conv_in", "up_blocks.1.resnets.2", "concat", (8, 8, 8)),
        (2, "down_blocks.0.resnets.0", "up_blocks.1.resnets.1", "concat", (8, 8, 8)),
        (3, "down_blocks.0.resnets.1", "up_blocks.1.resnets.0", "concat", (8, 8, 8)),
        (4, "down_blocks.0.downsamplers.0", "up_blocks.0.resnets.2", "concat", (8, 4, 4)),
        (5, "down_blocks.1.attentions.0", "up_blocks.0.resnets.1", "concat", (16, 4, 4)),
        (6, "down_blocks.1.attentions.1", "up_blocks.0.resnets.0", "concat", (16, 4, 4)),
    ]
    assert skips[0].decoded == OutputTap("up_blocks.1")
    assert [s.main for s in skips[:-1]] == [s.decoded for s in skips[1:]]


def test_unet2d_of_three_resolutions():
    model = unet2d(
        block_out_channels=(4, 8, 12),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )
    assert [s.source for s in find_skips(model, X, T)] == [
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.resnets.0",
        "down_blocks.1.downsamplers.0",
        "down_blocks.2.resnets.0",
    ]


def test_a_subclass_is_of_its_family():
    class Mine(TheoryUNet):
        pass

    assert len(find_skips(Mine(m=64, n_skips=2), X)) == 2


# ── the taps see what Eq. 4 names ────────────────────────────────────────────────────────────────


def observe(case, model):
    """(skips, tensors by (site, level)) of one pass; a site that is passed twice fails."""
    skips, seen = find_skips(model, *case.args), {}

    class Keep:
        def __init__(self, *site):
            self.site = site

        def __call__(self, tensor):
            assert self.site not in seen
            seen[self.site] = tensor

    for s in skips:
        OutputTap(s.source).attach(model, Keep("source", s.level))
        s.decoded.attach(model, Keep("h", s.level - 1))
        for site in ("skip", "main", "merged"):
            getattr(s, site).attach(model, Keep(site, s.level))
    case.run(model)
    return skips, seen


@cases
def test_merges_are_of_main_and_skip(case):
    skips, seen = observe(case, case.build())
    assert len(skips) == case.n_skips
    for s in skips:
        skip, main, merged = (seen[site, s.level] for site in ("skip", "main", "merged"))
        assert torch.equal(skip, seen["source", s.level])
        assert tuple(skip.shape[1:]) == s.shape
        dim = 2 if skip.ndim == 3 else 1  # tokens have features last
        expected = torch.cat([main, skip], dim=dim) if s.merge == "concat" else main + skip
        assert torch.equal(merged, expected)


@pytest.mark.parametrize("name", CASES)
def test_output_of_block_i_is_what_merge_i_minus_one_reads(name):
    """h_{i-1} = z_{i-1}, for every merge but the one that the network's own output follows."""
    skips, seen = observe(CASES[name], CASES[name].build())
    for s in skips[1:]:
        assert seen["h", s.level - 1].shape == seen["main", s.level - 1].shape
        assert torch.equal(seen["h", s.level - 1], seen["main", s.level - 1])


# ── the model is left as it was ──────────────────────────────────────────────────────────────────


@cases
def test_leaves_no_trace(case):
    model = case.build().train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    state = {key: v.clone() for key, v in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    find_skips(model, *case.args)
    assert [m.training for m in model.modules()] == modes
    assert len(set(modes)) == 2
    assert all(torch.equal(v, state[key]) for key, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert hook_count(model) == 0


class Draws(TheoryUNet):
    """Draws from the global generator, keeps the mode it ran in, and can fail."""

    fail = False

    def forward(self, x, t=None):
        self.drawn, self.mode = torch.rand(1), self.training
        if self.fail:
            raise RuntimeError("no such input")
        return super().forward(x, t)


@pytest.mark.parametrize("fail", [False, True])
def test_runs_the_model_in_evaluation_mode_and_restores_it_even_on_failure(fail):
    model = Draws(m=64, n_skips=2).train()
    model.middle.eval()
    model.fail = fail
    rng = torch.random.get_rng_state()
    if fail:
        with pytest.raises(RuntimeError, match="no such input"):
            find_skips(model, X)
    else:
        find_skips(model, X)
    assert model.mode is False
    assert (model.training, model.middle.training, model.encoder.training) == (True, False, True)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert hook_count(model) == 0


def test_evaluating_restores_modes_that_differ():
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1))
    model[0].eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        torch.rand(1)
    assert [m.training for m in model.modules()] == [True, False, True]


@cases
def test_a_skip_names_modules_and_does_not_hold_them(case):
    model = case.build()
    skips = find_skips(model, *case.args)
    assert pickle.loads(pickle.dumps(skips)) == skips
    assert find_skips(case.build(), *case.args) == skips
    for s in skips:
        for path in (s.source, s.sink):
            model.get_submodule(path)


@pytest.mark.parametrize(
    ("args", "problem"), [((), "needs an example input with a tensor"), ((3,), "got none")]
)
def test_without_an_input_there_is_nothing_to_follow(args, problem):
    with pytest.raises(StabilityProbeError, match=problem):
        find_skips(nn.Linear(2, 2), *args)


def test_an_output_that_the_input_does_not_reach_is_refused():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(2)

    with pytest.raises(StabilityProbeError, match="could not be followed to the output"):
        find_skips(Constant(), X)


def test_a_person_can_choose():
    model = TheoryUNet(m=64, n_skips=3)
    every = find_skips(model, X)
    assert choose_skips([("encoder.*", "decoder.*")], model, X) == every
    chosen = choose_skips([("encoder.1", "*")], model, X)
    assert [(s.level, s.source) for s in chosen] == [(1, "encoder.1")]
    with pytest.raises(
        StabilityProbeError, match=r"no merge from 'encoder.9' into '\*'; there are"
    ):
        choose_skips([("encoder.9", "*")], model, X)


def test_unet2d_is_that_of_diffusers():
    assert isinstance(unet2d(), UNet2DModel)


class Joined(SmallUNet):
    """A UNet whose skips are joined by what is neither a concatenation nor a sum of two."""

    def __init__(self, join):
        super().__init__(cat=False)
        self.join = join

    def merge(self, z, u):
        return self.join(z, u)


class InARow(nn.Module):
    """Several small UNets, one after the other."""

    def __init__(self, n):
        super().__init__()
        self.parts = nn.Sequential(*[Additive() for _ in range(n)])

    def forward(self, x):
        return self.parts(x)


class BeforeALongTail(SmallUNet):
    """A UNet, and thirty layers at its full resolution."""

    def __init__(self):
        super().__init__()
        self.tail = nn.Sequential(*[ConvBlock(4, 4) for _ in range(30)])

    def decode(self, x):
        return self.tail(super().decode(x))


IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
UNSURE = {
    "stack": (lambda: Joined(lambda z, u: torch.stack([z, u]).sum(0)), "joined .* by stack, which"),
    "where": (lambda: Joined(lambda z, u: torch.where(u > 0, u, z)), "joined .* by where, which"),
    "maximum": (lambda: Joined(torch.maximum), "joined .* by maximum, which"),
    "in a row": (lambda: InARow(4), "8 merges bridge a coarser resolution, but only a small part"),
    "long tail": (BeforeALongTail, "2 merges bridge a coarser resolution, but only a small part"),
}


@pytest.mark.parametrize("name", UNSURE)
def test_what_it_is_unsure_of_it_says(name):
    build, message = UNSURE[name]
    with pytest.warns(SkipWarning, match=message):
        assert find_skips(build(), IMAGE) == []


def test_what_it_leaves_out_a_person_can_choose():
    net = BeforeALongTail()
    found = choose_skips([("enc*", "dec*")], net, IMAGE)
    assert [(s.level, s.source, s.sink) for s in found] == [
        (1, "enc1", "dec1"),
        (2, "enc2", "dec2"),
    ]


# ── in a model that is scaled already ────────────────────────────────────────────────────────────


class Random(Scaling):
    def coefficients(self, n_skips):
        return None

    def forward(self, u, level):
        return u * torch.rand_like(u)


SCHEMES = {
    "cs": lambda: ConstantScaling(kappa=0.7),
    "zero": lambda: Uniform(0.0),
    "ls": LearnableScaling,
    "ls-non-shared": lambda: LearnableScaling(shared=False),
    "sc-tuner": SCTuner,
    "random": Random,
}


@cases
def test_scaling_is_not_taken_for_the_models_own_code(case):
    model = case.build().eval()
    skips = find_skips(model, *case.args)
    for scheme in SCHEMES.values():
        with scale_skips(model, skips, Uniform(0.5)), scale_skips(model, skips, scheme()):
            before = case.run(model)
            assert find_skips(model, *case.args) == skips
            assert scheme is Random or torch.equal(case.run(model), before)  # scaled as before


@pytest.mark.parametrize("build", [SmallUNet, Additive])
def test_nor_where_a_merge_is_made_between_modules(build):
    model = build()
    skips = find_skips(model, IMAGE)
    with scale_skips(model, skips, Uniform(0.5)):
        assert find_skips(model, IMAGE) == skips


def test_nor_where_a_person_chooses():
    model = TheoryUNet(m=64, n_skips=2)
    pairs = [("encoder.*", "decoder.*")]
    skips = choose_skips(pairs, model, X)
    with scale_skips(model, skips, ConstantScaling(0.7)):
        assert choose_skips(pairs, model, X) == skips


def test_nor_what_boosts_the_decoder():
    model = unet2d()
    skips = find_skips(model, X, T)
    with scale_skips(model, skips, FreeU()):
        assert find_skips(model, X, T) == skips


def test_scaling_is_on_again_after_an_error():
    model = TheoryUNet(m=64, n_skips=2)
    with scale_skips(model, find_skips(model, X), Uniform(0.5)):
        before = model(X)
        with pytest.raises(RuntimeError):
            find_skips(model, X[:, :, :5])
        assert torch.equal(model(X), before)
