"""Models that write into tensors which a probe has seen."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stability_probe import StabilityProbe, StabilityProbeError, find_skips
from stability_probe.probes import per_sample_mse
from tests.oracles.loops import recorded
from tests.oracles.recording import Pass, assert_rows, expected_samples

F64 = torch.float64
FEATURES = "energy cross kappa feature_grad_energy loss samples"


class Block(nn.Module):
    """A block that saves nothing of its input for the backward pass.

    Args:
        fan_in: length of the input.
        end: what is done to the output.
    """

    def __init__(self, fan_in, end=None):
        super().__init__()
        self.inner, self.outer, self.end = nn.Linear(fan_in, 12), nn.Linear(12, 6), end

    def forward(self, v):
        v = self.outer(self.inner(v * 1.5).tanh())
        return v if self.end is None else self.end(v)


class Join(nn.Module):
    def __init__(self, add, write):
        super().__init__()
        self.block, self.add, self.write = Block(6 if add else 12), add, write

    def forward(self, z, u):
        if "operands" in self.write:
            u.add_(1.0)
            z.mul_(0.5)
        if "sum" in self.write and self.add:
            z += u
            return self.block(z)
        merged = z + u if self.add else torch.cat([z, u], 1)
        return self.block(merged)


class Writing(nn.Module):
    """Two skips; writes in place at the places that are named in `write`."""

    def __init__(self, write=(), add=False, end=None):
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.a = nn.ModuleList(Block(6, end) for _ in range(2))
        self.mid = Block(6, end)
        self.b = nn.ModuleList(Join(add, write) for _ in range(2))
        self.double()

    def forward(self, x, t=None):
        z, skips = x, []
        for block in self.a:
            z = block(z)
            if "encoder" in self.write:
                z.relu_()
            skips.append(z)
        z = self.mid(z)
        for block in reversed(self.b):
            if "decoder" in self.write:
                z += 1
            z = block(z, skips.pop())
        if "output" in self.write:
            z *= 3
        return z


def pass_of(net, batch):
    """A pass of `Writing` by hand, in which nothing is written to, and everything kept."""
    (x, t, target), write = batch, net.write
    seen, v = Pass(x, t), x
    for i, block in enumerate(net.a, start=1):
        v = block(v)
        v = seen.u[i] = v.relu() if "encoder" in write else v
    v = net.mid(v)
    for i in (2, 1):
        join = net.b[i - 1]
        v = v + 1 if "decoder" in write else v
        seen.h[i] = seen.z[i] = v
        seen.ku[i], z, u = seen.u[i], v, seen.u[i]
        if "operands" in write:
            z, u = z * 0.5, u + 1.0
        seen.merged[i] = z + u if join.add else torch.cat([z, u], 1)
        v = join.block(seen.merged[i])
    seen.h[0] = v
    seen.output = v * 3 if "output" in write else v
    for tensor in (*seen.u.values(), *seen.h.values()):
        tensor.retain_grad()
    seen.loss = (seen.output - target).square().mean(1)
    return seen


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(n, 6, generator=generator, dtype=F64) for _ in range(2))
    return x, torch.randint(1000, (n,), generator=generator), target


WRITES = [(), ("encoder",), ("decoder",), ("output",), ("operands",), ("sum",)]
WRITES.append(("decoder", "output", "operands", "sum"))


def skips_of(net):
    """The skips of a network, found where it does not write into what it merges."""
    return find_skips(Writing(tuple(w for w in net.write if w != "operands"), net.b[0].add), X)


X = data(1, 0)[0]


@pytest.mark.parametrize("add", [False, True], ids=["concat", "add"])
@pytest.mark.parametrize("write", WRITES, ids=",".join)
def test_energies_and_gradients_are_of_the_values_that_passed(write, add):
    net, batches = Writing(write, add), [data(4, 1), data(3, 2)]
    frame = recorded(net, skips_of(net), batches)
    twin = Writing(write, add)
    passes = [pass_of(twin, batch) for batch in batches]
    (sum(p.loss.mean() for p in passes) / 2).backward()
    # operands that are written to before they are merged are not what is merged
    metrics = FEATURES if "operands" not in write else FEATURES.replace("cross ", "")
    assert_rows(frame, expected_samples(passes, add), metrics=metrics)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# ── views ────────────────────────────────────────────────────────────────────────────────────────

VIEWS = {
    "view": lambda v: v.view(v.shape),
    "transposed": lambda v: v.t().contiguous().t(),
    "slice": lambda v: torch.cat([v, v], 1)[:, :6],
}
views = pytest.mark.parametrize("end", VIEWS.values(), ids=VIEWS)
WRITTEN = "is a view of another tensor that is written to in place .* `h = h \\+ ...` there"


@views
def test_a_view_that_is_not_written_to(end):
    net, batches = Writing(end=end), [data(4, 1), data(3, 2)]
    frame = recorded(net, skips_of(net), batches, order="sum")
    passes = [pass_of(Writing(end=end), batch) for batch in batches]
    (sum(p.loss.mean() for p in passes) / 2).backward()
    assert_rows(frame, expected_samples(passes, add=False), metrics=FEATURES)


def test_nothing_is_kept_of_a_view_once_gradients_come():
    net, (x, t, target) = Writing(end=VIEWS["view"]), data(4, 1)
    with StabilityProbe(net, skips_of(net), sensitivity_every=0) as probe:
        loss = per_sample_mse(net(x, t), target).mean()
        assert len(probe._features.views) == 3
        loss.backward()
        assert probe._features.views == []


@views
@pytest.mark.parametrize("write", [("operands",), ("sum",)], ids=",".join)
def test_a_view_that_is_written_to_after_it_has_passed_is_refused(end, write):
    """No gradient flows through its old place in the graph."""
    net, batch = Writing(write, add=True, end=end), data(4, 1)
    with pytest.raises(StabilityProbeError, match=rf"[uh]_[012] {WRITTEN}"):
        recorded(net, skips_of(net), [batch])


def test_views_of_which_none_has_a_gradient_left_are_refused():
    net, batch = Writing(("operands", "output"), add=True, end=VIEWS["view"]), data(4, 1)
    net.b[0].block.end = VIEWS["view"]
    net.b[1].block.end = VIEWS["view"]
    net.a.requires_grad_(False)
    with pytest.raises(StabilityProbeError, match=rf"h_[012] {WRITTEN}"):
        recorded(net, skips_of(net), [batch])


def test_a_view_that_is_written_to_after_the_pass_is_refused():
    """As by `prediction -= noise`."""

    net, (x, t, target) = Writing(), data(4, 1)
    net.b[0].block.end = VIEWS["view"]
    with StabilityProbe(net, skips_of(net), sensitivity_every=0) as probe:
        out = net(x, t)
        out -= target
        out.square().mean().backward()
        with pytest.raises(StabilityProbeError, match=f"h_0 {WRITTEN}"):
            probe.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_view_that_is_written_to_inside_a_checkpoint_is_refused(reentrant):
    class Inside(Writing):
        def forward(self, x, t=None):
            u = self.a[0](x)
            return checkpoint(self.inside, u, use_reentrant=reentrant)

        def inside(self, u):
            v = self.a[1](u)
            return self.b[0](self.b[1](self.mid(v), v), u.clone())

    net, (x, t, target) = Inside(("operands",), end=VIEWS["view"]), data(4, 1)
    with StabilityProbe(net, skips_of(net), sensitivity_every=0) as probe:
        loss = per_sample_mse(net(x, t), target)
        loss.mean().backward()
        with pytest.raises(StabilityProbeError, match=rf"[uh]_[12] {WRITTEN}"):
            probe.step(loss=loss)
