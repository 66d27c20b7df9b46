from pathlib import Path

import pytest
import torch
from torch import nn

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.state import (
    choose,
    find_weights,
    is_ema,
    is_other,
    tensors_of,
)
from tests.checkpoints.mutations import assert_one_line

PATH = Path("net.pt")
ONE, TWO = torch.ones(1), torch.full((1,), 2.0)
STATE = {"a.w": ONE, "b.w": TWO}


# ── what is found ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("saved", "names"),
    [
        (STATE, [""]),
        ({"state_dict": STATE, "epoch": 3, "optimizer_states": [{"w": ONE}]}, ["state_dict"]),
        ({"model": STATE, "optimizer": {"state": {0: ONE}}, "lr_schedulers": STATE}, ["model"]),
        ({"module": STATE, "ema": STATE}, ["module", "ema"]),
        ({"model": {"state_dict": STATE, "args": {"lr": 0.1}}}, ["model.state_dict"]),
        ({"model": STATE, "ema": {"shadow_params": [ONE, TWO], "decay": 0.9}},
         ["model", "ema.shadow_params"]),
        ({"shadow_params": [ONE], "decay": 0.9}, ["shadow_params"]),
        ({"betas": ONE, "model": STATE}, ["model"]),
        ({"model": nn.Linear(1, 1)}, ["model"]),
        (nn.Linear(1, 1), [""]),
        ({"a": {"b": {"c": STATE}}}, ["a.b.c"]),
        ({"a": {"b": {"c": {"d": STATE}}}}, []),
        ({}, []),
        ([STATE], []),
        ([ONE, TWO], []),
        ({"params": [ONE, TWO]}, []),
        ({"shadow_params": [ONE, 3]}, []),
        ({"shadow_params": []}, []),
        ({0: ONE, 1: TWO}, []),
        ({"model": {0: ONE}}, []),
        (ONE, []),
        (None, []),
        ("model", []),
    ],
)  # fmt: skip
def test_what_could_be_weights_is_found(saved, names):
    assert list(find_weights(saved)) == names


def test_what_is_found_is_the_thing_itself():
    saved = {"model": STATE, "ema": {"shadow_params": [ONE]}}
    found = find_weights(saved)
    assert found["model"] is STATE
    assert found["ema.shadow_params"] is saved["ema"]["shadow_params"]


def test_averages_under_a_prefix_are_taken_apart():
    state = {"model.w": ONE, "ema_model.w": TWO, "step": ONE}
    assert find_weights({"state_dict": state}) == {
        "state_dict": {"model.w": ONE, "step": ONE},
        "state_dict.ema_model": {"ema_model.w": TWO},
    }
    assert find_weights(state).keys() == {"", "ema_model"}


def test_averages_alone_are_left_as_they_are():
    assert list(find_weights({"ema.w": TWO, "ema.b": ONE})) == [""]


def test_a_file_of_averages_has_no_model_beside_them():
    state = {"ema_model.w": TWO, "step": ONE}
    assert list(find_weights({"ema": state})) == ["ema.ema_model"]


def test_values_that_are_no_tensors_are_kept_to_be_named():
    assert find_weights(STATE | {"version": 3}) == {"": STATE | {"version": 3}}


def test_a_dict_that_holds_itself():
    saved = {"model": STATE}
    saved["again"] = saved
    assert next(iter(find_weights(saved))) == "model"


def test_a_nest_of_more_paths_than_anybody_could_visit():
    """Each level refers to the next a thousand times: there are a billion ways to the last one."""
    nest = {"w": 1}
    for _ in range(3):
        nest = {str(i): nest for i in range(1000)}
    assert find_weights(nest) == {}
    assert len(find_weights({str(i): STATE for i in range(1000)})) < 10


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("ema", True), ("model_ema", True), ("ema_model.w", True), ("a.ema.w", True), ("ema2", True),
     ("EMA", True), ("shadow_params", True), ("averaged_model", True), ("model", False),
     ("schema", False), ("non_ema", False), ("cinema", False), ("", False)],
)  # fmt: skip
def test_names_of_averages(name, is_one):
    assert is_ema(name) is is_one


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("optimizer", True), ("Optim", True), ("lr_schedulers", True), ("rng_state", True),
     ("scaler", True), ("callbacks", True), ("hyper_parameters", True), ("model", False),
     ("my_optimizer", False), ("learned", False)],
)  # fmt: skip
def test_names_of_what_is_no_model(name, is_one):
    assert is_other(name) is is_one


