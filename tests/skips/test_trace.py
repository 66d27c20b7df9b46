"""What is seen of a forward pass, on modules whose data flow one can read."""

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stability_probe import StabilityProbeError
from stability_probe.skips.trace import trace
from tests.oracles.zoo import hook_count

X = torch.ones(2, 4)


class Does(nn.Module):
    """A module that does what a function says."""

    def __init__(self, fn, **children):
        super().__init__()
        self.fn = fn
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x, *args, **kwargs):
        return self.fn(self, x, *args, **kwargs)


def flow_of(fn, *args, x=X, **children):
    return trace(Does(fn, **children), (x, *args), {})


def names(flow):
    return [node.function for node in flow.nodes]


def output(flow, position=0):
    return flow.nodes[flow.calls[0].outputs[position]]


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────


def test_a_chain():
    flow = flow_of(lambda m, x: torch.relu(x.exp()).sum(1))
    assert names(flow) == ["input", "exp", "relu", "sum"]
    assert [n.depth for n in flow.nodes] == [0, 1, 2, 3]
    assert [n.shape for n in flow.nodes] == [(2, 4), (2, 4), (2, 4), (2,)]
    assert [set(n.parents) for n in flow.nodes] == [set(), {0}, {1}, {2}]
    assert flow.depends(3, 1) and flow.depends(2, 2) and not flow.depends(1, 3)


def test_what_the_input_does_not_reach_has_no_node():
    flow = flow_of(lambda m, x, y: x + y.exp(), torch.ones(2, 4))
    assert names(flow) == ["input", "add"]
    merge = output(flow).merge
    assert merge.operands == ((0, (2, 4)), (-1, (2, 4)))


def test_depth_is_the_longest_path():
    flow = flow_of(lambda m, x: x + x.exp().exp().exp())
    assert output(flow).depth == 4


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: torch.zeros_like(x),
        lambda m, x: x.new_zeros(2, 4),
        lambda m, x: torch.ones(x.shape[0], x.size(1)) + x.ndim + x.dim() + x.numel(),
        lambda m, x: torch.ones(2, 4).to(x),
        lambda m, x: torch.ones(2, 4).type_as(x).view_as(x).expand_as(x),
    ],
    ids=["zeros_like", "new_zeros", "shape", "to", "as"],
)
def test_shape_and_type_carry_no_values(fn):
    assert flow_of(fn).calls[0].outputs == [-1]


def test_results_of_several_tensors_are_one_node():
    for split in (lambda x: x.chunk(2, 1), lambda x: torch.split(x, 2, dim=1)):
        flow = flow_of(lambda m, x, split=split: torch.cat(split(x), 1))
        assert len(flow.nodes) == 3
        assert [node for node, _ in output(flow).merge.operands] == [1, 1]
        assert [shape for _, shape in output(flow).merge.operands] == [(2, 2), (2, 2)]


# ── in-place functions and views ─────────────────────────────────────────────────────────────────


def test_an_in_place_function_is_a_node_that_its_tensor_then_points_to():
    def forward(m, x):
        y = x.exp()
        y.relu_()
        y += 1
        return y

    flow = flow_of(forward)
    assert names(flow) == ["input", "exp", "relu_", "add_"]
    assert [n.depth for n in flow.nodes] == [0, 1, 2, 3]
    assert flow.calls[0].outputs == [3]


def test_an_in_place_module_is_a_node_of_the_tensor_that_it_wrote():
    flow = flow_of(lambda m, x: (y := x.exp(), m.relu(y), y)[-1], relu=nn.ReLU(inplace=True))
    assert output(flow).function == "relu" and output(flow).depth == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y[:, :2].mul_(3),
        lambda y: y.view(-1).add_(1),
        lambda y: y.chunk(2, 1)[0].exp_(),
        lambda y: y.detach().exp_(),
    ],
    ids=["slice", "view", "chunk", "detach"],
)
def test_a_tensor_that_is_written_through_a_view(write):
    def forward(m, x):
        y = x.exp()
        write(y)
        return y

    flow = flow_of(forward)
    last = len(flow.nodes) - 1
    assert flow.calls[0].outputs == [last]
    assert flow.nodes[last].function.endswith("_")


@pytest.mark.parametrize(
    "write", [lambda y, x: y[:, :4].copy_(x), lambda y, x: y.__setitem__((..., slice(4)), x)]
)
def test_a_buffer_that_the_input_is_written_into(write):
    def forward(m, x):
        y = torch.zeros(2, 8)
        write(y, x)
        return y * 2

    flow = flow_of(forward)
    assert flow.depends(flow.calls[0].outputs[0], 0)


