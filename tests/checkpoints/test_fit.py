from pathlib import Path

import pytest
import torch
from torch import nn

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.fit import (
    Fit,
    common_prefix,
    conversion,
    load_into,
    name_in_order,
    unwrap,
)
from tests.checkpoints.mutations import assert_one_line
from tests.checkpoints.saved_files import conv_unet

PATH = Path("net.pt")
FITS = Fit([], [], [])


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def load(state, model=None, strict=True):
    return load_into(model or conv_unet(seed=1), state, PATH, strict)


def assert_loaded(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)


# ── prefixes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "ema.module.", "a.b.c."]
)
def test_prefixes_of_wrappers_are_taken_off(prefix):
    state = conv_unet().state_dict()
    model = conv_unet(seed=1)
    assert load(under(prefix, state), model) == FITS
    assert_loaded(model, state)


def test_the_names_that_wrappers_really_give():
    model = conv_unet()
    state = model.state_dict()
    compiled = torch.compile(model)
    for wrapped in (nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        assert wrapped.state_dict().keys() != state.keys()
        other = conv_unet(seed=1)
        assert load(wrapped.state_dict(), other) == FITS
        assert_loaded(other, state)


def test_compiled_parts():
    state = conv_unet().state_dict()
    compiled = {name.replace("out.", "out._orig_mod."): value for name, value in state.items()}
    assert compiled.keys() != state.keys()
    assert load(compiled) == FITS


def test_a_model_with_compiled_parts_keeps_its_names():
    model = conv_unet(seed=1)
    model.out = torch.compile(model.out)
    state = model.state_dict()
    assert any("_orig_mod" in name for name in state)
    assert load(state, model) == FITS


def test_names_that_would_coincide_are_left_alone():
    inside, outside = unwrap({"a._orig_mod.w": torch.zeros(1), "a.w": torch.ones(1)}, ["a.w"])
    assert list(inside) == ["a._orig_mod.w", "a.w"]
    assert outside == []


def test_what_lies_beside_the_prefix_is_unexpected():
    state = under("model.", conv_unet().state_dict()) | {"loss.weight": torch.zeros(3)}
    fit = load(state, strict=False)
    assert fit == Fit([], ["loss.weight"], [])


@pytest.mark.parametrize(
    ("names", "wanted", "prefix"),
    [
        ([], ["a.w"], ""),
        (["a.w"], [], ""),
        (["x", "y"], ["a.w"], ""),
        (["a.w", "module.a.w"], ["a.w"], ""),
        (["a.w", "module.a.w", "module.b.w"], ["a.w", "b.w"], "module."),
        (["bad.w"], ["ad.w"], ""),
        (["net.w", "net.net.w"], ["w", "net.w"], "net."),
    ],
)
def test_the_prefix_of_most_names(names, wanted, prefix):
    assert common_prefix(names, wanted) == prefix


# ── what does not fit ────────────────────────────────────────────────────────────────────────────


def misfit():
    """A state with a name too few, one too many, and another shape."""
    state = conv_unet().state_dict()
    del state["inp.weight"]
    return state | {"extra": torch.zeros(1), "down.bias": torch.zeros(5)}


def test_everything_that_does_not_fit_is_named():
    assert load(misfit(), strict=False) == Fit(["inp.weight"], ["extra"], ["down.bias"])


def test_strict_rejects_and_names_everything():
    with pytest.raises(
        StabilityProbeError,
        match=r"net.pt: does not fit ConvUNet: 1 missing \('inp.weight'\), 1 unexpected "
        r"\('extra'\), 1 mismatched \('down.bias'\) \(down.bias is \(5,\) for \(4,\)\); give",
    ) as error:
        load(misfit())
    assert_one_line(str(error.value))


def test_what_fits_is_loaded_and_the_rest_left():
    model, state = conv_unet(seed=1), misfit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load(state, model, strict=False)
    after = model.state_dict()
    assert torch.equal(after["down.weight"], state["down.weight"])
    for name in ("inp.weight", "down.bias"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_rejects_another_kind_of_number(dtype):
    state = conv_unet().state_dict()
    state["down.bias"] = state["down.bias"].to(dtype)
    with pytest.raises(
        StabilityProbeError, match=rf"1 mismatched .*\(down.bias is {dtype} for torch.float32\)"
    ):
        load(state)


def test_rejects_complex_numbers_for_whole_ones():
    state = conv_unet().state_dict()
    state["out.0.num_batches_tracked"] = torch.tensor(1j)
    assert load(state, strict=False).mismatched == ["out.0.num_batches_tracked"]


def test_many_names_are_counted():
    with pytest.raises(StabilityProbeError, match=r"12 missing \('.*', '.*', '.*' and 9 more\);"):
        load({})


def test_a_shared_tensor_may_be_stored_once():
    def tied():
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        return model

    state = tied().state_dict()
    del state["b.weight"]
    assert load(state, tied()) == FITS
    del state["b.bias"]
    assert load(state, tied(), strict=False).missing == ["b.bias"]


def test_rejects_a_module_that_cannot_take_a_state():
    class Stubborn(nn.Linear):
        def _load_from_state_dict(self, *args):
            raise KeyError("inside")

    with pytest.raises(StabilityProbeError, match=r"as the weights of this model .KeyError"):
        load({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, Stubborn(1, 1))


# ── tensors in order ─────────────────────────────────────────────────────────────────────────────


def test_tensors_in_order_are_named():
    model = conv_unet()
    named = name_in_order(model, list(model.parameters()), PATH)
    assert {name: id(value) for name, value in named.items()} == {
        name: id(value) for name, value in model.named_parameters()
    }


def test_rejects_another_number_of_tensors():
    with pytest.raises(
        StabilityProbeError, match="lists 2 averaged tensors and ConvUNet has 10 parameters; give"
    ):
        name_in_order(conv_unet(), [torch.zeros(1)] * 2, PATH)


# ── precision ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stored", "model", "said"),
    [
        (torch.float32, torch.float32, ""),
        (torch.bfloat16, torch.float32, ", bfloat16 converted to float32"),
        (torch.float64, torch.float16, ", float64 converted to float16"),
        (torch.int64, torch.float32, ""),
    ],
)
def test_conversion_is_said(stored, model, said):
    assert conversion([torch.ones(1, dtype=stored)], nn.Linear(1, 1).to(model)) == said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_are_converted_to_the_precision_of_the_model(dtype):
    state = {name: v.to(dtype) if v.is_floating_point() else v
             for name, v in conv_unet().state_dict().items()}  # fmt: skip
    model = conv_unet(seed=1)
    assert load(state, model) == FITS
    for name, value in model.state_dict().items():
        assert value.dtype == conv_unet().state_dict()[name].dtype
        assert torch.equal(value, state[name].to(value.dtype))