# ── the choice ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("names", "weights", "chosen"),
    [
        ([""], "model", ""),
        (["model", "ema"], "model", "model"),
        (["model", "ema"], "ema", "ema"),
        (["unknown", "ema"], "model", "unknown"),
        (["module", "state_dict"], "model", "state_dict"),
        (["a", "model.state_dict"], "model", "model.state_dict"),
        (["model", "model_ema", "ema"], "ema", "ema"),
        (["state_dict", "state_dict.model_ema"], "ema", "state_dict.model_ema"),
        (["a", "b"], "b", "b"),
        (["a.x", "b.x"], "b", "b.x"),
        (["model.fp16", "model"], "model", "model"),
        (["model.fp16"], "model", "model.fp16"),
        (["model.fp16", "model"], "model.fp16", "model.fp16"),
        (["pytorch_model", "diffusion_pytorch_model"], "model", "diffusion_pytorch_model"),
    ],
)
def test_the_choice(names, weights, chosen):
    assert choose(names, weights, PATH) == chosen
    assert choose(names[::-1], weights, PATH) == chosen


@pytest.mark.parametrize(
    ("names", "weights", "reason"),
    [
        (["model"], "ema", "'ema' is not in it; found 'model': name one with weights="),
        ([""], "ema", "'ema' is not in it; found 'model': name one"),
        (["ema"], "model", "'model' is not in it; found 'ema'"),
        (["model"], "nothing", "'nothing' is not in it"),
        ([], "model", "'model' is not in it; found nothing"),
        (["a", "b"], "model", "'model' fits 'a', 'b'; found 'a', 'b'"),
        (["ema_1", "ema_2"], "ema", "'ema' fits 'ema_1', 'ema_2'"),
        (["a.x", "a.y"], "a", "'a' fits 'a.x', 'a.y'"),
    ],
)
def test_rejects_none_and_several(names, weights, reason):
    with pytest.raises(StabilityProbeError, match=f"net.pt: weights={reason}") as error:
        choose(names, weights, PATH)
    assert_one_line(str(error.value))


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────


def test_tensors_of_a_state_a_list_and_a_module():
    assert tensors_of(STATE, PATH) == STATE
    assert tensors_of(STATE, PATH) is not STATE
    assert tensors_of([ONE, TWO], PATH) == {"0": ONE, "1": TWO}
    assert tensors_of(nn.Linear(1, 1), PATH).keys() == {"weight", "bias"}


def test_what_a_module_keeps_beside_its_tensors_is_its_own():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    assert tensors_of(Extra(1, 1), PATH).keys() == {"weight", "bias"}


@pytest.mark.parametrize("weights", [{}, nn.ReLU(), []], ids=["state", "module", "list"])
def test_rejects_what_has_no_tensors(weights):
    with pytest.raises(
        StabilityProbeError, match=r"net.pt: holds no tensors; save model.state_dic"
    ):
        tensors_of(weights, PATH)


ODD = {
    "int": (3, "int"),
    "text": ("a\nb", "str"),
    "nothing": (None, "NoneType"),
    "sparse": (torch.eye(2).to_sparse(), "torch.sparse_coo"),
    "compressed": (torch.eye(2).to_sparse_csr(), "torch.sparse_csr"),
    "quantized": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
    "meta": (torch.ones(2, device="meta"), "without data"),
    "nested": (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
    "jagged": (
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
        "nested",
    ),
}


@pytest.mark.parametrize(("value", "kind"), ODD.values(), ids=ODD)
def test_rejects_and_names_what_is_no_dense_tensor(value, kind):
    with pytest.raises(
        StabilityProbeError,
        match=rf"net.pt: has 1 values that are no dense tensors \('odd: {kind}'\) among its wei",
    ) as error:
        tensors_of({"w": ONE, "odd": value}, PATH)
    assert_one_line(str(error.value))
