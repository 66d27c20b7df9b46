"""Per-sample gradient energies, against one backward pass a sample."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stability_probe import scale_skips
from stability_probe.probes import ProbeBatch
from stability_probe.probes import sample_gradients as module
from stability_probe.probes.records import Key
from stability_probe.probes.sample_gradients import sample_gradients, weight_energies
from stability_probe.skips import parameter_blocks, parse_scaling
from tests.oracles.recording import block_of, output_of
from tests.oracles.zoo import hook_count

MEMORY = 2**27
D = 6


@contextmanager
def measuring(case, scheme="cs:0.7", *, n=3, dtype=torch.float64, net=None, **options):
    """A network under a scheme, what it is measured on, and the arguments to measure it."""
    net = case.net(dtype) if net is None else net
    skips = case.skips(net)
    with scale_skips(net, skips, parse_scaling(scheme)):
        x, t, target = case.data(n, 0, dtype)
        batch = ProbeBatch((x, t), **({"target": target} | options))
        blocks = parameter_blocks(net, skips, x[:2], t[:2])
        net.eval()
        yield net, blocks, batch


def by_hand(net, batch):
    """ℓ_s and the largest ‖∇_W ℓ_s‖² by block, one backward pass a sample."""
    losses, rows = [], []
    for s in range(len(batch.x)):
        net.zero_grad()
        x, t = (v[s : s + 1] for v in batch.args)
        loss = (output_of(net, x, t) - batch.target[s : s + 1]).square().mean()
        loss.backward()
        losses.append(loss.detach())
        largest: dict[tuple[str, int], torch.Tensor] = {}
        for name, p in net.named_parameters():
            block = block_of(net, name)
            if p.ndim > 1 and p.requires_grad and block[0] in ("a", "b"):
                here = p.grad.square().sum()
                largest[block] = max(largest.get(block, here), here)
        rows.append(largest)
    net.zero_grad()
    return torch.stack(losses), {b: torch.stack([row[b] for row in rows]) for b in rows[0]}


class TestBlocks:
    @pytest.mark.parametrize(
        ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str
    )
    @pytest.mark.parametrize("scheme", ["cs:0.7", "ls"])
    def test_are_those_of_single_backward_passes(self, case, dtype, rtol, scheme, monkeypatch):
        monkeypatch.setattr(module, "_by_vmap", None)  # layers suffice
        with measuring(case, scheme, dtype=dtype) as (net, blocks, batch):
            found = sample_gradients(net, blocks, batch, MEMORY)
            losses, largest = by_hand(net, batch)
        close = {"rtol": rtol, "atol": 0}
        torch.testing.assert_close(found.pop(Key("sample_loss", "loss", 0, "")), losses, **close)
        assert {(key.site, key.level) for key in found} == set(largest)
        assert {key.metric for key in found} == {"sample_grad_energy"}
        for key, value in found.items():
            torch.testing.assert_close(value, largest[key.site, key.level], **close)
            assert not value.requires_grad

    @pytest.mark.parametrize("at_once", [0, 1, 2, 4])
    def test_the_budget_makes_no_difference(self, case, at_once):
        with measuring(case, n=5) as (net, blocks, batch):
            whole = sample_gradients(net, blocks, batch, MEMORY)
            need = module._one_sample(net, dict(net.named_parameters()), batch, 0)[1]
            parts = sample_gradients(net, blocks, batch, at_once * need)
        assert whole.keys() == parts.keys()
        for key, value in whole.items():
            torch.testing.assert_close(parts[key], value, rtol=1e-9, atol=0)

    def test_frozen_weights_are_left_out(self, cases):
        case = cases["add"]
        net = case.net(torch.float64)
        net.encoder[0].requires_grad_(False)
        net.decoder[1].block.layer1.weight.requires_grad_(False)
        with measuring(case, net=net) as (_, blocks, batch):
            found = sample_gradients(net, blocks, batch, MEMORY)
            _, largest = by_hand(net, batch)
        assert Key("sample_grad_energy", "a", 1, "") not in found
        b_2 = found[Key("sample_grad_energy", "b", 2, "")]
        torch.testing.assert_close(b_2, largest["b", 2], rtol=1e-9, atol=0)

    def test_need_a_weight(self, cases):
        with measuring(cases["add"]) as (net, blocks, batch):
            net.requires_grad_(False)
            assert sample_gradients(net, blocks, batch, MEMORY) == {}

    def test_the_loss_function_is_the_batchs(self, cases):
        def doubled(output, target):
            return 2 * (output - target).square().flatten(1).mean(1)

        with measuring(cases["concat"]) as (net, blocks, batch):
            plain = sample_gradients(net, blocks, batch, MEMORY)
        with measuring(cases["concat"], loss_fn=doubled) as (net, blocks, batch):
            twice = sample_gradients(net, blocks, batch, MEMORY)
        for key, value in plain.items():
            factor = 2 if key.metric == "sample_loss" else 4
            torch.testing.assert_close(twice[key], factor * value, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("sample", [0, 2])
    def test_a_sample_that_is_nan_is_nan_and_the_others_are_not(self, cases, sample):
        with measuring(cases["uvit"], n=4) as (net, blocks, batch):
            clean = sample_gradients(net, blocks, batch, MEMORY)
            batch.x[sample] = float("nan")
            found = sample_gradients(net, blocks, batch, MEMORY)
        others = [s for s in range(4) if s != sample]
        for key, value in found.items():
            assert value[sample].isnan()
            torch.testing.assert_close(value[others], clean[key][others], rtol=1e-9, atol=0)

    def test_leaves_no_hook_gradient_or_graph(self, case):
        with measuring(case) as (net, blocks, batch):
            before = hook_count(net)
            found = sample_gradients(net, blocks, batch, MEMORY)
            assert hook_count(net) == before
            assert all(p.grad is None for p in net.parameters())
            assert not any(v.requires_grad for v in found.values())

    @pytest.mark.parametrize("name", ["uvit", "unet2d"])
    def test_works_under_no_grad(self, cases, name):
        with measuring(cases[name]) as (net, blocks, batch):
            expected = sample_gradients(net, blocks, batch, MEMORY)
            with torch.no_grad():
                found = sample_gradients(net, blocks, batch, MEMORY)
        assert all(torch.equal(found[key], value) for key, value in expected.items())

    def test_leaves_no_hook_if_the_network_raises(self, cases):
        with measuring(cases["uvit"]) as (net, blocks, batch):
            before, calls = hook_count(net), iter(range(9))

            def second_call(module, args):
                if next(calls) == 1:
                    raise KeyError("broken")

            handle = net.norm.register_forward_pre_hook(second_call)
            with pytest.raises(KeyError, match="broken"):
                sample_gradients(net, blocks, batch, MEMORY)
            handle.remove()
            assert hook_count(net) == before


class Net(nn.Module):
    """A network of two linear layers, in which each variation does something of its own."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)
            self.build()
        self.double()

    def build(self):
        pass

    def forward(self, x):
        return self.two(self.one(x).tanh())


