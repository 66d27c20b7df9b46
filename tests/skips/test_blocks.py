import pytest
import torch
from torch import nn

from stability_probe import LearnableScaling, UViT, UViTConfig, find_skips, scale_skips
from stability_probe.skips import Block, parameter_blocks
from tests.oracles.zoo import ATTENTION, CASES, T, X, hook_count, unet2d

MID, OTHER = Block("mid"), Block("other")
A = {i: Block("a", i) for i in range(1, 7)}
B = {i: Block("b", i) for i in range(1, 7)}

THEORY = {
    "encoder.0": A[1], "encoder.1": A[2], "encoder.2": A[3], "middle": MID,
    "decoder.0": B[1], "decoder.1": B[2], "decoder.2": B[3],
}  # fmt: skip
UVIT = {
    "patch_embed": A[1], "in_blocks.0": A[1], "in_blocks.1": A[2], "mid_block": MID,
    "out_blocks.0": B[2], "out_blocks.1": B[1], "norm": B[1], "decoder_pred": B[1],
    "final_layer": B[1], "pos_embed": OTHER, "time_embed": OTHER, "label_emb": OTHER,
}  # fmt: skip
# a resnet's time_emb_proj goes with its resnet; a sampler belongs to the block it ends or begins
UNET2D = {
    "conv_in": A[1], "down_blocks.0.resnets.0": A[2], "down_blocks.0.downsamplers": A[3],
    "down_blocks.1.resnets.0": A[4], "mid_block": MID,
    "up_blocks.0.resnets.0": B[4], "up_blocks.0.resnets.1": B[3], "up_blocks.0.upsamplers": B[3],
    "up_blocks.1.resnets.0": B[2], "up_blocks.1.resnets.1": B[1],
    "conv_norm_out": B[1], "conv_out": B[1], "time_embedding": OTHER,
}  # fmt: skip
UNET2D_ATTENTION = UNET2D | {
    "down_blocks.1.attentions.0": A[4],
    "up_blocks.0.attentions.0": B[4],
    "up_blocks.0.attentions.1": B[3],
}
UNET2D_LAYERS = {
    "conv_in": A[1], "down_blocks.0.resnets.0": A[2], "down_blocks.0.resnets.1": A[3],
    "down_blocks.0.downsamplers": A[4], "down_blocks.1.resnets.0": A[5],
    "down_blocks.1.resnets.1": A[6], "mid_block": MID,
    "up_blocks.0.resnets.0": B[6], "up_blocks.0.resnets.1": B[5], "up_blocks.0.resnets.2": B[4],
    "up_blocks.0.upsamplers": B[4], "up_blocks.1.resnets.0": B[3], "up_blocks.1.resnets.1": B[2],
    "up_blocks.1.resnets.2": B[1], "conv_norm_out": B[1], "conv_out": B[1],
    "time_embedding": OTHER,
}  # fmt: skip


def labelled_uvit():
    return UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2, num_classes=3, mlp_time_embed=True))


MODELS = {
    "theory-add": (CASES["theory-add"].build, (X,), THEORY),
    "theory-concat": (CASES["theory-concat"].build, (X,), THEORY),
    "uvit": (CASES["uvit"].build, (X, T), UVIT),
    "uvit-labels": (labelled_uvit, (X, T, torch.tensor([0, 2])), UVIT),
    "unet2d": (unet2d, (X, T), UNET2D),
    "unet2d-attention": (lambda: unet2d(**ATTENTION), (X, T), UNET2D_ATTENTION),
    "unet2d-layers": (lambda: unet2d(layers_per_block=2), (X, T), UNET2D_LAYERS),
}
models = pytest.mark.parametrize(("build", "args", "expected"), MODELS.values(), ids=MODELS)


def spread(model, expected):
    """A block for every parameter, from one for each of the modules that hold them."""
    blocks = {}
    for name, _ in model.named_parameters():
        (holder,) = (part for part in expected if f"{name}.".startswith(f"{part}."))
        blocks[name] = expected[holder]
    return blocks