def test_a_tensor_that_nothing_wrote_keeps_its_node():
    flow = flow_of(lambda m, x: (y := x.exp(), y[:, :2].clone().mul_(3), y)[-1])
    assert output(flow).function == "exp"


# ── products ─────────────────────────────────────────────────────────────────────────────────────


def test_a_gate_from_further_on_carries_nothing():
    flow = flow_of(lambda m, x: x * torch.sigmoid(x.exp().mean(1, keepdim=True)))
    product = output(flow)
    gate = product.index - 1
    assert product.depth == 1  # that of what is gated, and one more
    assert product.carriers == {0} and product.parents == {0, gate}
    assert flow.depends(product.index, gate) and not flow.carries(product.index, gate)


def test_factors_of_one_depth_are_both_carried():
    flow = flow_of(lambda m, x: x.exp() * x.sin())
    assert output(flow).carriers == {1, 2} and output(flow).depth == 2


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────

HALF = torch.tensor(0.5)


@pytest.mark.parametrize(
    ("fn", "factor"),
    [
        (lambda m, x: 0.5 * x, 0.5),
        (lambda m, x: x * 0.5, 0.5),
        (lambda m, x: x * HALF, 0.5),
        (lambda m, x: torch.mul(x, 0.5), 0.5),
        (lambda m, x: torch.mul(0.5 * torch.ones(()), x), 0.5),
        (lambda m, x: x / 4, 0.25),
        (lambda m, x: x / 2**0.5, 2**-0.5),
        (lambda m, x: x.clone().div_(4), 0.25),
        (lambda m, x: x * 0, 0.0),
        (lambda m, x: -x, -1.0),
        (lambda m, x: torch.neg(x), -1.0),
        (lambda m, x: x[:, 1:], 1.0),
        (lambda m, x: F.pad(x, (0, 1)), 1.0),
        (lambda m, x: F.pad(x, (0, 1), mode="constant", value=0), 1.0),
        (lambda m, x: x.permute(1, 0), 1.0),
        (lambda m, x: x.contiguous().clone(), 1.0),
        (lambda m, x: 4 / x, None),
        (lambda m, x: x / 0.0, None),
        (lambda m, x: x * x, None),
        (lambda m, x: x * torch.ones(2, 4), None),
        (lambda m, x: x.exp(), None),
        (lambda m, x: torch.div(x, 4, rounding_mode="floor"), None),
        (lambda m, x: F.pad(x, (0, 1), value=3.0), None),
    ],
)
def test_the_number_that_a_function_multiplies_by(fn, factor):
    found = output(flow_of(fn)).factor
    assert found == (None if factor is None else pytest.approx(factor))


# ── calls ────────────────────────────────────────────────────────────────────────────────────────


def test_a_module_that_is_called_twice_has_two_calls():
    flow = flow_of(lambda m, x: m.lin(m.lin(x)), lin=nn.Linear(4, 4))
    assert [(c.path, c.number, c.parent) for c in flow.calls] == [
        ("", 0, -1), ("lin", 0, 0), ("lin", 1, 0),
    ]  # fmt: skip
    assert [(c.entered, c.left) for c in flow.calls[1:]] == [(1, 2), (2, 3)]
    assert [c.outputs for c in flow.calls] == [[2], [1], [2]]
    assert all(n.parametric for n in flow.nodes[1:]) and not flow.nodes[0].parametric


def test_a_call_inside_another():
    inner = Does(lambda m, x: m.relu(x), relu=nn.ReLU())
    flow = flow_of(lambda m, x: m.inner(x), inner=inner)
    assert [(c.path, c.parent) for c in flow.calls] == [("", -1), ("inner", 0), ("inner.relu", 1)]
    assert flow.within(2, 1) and flow.within(2, 2) and flow.within(2, 0)
    assert not flow.within(1, 2)
    assert output(flow).call == 2


class Takes(nn.Module):
    def forward(self, a, b=None, *rest, c=None, **named):
        return a.exp()


def test_arguments_by_name_and_by_place_from_the_end():
    def forward(m, x):
        u, v = x.sin(), x.cos()
        return m.takes(x, (u, v, torch.ones(1)), v, c=[u], d=v)

    flow = flow_of(forward, takes=Takes())
    assert flow.calls[1].arguments == {
        ("a", None): 0, ("b", -3): 1, ("b", -2): 2, ("c", -1): 1,
    }  # fmt: skip