class CalledTwice(Net):
    def forward(self, x):
        return self.one(self.two(self.one(x).tanh()).tanh())


class CalledByKeyword(Net):
    def forward(self, x):
        return self.two(input=self.one(input=x).tanh())


class TiedModules(Net):
    def build(self):
        self.two.weight = self.one.weight


class WrittenInto(Net):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)

    def build(self):
        self.one.register_forward_hook(lambda *call: call[2].mul_(2))
        self.two.register_forward_hook(lambda *call: call[2].add_(1).relu_())


class WrittenIntoViews(Net):
    """Wrong: an output of three dimensions is a view, whose gradient arrives elsewhere then."""

    def forward(self, x):
        return self.two(self.one(x).mul_(2).tanh_()).add_(1).relu_()


class UsedElsewhere(Net):
    """Wrong: the layer's call is not the only use of its weight."""

    def forward(self, x):
        return self.two(F.linear(self.one(x).tanh(), self.one.weight))


class TokensFirst(Net):
    """Wrong: rows of samples do not lie one after the other."""

    def forward(self, x):
        return self.two(self.one(x.transpose(0, 1)).tanh()).transpose(0, 1)


class Duplicated(Net):
    """Wrong: all samples, and then all once more."""

    def forward(self, x):
        return self.two(self.one(torch.cat([x, 2 * x])).tanh()).unflatten(0, (2, -1)).prod(0)


class OneRowForAll(Net):
    """Wrong: a row that all samples share."""

    def forward(self, x):
        return self.two(x * self.one(x.new_ones(1, D)))


class Standardised(Net):
    """Wrong: another weight than the layer's is multiplied with."""

    def build(self):
        class Own(nn.Linear):
            def forward(self, x):
                return F.linear(x, self.weight - self.weight.mean(), self.bias)

        self.one = Own(D, D)


class Attention(Net):
    """The joint projection belongs to no linear layer."""

    def build(self):
        self.mix = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x):
        return self.two(self.mix(self.one(x), x, x, need_weights=False)[0])


class Branching(Attention):
    """Data-dependent control flow, which vmap refuses."""

    def forward(self, x):
        return super().forward(x) if x.abs().sum().item() > 0 else x


class Routed(Net):
    """Wrong: rows of which samples pass a layer depends on them."""

    def forward(self, x):
        flat = self.one(x).reshape(-1, D)
        chosen = flat[:, 0] > 0
        return flat.index_put((chosen,), self.two(flat[chosen])).view_as(x)


class Sorted(Net):
    """Wrong: rows are in another order in a layer, of which the first sample tells nothing."""

    def forward(self, x):
        order = x.sum((1, 2)).argsort()
        return self.two(self.one(x[order])[order.argsort()].tanh())


class UsedElsewhereAtTimes(Net):
    """Wrong: a further use of the weight, which the first sample has not."""

    def forward(self, x):
        gate = x.sum((1, 2), keepdim=True).relu()
        return self.two(self.one(x).tanh()) + gate * F.linear(x.tanh(), self.one.weight)


class Unused(Net):
    def forward(self, x):
        return self.one(x)


