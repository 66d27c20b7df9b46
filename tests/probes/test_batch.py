"""The fixed batch of inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe import StabilityProbeError
from stability_probe.probes import ProbeBatch, per_sample_mse

X = torch.arange(12.0).view(4, 3)
T = torch.tensor([1, 2, 3, 4])
Y = X.flip(0)
TABLE = torch.arange(10.0)  # not as long as the batch, so it is no batch


def batch(**changes):
    options = {
        "args": (X, T, "label", 3),
        "kwargs": {"mask": T > 2, "table": TABLE, "scale": torch.tensor(2.0), "flag": False},
        "target": Y,
    }
    return ProbeBatch(**(options | changes))


def test_mean_squared_error_of_each_sample():
    output = torch.zeros(2, 1, 2, 2)
    target = torch.stack([torch.full((1, 2, 2), 3.0), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])])
    assert per_sample_mse(output, target).tolist() == [9.0, 0.5]


@pytest.mark.parametrize(
    "args", [(), (3,), ("x",), (None,), (torch.empty(0, 3),), ([1.0, 2.0],)], ids=str
)
def test_a_batch_without_a_sample_is_refused(args):
    with pytest.raises(StabilityProbeError, match="first positional argument must be x_t with at"):
        ProbeBatch(args)


@pytest.mark.parametrize("sensitive", [0, -1])
def test_a_number_of_sensitive_samples_below_one_is_refused(sensitive):
    with pytest.raises(StabilityProbeError, match=f"sensitive must be at least 1, got {sensitive}"):
        batch(sensitive=sensitive)


def test_the_loss_needs_a_target():
    with pytest.raises(StabilityProbeError, match="a loss needs a target, and there is none"):
        batch(target=None).losses(lambda x, *args, **kwargs: x)


def test_losses_come_from_the_loss_function():
    def model(x, *args, **kwargs):
        return 2 * x

    torch.testing.assert_close(batch().losses(model), per_sample_mse(2 * X, Y))
    absolute = batch(loss_fn=lambda out, target: (out - target).abs().sum(1))
    torch.testing.assert_close(absolute.losses(model), (2 * X - Y).abs().sum(1))


def test_the_model_is_called_with_everything():
    seen = []

    def model(*args, **kwargs):
        seen.append((args, kwargs))
        return args[0]

    b = batch()
    assert b.x is X
    assert b.call(model) is X
    assert b.call(model, 5 * X).tolist() == (5 * X).tolist()
    for args, kwargs in seen:
        assert args[1:] == b.args[1:]
        assert kwargs == b.kwargs


@pytest.mark.parametrize("wrap", [lambda v: (v, 1), lambda v: [None, v], lambda v: {"sample": v}])
def test_the_output_is_the_first_tensor(wrap):
    assert batch().call(lambda x, *args, **kwargs: wrap(x)) is X


def test_tensors_are_the_batched_ones_in_order():
    found = batch().tensors()
    assert len(found) == 4
    for tensor, expected in zip(found, (X, T, T > 2, Y), strict=True):
        assert torch.equal(tensor, expected)
    assert len(batch(target=None).tensors()) == 3


def test_with_tensors_puts_others_in_their_place():
    others = [X + 1, T + 1, T > 3, Y + 1]
    changed = batch().with_tensors(others)
    assert all(a is b for a, b in zip(changed.tensors(), others, strict=True))
    assert changed.args[2:] == ("label", 3)
    assert changed.kwargs["table"] is TABLE
    assert changed.kwargs["flag"] is False
    assert torch.equal(batch().x, X)  # the first batch is as it was


def test_map_leaves_what_is_not_batched():
    changed = batch().map(lambda v: v.flip(0))
    assert torch.equal(changed.x, Y)
    assert torch.equal(changed.args[1], T.flip(0))
    assert torch.equal(changed.target, X)
    assert torch.equal(changed.kwargs["table"], TABLE)
    assert changed.kwargs["scale"].item() == 2.0


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9))
def test_head_is_the_first_samples(n):
    b = batch(sensitive=5)
    head = b.head(n)
    for whole, part in zip(b.tensors(), head.tensors(), strict=True):
        assert torch.equal(part, whole[:n])
    assert head.loss_fn is b.loss_fn
    assert head.sensitive == 5


def test_head_is_a_copy_without_a_graph():
    x = X.clone().requires_grad_()
    head = ProbeBatch((2 * x,), target=Y).head(2)
    assert not head.x.requires_grad
    x.data.zero_()
    head.target.zero_()
    assert torch.equal(head.x, 2 * X[:2])
    assert Y.sum() > 0


def test_nested_arguments_are_batched_too():
    b = ProbeBatch((X,), {"added": {"ids": T, "size": 3}, "pair": (Y, TABLE), "list": [T]})
    head = b.head(2)
    assert torch.equal(head.kwargs["added"]["ids"], T[:2])
    assert head.kwargs["added"]["size"] == 3
    assert torch.equal(head.kwargs["pair"][0], Y[:2])
    assert head.kwargs["pair"][1] is TABLE
    assert torch.equal(head.kwargs["list"][0], T[:2])


def test_what_is_given_once_a_frame_stays_with_its_sample():
    frames = torch.arange(3 * len(X)).float()[:, None]  # three frames a sample
    b = ProbeBatch((X,), {"text": frames}, per_frame=frozenset({"text"}))
    assert torch.equal(b.head(2).kwargs["text"], frames[:6])
    assert torch.equal(b.samples(slice(1, 2)).kwargs["text"], frames[3:6])
    assert torch.equal(b.with_tensors(b.tensors()).kwargs["text"], frames)
    assert ProbeBatch((X,), {"text": frames}).head(2).kwargs["text"] is frames


def test_an_error_of_other_shape_is_refused():
    with pytest.raises(StabilityProbeError, match=r"output is \(2, 4\) and the target \(2, 1\)"):
        per_sample_mse(torch.ones(2, 4), torch.ones(2, 1))