@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, [b]],
        lambda a, b: {"a": a, "b": {"c": b}},
        Pair,
    ],
)
def test_outputs_in_containers(wrap):
    flow = flow_of(lambda m, x: wrap(x.exp(), x.sin()))
    assert [flow.nodes[n].function for n in flow.calls[0].outputs] == ["exp", "sin"]


def test_the_first_tensor_of_all_arguments_is_followed():
    model = Does(lambda m, n, d, y=None: d["a"].exp() + y)
    flow = trace(model, (3, {"a": X}), {"y": torch.ones(2, 4)})
    assert output(flow).merge.operands == ((1, (2, 4)), (-1, (2, 4)))


def test_what_cannot_be_seen_into_is_one_node():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    flow = flow_of(lambda m, x: m.inner(x.exp()), inner=scripted)
    assert names(flow) == ["input", "exp", "opaque"]
    opaque = flow.nodes[2]
    assert opaque.parametric and opaque.parents == {1} and opaque.shape == (2, 3)
    assert flow.calls[0].outputs == [2]


def test_hooks_for_scripted_modules_are_gone_afterwards():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    flow_of(lambda m, x: m.inner(x.exp()), inner=scripted)
    every = nn.modules.module
    assert not every._global_forward_hooks and not every._global_forward_pre_hooks
    assert not every._global_forward_hooks_always_called


def test_a_scripted_model_is_one_node():
    flow = trace(torch.jit.script(nn.Sequential(nn.Linear(4, 3))), (X,), {})
    assert names(flow) == ["input", "opaque"]


def test_a_module_that_makes_its_output_from_nothing_is_not_opaque():
    flow = flow_of(lambda m, x: m.inner(x), inner=Does(lambda m, x: torch.ones(2, 4)))
    assert names(flow) == ["input"]
    assert flow.calls[0].outputs == [-1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(m, x):
        return checkpoint(m.net, x, use_reentrant=use_reentrant)

    flow = flow_of(forward, net=net)
    assert names(flow) == ["input", "linear", "relu"]
    assert [c.path for c in flow.calls] == ["", "net", "net.0", "net.1"]


# ── merges ───────────────────────────────────────────────────────────────────────────────────────


def test_merges_on_one_line_are_numbered_in_the_order_of_execution():
    flow = flow_of(lambda m, x: torch.cat([x, x]).sum() + ((x + x.exp()) + (x + x.sin())))
    merges = [(n.merge.line, n.merge.ordinal) for n in flow.nodes if n.merge]
    lines = {line for line, _ in merges}
    assert len(lines) == 1 and 0 not in lines
    assert [ordinal for _, ordinal in merges] == [0, 0, 1, 2, 3]  # the first is the concatenation


def test_the_number_counts_merges_that_the_input_does_not_reach():
    flow = flow_of(lambda m, x, y: x.exp() + (y + y), torch.ones(2, 4))
    assert output(flow).merge.ordinal == 1


def test_the_same_line_in_another_call_is_counted_anew():
    adds = Does(lambda m, x: x + x.exp())
    flow = flow_of(lambda m, x: m.adds(m.adds(x)), adds=adds)
    assert [n.merge.ordinal for n in flow.nodes if n.merge] == [0, 0]


# ── the model is left as it was ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("args", [(), (3,), (torch.ones(0, dtype=torch.long).tolist(),)])
def test_without_a_tensor_there_is_nothing_to_follow(args):
    with pytest.raises(StabilityProbeError, match=r"Does needs an example input with a tensor"):
        trace(Does(lambda m, *a: None), args, {})


def test_hooks_are_gone_after_an_exception():
    def fails(m, x):
        m.lin(x)
        raise RuntimeError("half way")

    model = Does(fails, lin=nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="half way"):
        trace(model, (X,), {})
    assert hook_count(model) == 0
    assert torch.overrides._get_current_function_mode() is None


def test_an_exception_that_the_model_handles_itself():
    """The call that failed is closed, and what follows is in the right one."""

    def fails(m, x):
        raise ValueError

    def forward(m, x):
        try:
            m.inner(x)
        except ValueError:
            return x.exp()

    flow = flow_of(forward, inner=Does(fails))
    assert output(flow).call == 0


def test_nothing_of_the_pass_is_kept():
    made = []
    flow_of(lambda m, x: (y := x.exp(), made.append(weakref.ref(y)), y + 1)[-1])
    assert made[0]() is None
