import sys

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from stability_probe.skips.merges import as_merge, function_name, running, tensors_in
from stability_probe.skips.taps import first_tensor
from tests.oracles.architectures.unets import Prediction

A, B, C = torch.ones(2, 3), torch.full((2, 3), 2.0), torch.full((2, 3), 4.0)


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "operands", "dim"),
    [
        (torch.cat, ([A, B],), {}, (A, B), 0),
        (torch.cat, ((A, B, C), 1), {}, (A, B, C), 1),
        (torch.cat, ([A, B],), {"dim": -1}, (A, B), 1),
        (torch.cat, (), {"tensors": [A, B], "dim": -2}, (A, B), 0),
        (torch.concat, ([A, B],), {"axis": 1}, (A, B), 1),
        (torch.concatenate, ([A, B], -1), {}, (A, B), 1),
        (torch.cat, ([A, B], 1), {"out": C}, (A, B), 1),
        (torch.ops.aten.cat.default, ([A, B], 1), {}, (A, B), 1),
    ],
)
def test_concatenations(func, args, kwargs, operands, dim):
    merge = as_merge(func, args, kwargs)
    assert (merge.kind, merge.dim) == ("concat", dim)
    assert len(merge.operands) == len(operands)
    assert all(map(lambda a, b: a is b, merge.operands, operands))


@pytest.mark.parametrize(
    "func",
    [
        *(torch.add, torch.sub, torch.subtract, torch.rsub),
        *(torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__),
        *(torch.Tensor.__radd__, torch.Tensor.sub_, torch.Tensor.__rsub__),
        torch.ops.aten.add.Tensor,
    ],
    ids=function_name,
)
def test_sums_and_differences(func):
    merge = as_merge(func, (A, B), {})
    assert (merge.kind, merge.dim) == ("add", 0)
    assert merge.operands[0] is A and merge.operands[1] is B
    assert as_merge(func, (A,), {"other": B}).operands[1] is B


@pytest.mark.parametrize(
    ("func", "kwargs"),
    [
        *((f, {}) for f in (torch.add, torch.sub, torch.rsub, torch.Tensor.__rsub__)),
        *((f, {"alpha": 3}) for f in (torch.add, torch.subtract, torch.rsub)),
    ],
)
def test_factors_say_what_a_sum_is(func, kwargs):
    first, second = as_merge(func, (A, C), kwargs).factors
    assert torch.equal(func(A, C, **kwargs), first * A + second * C)


def test_a_concatenation_multiplies_nothing():
    assert as_merge(torch.cat, ([A, B, C],), {}).factors == (1, 1, 1)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.add, (A, 1.0)),
        (torch.cat, ([A],)),
        (torch.mul, (A, B)),
        (torch.stack, ([A, B],)),
        (torch.nn.functional.linear, (A, B)),
    ],
)
def test_what_joins_nothing_is_no_merge(func, args):
    assert as_merge(func, args, {}) is None


def test_an_operand_is_replaced_and_the_rest_stays():
    merge = as_merge(torch.cat, ([A, B],), {"dim": 1})
    for position, parts in [(0, [C, B]), (1, [A, C])]:
        new = merge.replacing(position, C)
        assert torch.equal(torch.cat(*new.args, **new.kwargs), torch.cat(parts, 1))
        assert new.operands[position] is C
    assert torch.equal(torch.cat(*merge.args, **merge.kwargs), torch.cat([A, B], 1))


def test_replacing_keeps_the_factor_and_the_place_of_the_result():
    out = torch.empty(2, 3)
    merge = as_merge(torch.add, (A,), {"other": B, "alpha": 3, "out": out})
    new = merge.replacing(1, C)
    assert torch.equal(torch.add(*new.args, **new.kwargs), A + 3 * C)
    assert new.kwargs["out"] is out


def test_one_tensor_twice_has_two_positions():
    new = as_merge(torch.add, (A, A), {}).replacing(1, C)
    assert new.args[0] is A and new.args[1] is C


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (A, 1),
        ((A, [B, {"c": C}]), 3),
        (Prediction(sample=A, variance=B), 2),
        (Prediction, 0),
        ({"a": None, "b": 3, "c": "text"}, 0),
    ],
)
def test_tensors_in_nested_values(value, count):
    found = list(tensors_in(value))
    assert len(found) == count
    if count:
        assert found[0] is (first_tensor(value) if not isinstance(value, tuple) else A)


@pytest.mark.parametrize(
    ("func", "name"),
    [(torch.cat, "cat"), (torch.ops.aten.add_.Tensor, "add_"), (torch.Tensor.__add__, "__add__")],
)
def test_names(func, name):
    assert function_name(func) == name


# ── which module is running ──────────────────────────────────────────────────────────────────────


class Asks(nn.Module):
    """Keeps what `running` says: asked in its own forward, or in a function that it calls."""

    def __init__(self, helper=False):
        super().__init__()
        self.helper = helper

    def forward(self, x):
        if self.helper:
            self.said = ask()
        else:
            self.said = running(sys._getframe())
        return x


def ask():
    return running(sys._getframe())


@pytest.mark.parametrize("helper", [False, True])
def test_running_is_the_innermost_module_and_a_line_of_its_forward(helper):
    inner = Asks(helper)
    nn.Sequential(nn.Sequential(inner))(A)
    module, line, file = inner.said
    assert (module, file) == (inner, Asks.forward.__code__.co_filename)
    first = Asks.forward.__code__.co_firstlineno
    assert line == first + (2 if helper else 4)  # the helper is called from that line


def test_running_in_no_module():
    assert running(sys._getframe()) == (None, 0, "")
    assert running(None) == (None, 0, "")


def test_the_line_of_an_interpreted_graph_is_unknown():
    """Modules that come from an exported graph share one `forward`, which is not their own."""

    class Sum(nn.Module):
        def forward(self, x):
            return x + x.exp()

    class Ask(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if as_merge(func, args, kwargs or {}):
                said.append(running(sys._getframe()))
            return func(*args, **(kwargs or {}))

    said = []
    outer = torch.export.unflatten(torch.export.export(nn.Sequential(Sum()), (A,)))
    with Ask():
        outer(A)
    ((module, line, _),) = said
    assert module is outer.get_submodule("0")
    assert line == 0


@pytest.mark.parametrize(
    ("call", "kind", "factors"),
    [
        (lambda: torch.lerp(A, B, 0.25), "add", (0.75, 0.25)),
        (lambda: torch.lerp(A, B, weight=0.25), "add", (0.75, 0.25)),
        (lambda: A.lerp(B, torch.tensor(0.25)), "add", (None, None)),
        (lambda: torch.addcmul(A, B, torch.ones(1)), "add", (1.0, None)),
        (lambda: torch.hstack([A, B]), "concat", (1.0, 1.0)),
    ],
)
def test_weighted_sums_and_stacks(call, kind, factors):
    seen = []

    class Ask(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(as_merge(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Ask():
        call()
    (merge,) = (m for m in seen if m is not None)
    assert (merge.kind, merge.factors, len(merge.operands)) == (kind, factors, 2)
    assert merge.dim == (1 if kind == "concat" else 0)
