"""The tensors between the blocks, and the graph that connects them."""

import pytest
import torch
from torch import nn

from stability_probe import Uniform, find_skips, scale_skips
from stability_probe.probes import ProbeBatch
from stability_probe.probes.graph import feature_graph
from stability_probe.skips import OperandTap
from tests.oracles.architectures import ZOO
from tests.oracles.zoo import hook_count

pytestmark = pytest.mark.filterwarnings("ignore::stability_probe.skips.SkipWarning")
NAMES = (
    "additive-in-place", "pix2pix", "projected", "scaled", "shared-both", "dict-output",
    "unet2d-checkpointed", "unet2d-condition", "unet3d-condition", "uvit-3", "theory-add-3",
)  # fmt: skip


def prepared(name):
    model = ZOO[name].build().eval()
    batch = ProbeBatch(ZOO[name].args, ZOO[name].kwargs)
    return model, find_skips(model, *batch.args, **batch.kwargs), batch


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_on_the_path_and_the_output_unchanged(name):
    model, skips, batch = prepared(name)
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        plain = batch.call(model)
    with feature_graph(model, skips, batch) as nodes:
        torch.testing.assert_close(nodes["output", 0], plain)  # kernels differ with gradients
        n = len(skips)
        assert {site for site, _ in nodes} == {"x", "f", "u", "ku", "z", "merged", "h", "output"}
        assert sorted(i for site, i in nodes if site == "h") == [*range(n + 1)]
        for (site, level), tensor in nodes.items():
            if site not in ("x", "u", "output", "h"):
                (g,) = torch.autograd.grad(
                    nodes["output", 0].square().sum(), tensor, retain_graph=True
                )
                assert g.any(), (site, level)
            if site not in ("x", "u"):
                (g,) = torch.autograd.grad(tensor.square().sum(), nodes["x", 0], retain_graph=True)
                assert g.any(), (site, level)
        assert not any(p.requires_grad for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert hook_count(model) == 0


def test_scaling_lies_between_u_and_ku():
    model, skips, batch = prepared("uvit-3")
    with scale_skips(model, skips, Uniform(0.5)), feature_graph(model, skips, batch) as nodes:
        for s in skips:
            assert torch.equal(nodes["ku", s.level], 0.5 * nodes["u", s.level])


def test_what_the_network_does_to_a_feature_lies_between_f_and_u():
    model, skips, batch = prepared("scaled")
    with feature_graph(model, skips, batch) as nodes:
        for s in skips:
            torch.testing.assert_close(nodes["u", s.level], s.kappa * nodes["f", s.level])
            assert s.kappa != 1


@pytest.mark.parametrize("name", ["unet2d-skip", "flat-diffusion", "skip-last"])
def test_a_feature_that_is_a_sum_outside_of_modules_is_seen_as_a_whole(name):
    """Nothing is done to these features on their way, so f_i and u_i are the same numbers."""
    model, skips, batch = prepared(name)
    assert any(isinstance(s.feature, OperandTap) for s in skips) == (name != "skip-last")
    with feature_graph(model, skips, batch) as nodes:
        for s in skips:
            assert torch.equal(nodes["f", s.level], nodes["u", s.level])


def test_cut_lets_only_what_goes_around_through():
    model, skips, batch = prepared("skip-last")
    with feature_graph(model, skips, batch, cut=True) as nodes:
        (g,) = torch.autograd.grad(nodes["output", 0].sum(), nodes["x", 0])
    assert not g.any()
    around = Residual(model)
    found = find_skips(around, *batch.args)
    with feature_graph(around, found, batch, cut=True) as nodes:
        (g,) = torch.autograd.grad(nodes["output", 0].sum(), nodes["x", 0])
    assert torch.equal(g, torch.full_like(g, 3.0))


class Residual(nn.Module):
    """3x + net(x)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + 3 * x


def test_everything_is_undone_if_the_model_raises():
    model, skips, batch = prepared("skip-last")
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), feature_graph(model, skips, batch):
        pass
    assert all(p.requires_grad for p in model.parameters())
    assert hook_count(model) == 1
