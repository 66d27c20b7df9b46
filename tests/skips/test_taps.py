from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from stability_probe import StabilityProbeError
from stability_probe.skips import ArgumentTap, OutputTap, SliceTap, Tap
from stability_probe.skips.compiled import uncompiled
from stability_probe.skips.taps import bound_arguments, first_tensor
from tests.oracles.zoo import hook_count

ONE, TWO = torch.ones(2, 3), torch.full((2, 3), 2.0)


class Add(nn.Module):
    """a + 10 b, where b may be the last of a tuple."""

    def forward(self, a, b=None, *, c=0.0):
        if isinstance(b, tuple):
            return a + sum(10**k * part for k, part in enumerate(b, start=1)) + c
        return a + 10 * b + c


class Outer(nn.Module):
    def __init__(self, by_name=False):
        super().__init__()
        self.add = Add()
        self.by_name = by_name

    def forward(self, a, b, **c):
        return self.add(b=b, a=a, **c) if self.by_name else self.add(a, b, **c)


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x)


class Recorder(list):
    def __call__(self, tensor):
        self.append(tensor)


def times(factor):
    return lambda tensor: factor * tensor


PLACES = [OutputTap("add"), ArgumentTap("add", "b"), SliceTap(ArgumentTap("add", "b"), 1, 2)]
places = pytest.mark.parametrize("place", PLACES, ids=lambda place: type(place).__name__)


@places
def test_kinds_are_taps_and_can_be_compared(place):
    assert isinstance(place, Tap)
    assert len({place, type(place)(**vars(place))}) == 1


# ── arguments ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("argument", "expected"), [("a", 5 + 20), ("b", 1 + 100)])
def test_argument_is_seen_and_replaced(by_name, argument, expected):
    model = Outer(by_name)
    seen = Recorder()
    ArgumentTap("add", argument).attach(model, seen)
    handle = ArgumentTap("add", argument).attach(model, times(5))
    assert (model(ONE, TWO) == expected).all()
    assert len(seen) == 1
    assert seen[0] is (ONE if argument == "a" else TWO)
    handle.remove()
    assert (model(ONE, TWO) == 21).all()


def test_keyword_only_argument():
    model = Outer()
    ArgumentTap("add", "c").attach(model, times(5))
    assert (model(ONE, TWO, c=ONE) == 21 + 5).all()


def test_looking_leaves_the_call_alone():
    model = Outer()
    ArgumentTap("add", "b").attach(model, Recorder())
    assert (model(ONE, TWO) == 21).all()


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("item", "expected"),
    [(-1, [1, 1, 5]), (-2, [1, 5, 1]), (-3, [5, 1, 1]), (0, [5, 1, 1]), (2, [1, 1, 5])],
)
def test_item_of_a_tuple_is_seen_and_replaced(by_name, item, expected):
    model = Outer(by_name)
    parts = (ONE, ONE.clone(), ONE.clone())
    seen = Recorder()
    tap = ArgumentTap("add", "b", item)
    tap.attach(model, seen)
    assert (model(ONE, parts) == 1111).all()  # looking changes nothing
    assert seen[0] is parts[item]
    tap.attach(model, times(5))
    total = 1 + sum(10**k * e for k, e in enumerate(expected, start=1))
    assert (model(ONE, parts) == total).all()
    assert (parts[item] == 1).all()  # the caller's own tensors are not written to


def test_items_counted_from_either_end_can_be_replaced_together():
    model = Outer()
    for item, factor in ((-1, 2), (0, 3)):
        ArgumentTap("add", "b", item).attach(model, times(factor))
    assert (model(ONE, (ONE, ONE)) == 1 + 10 * 3 + 100 * 2).all()


def test_a_module_called_twice_is_seen_twice():
    model = Outer()
    seen = Recorder()
    ArgumentTap("add", "a").attach(model, seen)
    model(ONE, TWO)
    model(TWO, TWO)
    assert [float(tensor[0, 0]) for tensor in seen] == [1, 2]


# ── outputs ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Output:
    count: int
    sample: torch.Tensor


@dataclass(frozen=True)
class FrozenOutput:
    sample: torch.Tensor


class Named(NamedTuple):
    count: int
    sample: torch.Tensor


