"""Networks whose modules and parameters are not one of each: frozen, unused, shared, wrapped."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.utils.checkpoint import checkpoint

from stability_probe import StabilityProbe, StabilityProbeError, find_skips, scale_skips
from stability_probe.probes import per_sample_mse
from stability_probe.skips import parse_scaling
from tests.oracles.loops import checkpointing, recorded
from tests.oracles.recording import (
    Pass,
    assert_rows,
    energy,
    expected_samples,
    expected_step,
    places,
)

F64 = torch.float64
FEATURES = "energy cross kappa feature_grad_energy loss samples"
PARAMETERS = "grad_energy param_energy"


def batches_of(case):
    return [case.data(n, seed, F64) for n, seed in ((4, 1), (3, 2))]


# ── parameters ───────────────────────────────────────────────────────────────────────────────────


def test_frozen_parameters_have_no_rows_and_the_others_all_of_theirs(case):
    net = case.net(F64).eval()
    whole = expected_step(copy.deepcopy(net), batches_of(case))
    places(net).middle.requires_grad_(False)
    assert_rows(recorded(net, case.skips(net), batches_of(case)), {
        row: value for row, value in whole.items() if not row[1].startswith("mid/")
    })  # fmt: skip


def test_features_of_a_frozen_encoder_have_energies_and_no_gradients(case):
    net = case.net(F64).eval()
    whole = expected_step(copy.deepcopy(net), batches_of(case))
    for name, parameter in net.named_parameters():
        inside = name.startswith(
            ("time_embed", "pos_embed", "patch_embed", "conv_in", "down_blocks")
        )
        parameter.requires_grad_(not inside)
    for module in places(net).encoder:
        module.requires_grad_(False)
    frame = recorded(net, case.skips(net), batches_of(case))
    expected = {
        row: value
        for row, value in whole.items()
        if not row[1].startswith(("a/", "other/"))
        and row[:2] != ("feature_grad_energy", "u")
    }  # fmt: skip
    assert_rows(frame, expected)


def test_unused_parameters_have_gradients_of_zero(cases):
    case = cases["uvit"]
    net = case.net(F64)
    expected = expected_step(copy.deepcopy(net), batches_of(case))
    net.unused = nn.Linear(2, 3).double()
    for name, parameter in net.unused.named_parameters():
        expected["grad_energy", f"other/unused.{name}", 0, "value"] = 0.0
        size = energy(parameter[None]).item()
        expected["param_energy", f"other/unused.{name}", 0, "value"] = size
    assert_rows(recorded(net, case.skips(net), batches_of(case)), expected)


@pytest.mark.parametrize("name", ["add", "uvit"])
def test_a_parameter_under_two_names_has_one_row_and_its_whole_gradient(cases, name):
    case = cases[name]
    net = case.net(F64)
    blocks = net.encoder if name == "add" else net.in_blocks
    first, last = (blocks[0].layer2, blocks[1].layer2) if name == "add" else (
        blocks[0].attn.proj, blocks[1].attn.proj)  # fmt: skip
    untied = expected_step(copy.deepcopy(net), batches_of(case))
    last.weight = first.weight
    expected = expected_step(copy.deepcopy(net), batches_of(case))
    assert len(expected) == len(untied) - 2
    assert_rows(recorded(net, case.skips(net), batches_of(case)), expected)


# ── modules ──────────────────────────────────────────────────────────────────────────────────────


class Block(nn.Module):
    def __init__(self, fan_in):
        super().__init__()
        self.inner, self.outer = nn.Linear(fan_in, 12), nn.Linear(12, 6)

    def forward(self, v):
        return self.outer(self.inner(v).tanh())


class Join(nn.Module):
    """A decoder block that merges."""

    def __init__(self, add):
        super().__init__()
        self.block, self.add = Block(6 if add else 12), add

    def forward(self, z, u):
        return self.block(z + u if self.add else torch.cat([z, u], 1))


class Sharing(nn.Module):
    """Three skips, with modules that are used at several places.

    Args:
        encoder, decoder: for every level which block is used there.
        add: merge by a sum.
    """

    def __init__(self, encoder=(0, 1, 2), decoder=(0, 1, 2), add=False):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.ModuleList(Block(6) for _ in set(encoder))
        self.b = nn.ModuleList(Join(add) for _ in set(decoder))
        self.mid, self.encoder, self.decoder = Block(6), encoder, decoder
        self.double()

    def forward(self, x, t=None):
        z, skips = x, []
        for which in self.encoder:
            z = self.a[which](z)
            skips.append(z)
        z = self.mid(z)
        for which in reversed(self.decoder):
            z = self.b[which](z, skips.pop())
        return z


def pass_of(net, batch, kappa):
    """A pass of `Sharing` by hand that keeps everything."""
    x, t, target = batch
    seen, v = Pass(x, t), x
    for i, which in enumerate(net.encoder, start=1):
        v = seen.u[i] = net.a[which](v)
    v = net.mid(v)
    seen.h[3] = v
    for i in (3, 2, 1):
        seen.z[i], seen.ku[i] = v, kappa[i - 1] * seen.u[i]
        join = net.b[net.decoder[i - 1]]
        seen.merged[i] = v + seen.ku[i] if join.add else torch.cat([v, seen.ku[i]], 1)
        v = seen.h[i - 1] = join.block(seen.merged[i])
    for tensor in (*seen.u.values(), *seen.h.values()):
        tensor.retain_grad()
    seen.output, seen.loss = v, (v - target).square().mean(1)
    return seen


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(n, 6, generator=generator, dtype=F64) for _ in range(2))
    return x, torch.randint(1000, (n,), generator=generator), target


SHARED = {
    "nothing": {},
    "two encoder blocks": {"encoder": (0, 1, 1)},
    "all encoder blocks": {"encoder": (0, 0, 0)},
    "two decoder blocks": {"decoder": (0, 0, 1)},
    "decoder blocks apart": {"decoder": (0, 1, 0)},
    "all blocks": {"encoder": (0, 0, 0), "decoder": (0, 0, 0)},
}


@pytest.mark.parametrize("scheme", ["unscaled", "cs:0.5"])
@pytest.mark.parametrize("add", [False, True], ids=["concat", "add"])
@pytest.mark.parametrize("shared", SHARED)
def test_a_module_at_several_places_is_recorded_at_each(shared, add, scheme):
    net = Sharing(**SHARED[shared], add=add)
    twin, batches = copy.deepcopy(net), [data(4, 1), data(3, 2)]
    skips = find_skips(net, batches[0][0])
    with scale_skips(net, skips, parse_scaling(scheme)):
        frame = recorded(net, skips, batches)
    kappa = [1.0, 1.0, 1.0] if scheme == "unscaled" else [1.0, 0.5, 0.25]
    passes = [pass_of(twin, batch, kappa) for batch in batches]
    (sum(p.loss.mean() for p in passes) / 2).backward()
    assert_rows(frame, expected_samples(passes, add), metrics=FEATURES)
    found = frame[frame.metric == "grad_energy"].set_index("site").value
    assert len(found) == len(list(twin.parameters()))
    for name, parameter in twin.named_parameters():
        (site,) = [s for s in found.index if s.endswith(f"/{name}")]
        assert found[site] == pytest.approx(energy(parameter.grad[None]).item(), rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_encoder_block_that_is_called_twice_may_be_checkpointed(reentrant):
    """Nothing is asked of its calls one by one."""
    net, batches = Sharing(encoder=(0, 1, 1)), [data(4, 1), data(3, 2)]
    twin, skips = copy.deepcopy(net), find_skips(net, batches[0][0])
    checkpointing(net.a[1], reentrant)
    frame = recorded(net, skips, batches)
    passes = [pass_of(twin, batch, [1.0, 1.0, 1.0]) for batch in batches]
    (sum(p.loss.mean() for p in passes) / 2).backward()
    assert_rows(frame, expected_samples(passes, add=False), metrics=FEATURES)


def test_a_module_that_is_called_twice_and_repeated_by_checkpointing_is_refused():
    """Outside a pass its calls cannot be told apart."""
    net = Sharing(decoder=(0, 0, 0))
    x, t, target = data(4, 1)
    skips = find_skips(net, x)
    run = net.b[0].forward
    net.b[0].block.register_forward_hook(lambda *args: None)
    block = net.b[0].block
    net.b[0].forward = lambda z, u: checkpoint(
        lambda z, u: block(torch.cat([z, u], 1)), z, u, use_reentrant=False
    )
    assert torch.equal(net.b[0].forward(x, x), run(x, x))
    with (
        pytest.raises(StabilityProbeError, match="called several times in a pass, and now outside"),
        StabilityProbe(net, skips, sensitivity_every=0) as probe,
    ):
        per_sample_mse(net(x, t), target).mean().backward()
        probe.step()


# ── outputs ──────────────────────────────────────────────────────────────────────────────────────


class Named(NamedTuple):
    count: int
    sample: torch.Tensor


@dataclass
class Plain:
    sample: torch.Tensor
    count: int = 0


WRAPPINGS: dict[str, tuple[Any, Any]] = {
    "tuple": (lambda v: (v, None), lambda out: out[0]),
    "tuple of one": (lambda v: (v,), lambda out: out[0]),
    "list": (lambda v: [None, v], lambda out: out[1]),
    "dict": (lambda v: {"count": 3, "sample": v}, lambda out: out["sample"]),
    "named tuple": (lambda v: Named(3, v), lambda out: out.sample),
    "dataclass": (lambda v: Plain(v), lambda out: out.sample),
    "diffusers": (lambda v: UNet2DOutput(sample=v), lambda out: out.sample),
}


class Wrapping(Sharing):
    """All blocks, and the network, give what they make in a container."""

    def __init__(self, wrapping, add):
        super().__init__(add=add)
        self.wrap, self.unwrap = WRAPPINGS[wrapping]
        for block in (*self.a, *self.b, self.mid):
            block.register_forward_hook(lambda m, a, out: self.wrap(out))

    def forward(self, x, t=None):
        z, skips = x, []
        for block in self.a:
            z = self.unwrap(block(z))
            skips.append(z)
        z = self.unwrap(self.mid(z))
        for block in reversed(self.b):
            z = self.unwrap(block(z, skips.pop()))
        return self.wrap(z)


@pytest.mark.parametrize("scheme", ["unscaled", "cs:0.5"])
@pytest.mark.parametrize("add", [False, True], ids=["concat", "add"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_outputs_in_containers(wrapping, add, scheme):
    net, batches = Wrapping(wrapping, add), [data(4, 1), data(3, 2)]
    twin = Sharing(add=add)
    skips = find_skips(net, batches[0][0])
    assert len(skips) == 3
    with scale_skips(net, skips, parse_scaling(scheme)):
        frame = recorded(
            net, skips, batches, forward=lambda net, x, t: net.unwrap(net(x, t)),
        )  # fmt: skip
    kappa = [1.0, 1.0, 1.0] if scheme == "unscaled" else [1.0, 0.5, 0.25]
    passes = [pass_of(twin, batch, kappa) for batch in batches]
    (sum(p.loss.mean() for p in passes) / 2).backward()
    assert_rows(frame, expected_samples(passes, add), metrics=FEATURES)


def test_a_model_whose_first_output_is_a_loss_is_refused():
    class WithLoss(Sharing):
        def forward(self, x, t=None):
            out = super().forward(x, t)
            return out.square().mean(), out

    net, (x, t, _) = WithLoss(), data(4, 1)
    with (
        pytest.raises(StabilityProbeError, match="is one number and has no samples; a model that"),
        StabilityProbe(net, find_skips(Sharing(), x)),
    ):
        net(x, t)
