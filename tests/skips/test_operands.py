"""The tap for merges inside a forward: what it sees and replaces, and what it leaves behind."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stability_probe import StabilityProbeError
from stability_probe.skips import OperandTap
from stability_probe.skips.operands import _WatchedForward
from tests.oracles.zoo import hook_count

A, B = torch.ones(2, 3), torch.full((2, 3), 2.0)


class Sums(nn.Module):
    """Two sums on one line, a difference on the next, a concatenation on the last."""

    def forward(self, a, b):
        s = (a + 10 * b) + 100 * a
        d = torch.sub(s, b, alpha=2)
        return torch.cat([d, a], dim=1)


LINE = Sums.forward.__code__.co_firstlineno + 1
FIRST, SECOND = (OperandTap("sums", "add", LINE, n, None) for n in (0, 1))
MINUS = OperandTap("sums", "add", LINE + 1, 0, None)
CONCAT = OperandTap("sums", "concat", LINE + 2, 0, None)
EVERY = {"first": FIRST, "second": SECOND, "difference": MINUS, "concat": CONCAT}


class Outer(nn.Module):
    def __init__(self, calls=1):
        super().__init__()
        self.sums = Sums()
        self.calls = calls

    def forward(self, a, b):
        return torch.stack([self.sums(a, b) for _ in range(self.calls)])


def operand(tap, position, call=None):
    return OperandTap(tap.module, tap.kind, tap.line, tap.ordinal, position, call)


class Times:
    """Multiplies what passes, and keeps it."""

    def __init__(self, factor):
        self.factor, self.seen = factor, []

    def __call__(self, tensor):
        self.seen.append(tensor)
        return self.factor * tensor


def look(tensor):
    return None


def by_hand(a=1.0, b=2.0, *, a1=1, b1=1, s1=1, a2=1, left=1, b2=1, d=1, end=1, cat=1):
    """The two halves of the output, with a factor at every place."""
    s = s1 * (a1 * a + b1 * 10 * b)
    s = left * s + a2 * 100 * a
    return cat * d * (s - 2 * b2 * b), cat * end * a


def halves(model, call=0):
    out = model(A, B)[call]
    return float(out[0, 0]), float(out[0, -1])


@pytest.mark.parametrize(
    ("tap", "factors", "seen"),
    [
        (operand(FIRST, 0), {"a1": 5}, 1),
        (operand(FIRST, 1), {"b1": 5}, 20),
        (FIRST, {"s1": 5}, 21),
        (operand(SECOND, 0), {"left": 5}, 21),
        (operand(SECOND, 1), {"a2": 5}, 100),
        (operand(MINUS, 1), {"b2": 5}, 2),
        (MINUS, {"d": 5}, 117),
        (operand(CONCAT, 0), {"d": 5}, 117),
        (operand(CONCAT, 1), {"end": 5}, 1),
        (CONCAT, {"cat": 5}, 117),
    ],
)
def test_one_operand_of_one_merge_is_seen_and_replaced(tap, factors, seen):
    model, times = Outer(), Times(5)
    assert halves(model) == by_hand() == (117, 1)
    handle = tap.attach(model, times)
    assert halves(model) == by_hand(**factors)
    (tensor,) = times.seen
    assert float(tensor[0, 0]) == seen
    handle.remove()
    assert halves(model) == by_hand()


@pytest.mark.parametrize("tap", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("position", [0, None])
def test_looking_changes_nothing(tap, position):
    model = Outer()
    operand(tap, position).attach(model, look)
    assert halves(model) == by_hand()


def test_arguments_are_not_written_to():
    model, a = Outer(), A.clone()
    operand(FIRST, 0).attach(model, Times(5))
    model(a, B)
    assert torch.equal(a, A)


def test_an_in_place_sum_writes_where_it_would_have_written():
    class InPlace(nn.Module):
        def forward(self, a, b):
            y = a.clone()
            y += b
            return y

    model = InPlace()
    line = InPlace.forward.__code__.co_firstlineno + 2
    OperandTap("", "add", line, 0, 1).attach(model, Times(5))
    assert (model(A, B) == 11).all()


def test_gradients_flow_through_a_tap():
    model, b = Outer(), B.clone().requires_grad_()
    operand(MINUS, 1).attach(model, Times(5))
    model(A, b).sum().backward()
    assert (b.grad == 10 - 2 * 5).all()


@pytest.mark.parametrize("call", [0, 1])
def test_one_of_several_calls(call):
    model = Outer(calls=2)
    operand(CONCAT, 1, call).attach(model, Times(5))
    for _ in range(2):  # the count begins anew in every pass
        assert halves(model, call) == by_hand(end=5)
        assert halves(model, 1 - call) == by_hand()


def test_every_call_where_none_is_named():
    model = Outer(calls=2)
    operand(CONCAT, 1).attach(model, Times(5))
    assert [halves(model, n) for n in (0, 1)] == [by_hand(end=5)] * 2


def test_a_call_of_several_outside_a_pass_is_an_error():
    model = Outer(calls=2)
    operand(CONCAT, 1, 0).attach(model, look)
    model(A, B)
    with pytest.raises(
        StabilityProbeError, match="called several times in a pass, and now outside"
    ):
        model.sums(A, B)


# ── several taps ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_taps_share_one_watch_and_leave_in_any_order(order):
    model = Outer()
    handles = [
        operand(FIRST, 1).attach(model, Times(5)),
        operand(CONCAT, 1).attach(model, Times(7)),
    ]
    watched = model.sums.__dict__["forward"]
    assert len(watched.sites) == 2 and watched.inner is None
    assert halves(model) == by_hand(b1=5, end=7)
    handles[order[0]].remove()
    assert halves(model) == (by_hand(end=7) if order[0] == 0 else by_hand(b1=5))
    handles[order[1]].remove()
    assert halves(model) == by_hand()
    assert "forward" not in model.sums.__dict__


def test_taps_at_one_place_run_in_order_and_first_before_them():
    model, seen = Outer(), []
    for name, first in (("second", False), ("third", False), ("first", True)):
        operand(CONCAT, 1).attach(model, lambda u, n=name: seen.append(n), first=first)
    model(A, B)
    assert seen == ["first", "second", "third"]


def test_merges_of_modules_inside_are_theirs():
    """A tap on a module sees the merges of its own forward, not those of its submodules."""
    model = Outer()
    line = Outer.forward.__code__.co_firstlineno + 1
    OperandTap("", "concat", line, 0, None).attach(model, look)
    with pytest.raises(StabilityProbeError, match=r"tap on '': Outer took another path"):
        model(A, B)


def test_taps_on_a_module_and_on_one_inside_it():
    class Both(Outer):
        def forward(self, a, b):
            return super().forward(a, b) + 1000 * self.sums(a, b)

    model = Both()
    line = Both.forward.__code__.co_firstlineno + 1
    handles = [
        operand(FIRST, 1).attach(model, Times(5)),
        OperandTap("", "add", line, 0, 0).attach(model, Times(0)),
    ]
    expected = 1000 * by_hand(b1=5)[0]
    assert halves(model)[0] == expected
    for handle in handles:
        handle.remove()
    assert halves(model)[0] == 1001 * by_hand()[0]


# ── what is left behind ──────────────────────────────────────────────────────────────────────────


def test_removal_leaves_nothing():
    model = Outer(calls=2)
    handle = operand(CONCAT, 1, 0).attach(model, look)
    assert hook_count(model) == 3
    handle.remove()
    assert hook_count(model) == 0
    assert "forward" not in model.sums.__dict__
    handle.remove()  # a second time does nothing
    assert halves(model) == by_hand()


def test_a_forward_of_the_instance_is_used_and_given_back():
    model = Outer()
    mine = lambda a, b: Sums.forward(model.sums, a, 3 * b)  # noqa: E731
    model.sums.forward = mine
    line = mine.__code__.co_firstlineno  # the line that the module's forward has reached
    handle = OperandTap("sums", "concat", line, 0, 1).attach(model, Times(5))
    assert halves(model) == by_hand(b=6.0, end=5)
    handle.remove()
    assert model.sums.__dict__["forward"] is mine


def test_the_signature_is_that_of_the_forward():
    model = Outer()
    operand(CONCAT, 1).attach(model, look)
    assert list(inspect.signature(model.sums.forward).parameters) == ["a", "b"]


@pytest.mark.parametrize("where", ["tap", "model"])
def test_an_exception_leaves_the_tap_removable(where):
    model = Outer()

    def fails(tensor):
        raise RuntimeError("in the middle of a merge")

    handle = operand(CONCAT, 1).attach(model, fails if where == "tap" else Times(5))
    if where == "model":
        hook = model.sums.register_forward_hook(lambda *_: fails(None))
    with pytest.raises(RuntimeError, match="in the middle of a merge"):
        model(A, B)
    assert torch.overrides._get_current_function_mode() is None
    if where == "model":
        hook.remove()
        assert halves(model) == by_hand(end=5)
    handle.remove()
    assert halves(model) == by_hand()
    assert "forward" not in model.sums.__dict__


@pytest.mark.parametrize("change", [{"line": LINE + 3}, {"ordinal": 1}, {"kind": "add"}], ids=str)
def test_a_merge_that_is_not_made_is_an_error(change):
    model = Outer()
    tap = OperandTap(**{**vars(CONCAT), **change})
    tap.attach(model, look)
    with pytest.raises(
        StabilityProbeError,
        match=rf"tap on 'sums': Sums took another path .*no {tap.kind} at line {tap.line}",
    ):
        model(A, B)


def test_a_module_that_is_not_there():
    with pytest.raises(StabilityProbeError, match=r"tap on 'sum': Outer has no such module"):
        OperandTap("sum", "add", LINE, 0, 0).attach(Outer(), look)


def test_a_pass_inside_a_pass_is_watched_by_itself_alone():
    """A tap calls the model again: each pass is changed once, and counts its own merges."""
    model, found = Outer(), []

    def again(tensor):
        if not found:
            found.append(None)
            found.append(halves(model))
        return 5 * tensor

    operand(SECOND, 1).attach(model, again)
    assert halves(model) == by_hand(a2=5)
    assert found[1] == by_hand(a2=5)


def test_checkpointing_repeats_what_the_tap_does():
    class Checkpointed(Outer):
        def forward(self, a, b):
            return checkpoint(self.sums, a, b, use_reentrant=False)

    gradients = []
    for cls in (Outer, Checkpointed):
        model, a = cls(), A.clone().requires_grad_()
        operand(CONCAT, 1).attach(model, lambda u: u * u)
        model(a, B).square().sum().backward()
        gradients.append(a.grad)
    assert torch.equal(*gradients)


# ── copies ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", [None, 0])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_a_tap_of_its_own(copied, call):
    model, times = Outer(calls=2), Times(5)
    handle = operand(CONCAT, 1, call).attach(model, times)
    twin = copied(model)
    watched = twin.sums.__dict__["forward"]
    assert isinstance(watched, _WatchedForward)
    assert watched.module is twin.sums
    expected = [halves(model, n) for n in (0, 1)]
    assert [halves(twin, n) for n in (0, 1)] == expected
    assert expected[0] == by_hand(end=5)
    times.factor = 7
    assert halves(twin) == by_hand(end=5)
    handle.remove()
    assert halves(model) == by_hand()
    assert halves(twin) == by_hand(end=5)