class Items(dict):
    pass


WRAPPED = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, x + 1),
    "tuple-later": lambda x: (None, 3, x),
    "list": lambda x: [x],
    "dict": lambda x: {"count": 2, "sample": x},
    "dict-subclass": lambda x: Items(sample=x),
    "diffusers": lambda x: UNet2DOutput(sample=x),
    "named-tuple": lambda x: Named(2, x),
    "dataclass": lambda x: Output(2, x),
    "frozen-dataclass": lambda x: FrozenOutput(x),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)


@wrapped
def test_first_tensor_of_an_output_is_seen(wrap):
    model = Returns(wrap)
    seen = Recorder()
    OutputTap("").attach(model, seen)
    out = model(ONE)
    assert seen[0] is ONE
    assert type(out) is type(wrap(ONE))


@wrapped
def test_tensor_inside_an_output_is_replaced(wrap):
    kept = wrap(ONE)
    model = Returns(lambda _: kept)
    OutputTap("").attach(model, times(3))
    out = model(ONE)
    assert type(out) is type(kept)
    assert torch.equal(first_tensor(out), 3 * ONE)
    assert first_tensor(kept) is ONE  # what the module returned is not written to


def test_the_rest_of_an_output_stays():
    for name in ("tuple", "dict", "named-tuple", "dataclass", "tuple-later"):
        model = Returns(WRAPPED[name])
        OutputTap("").attach(model, times(3))
        out = model(ONE)
        if name == "tuple":
            assert torch.equal(out[1], TWO)
        elif name == "tuple-later":
            assert out[:2] == (None, 3)
        else:
            assert (out["count"] if name == "dict" else out.count) == 2


def test_sample_of_a_diffusers_output_is_replaced_in_both_of_its_places():
    model = Returns(WRAPPED["diffusers"])
    OutputTap("").attach(model, times(3))
    out = model(ONE)
    assert torch.equal(out.sample, 3 * ONE)
    assert torch.equal(out["sample"], 3 * ONE)


@pytest.mark.parametrize("output", [(), (1, None), {"a": 1}, [], 3, None], ids=repr)
def test_an_output_without_a_tensor(output):
    kind = type(output).__name__
    with pytest.raises(StabilityProbeError, match=f"no tensor found in an output of type {kind}"):
        first_tensor(output)


# ── slices ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("whole", [OutputTap("0"), ArgumentTap("1", "input")])
def test_slice_is_the_leading_part(whole):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    seen = Recorder()
    SliceTap(whole, dim=1, length=2).attach(model, seen)
    x = torch.arange(6.0).view(2, 3)
    model(x)
    assert torch.equal(seen[0], x[:, :2])


def test_slice_is_replaced_and_the_rest_is_not():
    model = nn.Sequential(nn.Identity())
    x = torch.ones(2, 3)
    SliceTap(OutputTap("0"), dim=1, length=1, start=1).attach(model, times(5))
    assert torch.equal(model(x), torch.tensor([[1.0, 5.0, 1.0]] * 2))


# ── order, removal, errors ───────────────────────────────────────────────────────────────────────


@places
def test_first_runs_before_what_is_attached_already(place):
    model = Outer()
    changed = place.whole if isinstance(place, SliceTap) else place
    before, after = Recorder(), Recorder()
    changed.attach(model, times(5))
    place.attach(model, after)
    place.attach(model, before, first=True)
    model(ONE, TWO)
    assert torch.equal(after[0], 5 * before[0])


@places
def test_removal_leaves_nothing(place):
    model = Outer()
    seen = Recorder()
    handle = place.attach(model, seen)
    assert hook_count(model) == 1
    handle.remove()
    assert hook_count(model) == 0
    model(ONE, TWO)
    assert not seen


@places
def test_gradients_flow_through_a_tap(place):
    model = Outer()
    changed = place.whole if isinstance(place, SliceTap) else place
    changed.attach(model, times(5))
    place.attach(model, Recorder())
    b = TWO.clone().requires_grad_()
    model(ONE, b).sum().backward()
    assert (b.grad == 50).all()