def energies_in_turn(net, batch):
    """‖∇_W ℓ_s‖² of every matrix, one backward pass a sample."""
    names = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    rows = []
    for s in range(len(batch.x)):
        losses = batch.losses(net) if batch.whole else batch.samples(slice(s, s + 1)).losses(net)
        loss = losses[s if batch.whole else 0]
        grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        rows.append([0.0 if g is None else g.square().sum().item() for g in grads])
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def by_layers(net, batch, memory=MEMORY):
    """Names of the weights that were left to the layers, after a comparison of all weights."""
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    found, losses = weight_energies(net, weights, batch, memory)
    expected = energies_in_turn(net, batch)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(losses, batch.losses(net), rtol=1e-12, atol=0)
    ends = [module._one_sample(net, weights, batch, s)[0] for s in (0, len(batch.x) - 1)]
    return set(module._by_layers(net, weights, batch, ends, len(batch.x))[0])


def tokens(n=4, length=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, length, D, generator=generator, dtype=torch.float64)
    return ProbeBatch((x,), target=y)


BOTH = {"one.weight", "two.weight"}


@pytest.mark.parametrize(
    ("net", "left_to_layers"),
    [
        (Net, BOTH),
        (CalledTwice, BOTH),
        (CalledByKeyword, BOTH),
        (TiedModules, {"one.weight"}),
        (WrittenInto, BOTH),
        (WrittenIntoViews, set()),
        (UsedElsewhere, {"two.weight"}),
        (TokensFirst, set()),
        (Duplicated, set()),
        (OneRowForAll, {"two.weight"}),
        (Standardised, {"two.weight"}),
        (Attention, BOTH),
        (Branching, BOTH),
        (Routed, {"one.weight"}),
        (Unused, {"one.weight"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_numbers_are_right_and_left_to_layers_where_they_can_be(net, left_to_layers):
    assert by_layers(net(), tokens()) == left_to_layers


def test_samples_one_at_a_time_are_right_in_any_order_of_rows():
    by_layers(TokensFirst(), tokens(), memory=0)


def test_a_batch_that_the_network_takes_whole():
    class Whole(Net):
        def forward(self, x):
            assert len(x) == 4
            return super().forward(x)

    batch = tokens()
    assert by_layers(Whole(), ProbeBatch(batch.args, target=batch.target, whole=True)) == BOTH


def test_a_whole_batch_with_a_weight_of_no_layer():
    batch = tokens()
    by_layers(Attention(), ProbeBatch(batch.args, target=batch.target, whole=True), memory=0)


def test_several_rows_a_sample():
    """A network of videos folds x (batch, frames, D) to (batch·frames, D), as its condition is."""

    class Video(Net):
        def build(self):
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x, condition):
            frames = self.one(x.flatten(0, 1)) + self.two(condition)
            return self.conv(frames[:, None])[:, 0].view_as(x)

    x, y = tokens(n=3).args[0], tokens(n=3).target
    condition = torch.randn(12, D, generator=torch.Generator().manual_seed(1)).double()
    batch = ProbeBatch((x,), {"condition": condition}, target=y, per_frame=frozenset({"condition"}))
    assert by_layers(Video(), batch) == {*BOTH, "conv.weight"}
    by_layers(Video(), batch, memory=0)


def test_a_network_that_vmap_refuses_is_taken_in_turn(monkeypatch):
    turns = []

    def counted(*args):
        turns.append(args)
        return in_turn(*args)

    in_turn = module._in_turn
    monkeypatch.setattr(module, "_in_turn", counted)
    by_layers(Attention(), tokens())
    assert not turns
    by_layers(Branching(), tokens())
    assert len(turns) == 1
    assert set(turns[0][1]) == {"mix.in_proj_weight", "mix.out_proj.weight"}


def test_more_memory_takes_more_samples_at_once():
    sizes = []

    class Sized(Net):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    net, batch = Sized(), tokens(n=5)
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    _, need = module._one_sample(net, weights, batch, 0)
    for memory, expected in ((0, [1] * 5), (2 * need, [2, 2, 1]), (100 * need, [5])):
        sizes.clear()
        weight_energies(net, weights, batch, memory)
        assert sizes == [1, 1, *expected]


def test_what_a_sample_needs_by_hand():
    """x and tanh are kept, 4·6 doubles each; two gradients arrive; A and a product are made."""
    net = Net()
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    _, need = module._one_sample(net, weights, tokens(), 0)
    kept = 2 * 4 * D + 4 * D  # and the residual of the squared error
    assert need == 8 * (kept + 2 * 4 * D + 4 * D + min(D * D, 2 * 16))


@pytest.mark.parametrize(("net", "left"), [(Sorted, {"two.weight"}), (UsedElsewhereAtTimes, set())])
def test_faults_that_the_first_sample_does_not_show(net, left):
    """The first has the least sum, below 0, and so its place and no gate; the last has not."""
    batch = tokens()
    x = batch.x.abs()
    x[0], x[-1] = -x[0], 0.1 * x[-1]
    found = by_layers(net(), dataclasses.replace(batch, args=(x, *batch.args[1:])))
    assert "one.weight" not in found
    assert left <= found