@models
def test_every_parameter_by_hand(build, args, expected):
    model = build()
    blocks = parameter_blocks(model, find_skips(model, *args), *args)
    assert blocks == spread(model, expected)


def test_arguments_may_be_given_by_name():
    model = CASES["uvit"].build()
    skips = find_skips(model, X, T)
    for call in ({"x": X, "timesteps": T}, {"timesteps": T, "x": X}):
        assert parameter_blocks(model, skips, **call) == spread(model, UVIT)
    assert parameter_blocks(model, skips, timesteps=T.float(), x=X) == spread(model, UVIT)


def test_frozen_parameters_have_blocks_too():
    model = unet2d()
    model.requires_grad_(False)
    assert parameter_blocks(model, find_skips(model, X, T), X, T) == spread(model, UNET2D)


def test_a_layer_that_runs_twice_belongs_to_the_block_of_its_first_run():
    model = CASES["theory-add"].build()
    model.decoder[0].block.layer2 = model.encoder[1].layer2
    blocks = parameter_blocks(model, find_skips(model, X), X)
    assert blocks["encoder.1.layer2.weight"] == A[2]


@models
@pytest.mark.parametrize("shared", [True, False])
def test_gates_belong_to_no_block(build, args, expected, shared):
    model = build()
    skips = find_skips(model, *args)
    scale_skips(model, skips, LearnableScaling(shared=shared))
    assert parameter_blocks(model, skips, *args) == spread(model, expected | {"se": OTHER})


@models
def test_a_model_with_gates_keeps_the_blocks_of_its_own_parameters(build, args, expected):
    model = build()
    skips = find_skips(model, *args)
    scale_skips(model, skips, LearnableScaling(shared=False))
    blocks = parameter_blocks(model, skips, *args)
    own = {name: block for name, block in blocks.items() if not name.startswith("se.")}
    assert own == {k: b for k, b in spread(model, expected | {"se": OTHER}).items() if k in own}
    assert len(own) < len(blocks)


@models
def test_leaves_no_trace(build, args, expected):
    model = build().train()
    next(model.children()).eval()
    skips = find_skips(model, *args)
    modes = [m.training for m in model.modules()]
    state = {key: v.clone() for key, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    rng = torch.random.get_rng_state()
    with torch.no_grad():  # it needs gradients itself, wherever it is called from
        assert parameter_blocks(model, skips, *args) == spread(model, expected)
        assert not torch.is_grad_enabled()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(v, state[key]) for key, v in model.state_dict().items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not args[0].requires_grad
    assert hook_count(model) == 0


class Fails(nn.Module):
    def forward(self, *args):
        raise RuntimeError("in the middle of a pass")


def test_leaves_no_trace_after_a_failure():
    model = CASES["uvit"].build().train()
    skips = find_skips(model, X, T)
    model.out_blocks[1].mlp = Fails()
    rng = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="in the middle of a pass"):
        parameter_blocks(model, skips, X, T)
    assert hook_count(model) == 0
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_dropout_is_off_and_draws_nothing():
    model = unet2d(dropout=0.5).train()
    skips = find_skips(model, X, T)
    rng = torch.random.get_rng_state()
    parameter_blocks(model, skips, X, T)
    assert torch.equal(torch.random.get_rng_state(), rng)


@models
def test_a_sharded_model_has_the_same_blocks(build, args, expected):
    """Its parameters cannot be replaced by detached ones, so dependence is followed by type."""
    net = build()
    skips = find_skips(net, *args)
    for p in net.parameters():
        p.to_local = lambda p=p: p  # as a DTensor has it
    found = parameter_blocks(net, skips, *args)
    assert found == parameter_blocks(build(), skips, *args)
    assert all(p.requires_grad for p in net.parameters())