@pytest.mark.parametrize("tap", [OutputTap("ad"), ArgumentTap("add.inner", "a")])
def test_a_module_that_is_not_there(tap):
    with pytest.raises(
        StabilityProbeError, match=rf"tap on '{tap.module}': Outer has no such module; was the skip"
    ):
        tap.attach(Outer(), Recorder())


def test_an_argument_that_is_not_there():
    model = Outer()
    with pytest.raises(
        StabilityProbeError, match=r"its forward has no parameter 'skip' \(it has a, b, c\)"
    ):
        ArgumentTap("add", "skip").attach(model, Recorder())
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((ONE, TWO), {}), ((ONE,), {"b": TWO}), ((), {"b": TWO, "a": ONE})],
    ids=["by-position", "mixed", "by-name-backwards"],
)
def test_bound_arguments_are_in_the_order_of_the_signature(args, kwargs):
    bound, by_name = bound_arguments(Add(), args, kwargs)
    assert bound[0] is ONE
    assert bound[1] is TWO
    assert (len(bound), by_name) == (2, {})


def test_bound_arguments_keep_keyword_only_ones_by_name():
    assert bound_arguments(Add(), (1, 2), {"c": 3}) == ((1, 2), {"c": 3})


def test_bound_arguments_refuse_what_the_call_would_refuse():
    with pytest.raises(TypeError, match="unexpected keyword argument 'd'"):
        bound_arguments(Add(), (1, 2), {"d": 3})


# ── one of several calls ─────────────────────────────────────────────────────────────────────────


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.add = Add()

    def forward(self, a, b):
        return torch.stack([self.add(a, b), self.add(a, b)])


NUMBERED = [
    lambda call: OutputTap("add", call),
    lambda call: ArgumentTap("add", "b", call=call),
    lambda call: SliceTap(ArgumentTap("add", "b", call=call), 1, 2),
]
numbered = pytest.mark.parametrize("make", NUMBERED, ids=["output", "argument", "slice"])


@numbered
@pytest.mark.parametrize("call", [0, 1])
def test_one_call_is_meant_in_every_pass(make, call):
    model = Twice()
    handle = make(call).attach(model, times(0))
    for _ in range(2):
        changed = [(part != 21).any().item() for part in model(ONE, TWO)]
        assert changed == [call == 0, call == 1]
    handle.remove()
    assert hook_count(model) == 0
    assert (model(ONE, TWO) == 21).all()


@numbered
def test_a_call_outside_a_pass_is_an_error(make):
    model = Twice()
    make(1).attach(model, times(0))
    message = "tap on 'add': the module is called several times in a pass, and now outside one"
    for _ in range(2):
        with pytest.raises(StabilityProbeError, match=message):
            model.add(ONE, TWO)
        model(ONE, TWO)


@numbered
def test_the_count_begins_anew_after_an_exception(make):
    model = Twice()
    make(0).attach(model, times(0))
    expected = model(ONE, TWO)
    with pytest.raises((TypeError, AttributeError)):  # what None does not support
        model(ONE, None)
    assert torch.equal(model(ONE, TWO), expected)


@numbered
@pytest.mark.parametrize("call", [0, 1])
def test_a_pass_inside_a_pass_has_a_count_of_its_own(make, call):
    model, found = Twice(), []
    make(call).attach(model, times(0))
    expected = model(ONE, TWO)

    def call_again(*_):
        if not found:
            found.append(None)
            found.append(model(ONE, TWO))

    model.add.register_forward_hook(call_again)
    assert torch.equal(model(ONE, TWO), expected)
    assert torch.equal(found[1], expected)


def test_an_argument_that_is_not_passed():
    model = Outer()
    ArgumentTap("add", "c").attach(model, Recorder())
    with pytest.raises(StabilityProbeError, match="its argument 'c' was not passed in this call"):
        model(ONE, TWO)


def test_a_scripted_module_takes_no_taps():
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)))
    for tap in (OutputTap("0"), ArgumentTap("0", "input")):
        with pytest.raises(StabilityProbeError, match="tap on '0': it is scripted"):
            tap.attach(model, Recorder())


def test_what_torch_compile_returned_is_seen_through():
    model = nn.Linear(3, 3)
    assert uncompiled(torch.compile(model, backend="eager")) is model
    assert uncompiled(model) is model
