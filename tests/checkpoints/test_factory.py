import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stability_probe import StabilityProbeError
from stability_probe.checkpoints.factory import (
    build_within,
    call_factory,
    factory_name,
    import_factory,
)
from tests.checkpoints.mutations import assert_one_line

PATH = Path("config.json")


class TestImport:
    def test_a_function_and_an_attribute_of_a_class(self):
        assert import_factory("torch.nn:Linear") is nn.Linear
        assert import_factory("torch.nn:Sequential.forward") is nn.Sequential.forward

    def test_from_the_current_directory(self, tmp_path, monkeypatch):
        (tmp_path / "my_models_of_a_test.py").write_text("def make(): return 7")
        monkeypatch.chdir(tmp_path)
        before = list(sys.path)
        assert import_factory("my_models_of_a_test:make")() == 7
        assert sys.path == before

    @pytest.mark.parametrize("name", ["", "torch", "torch:", ":Linear", "torch.nn.Linear"])
    def test_rejects_another_form(self, name):
        with pytest.raises(
            StabilityProbeError, match=r"must have the form package.module:function"
        ):
            import_factory(name)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("no_such_module:f", "ModuleNotFoundError"),
            ("torch.nn:NoSuchThing", "AttributeError"),
            ("torch.nn:Linear.nothing", "AttributeError"),
            ("..nn:Linear", "TypeError"),
            (".:Linear", "TypeError"),
        ],
    )
    def test_rejects_what_is_not_there(self, name, reason):
        before = list(sys.path)
        with pytest.raises(StabilityProbeError, match=rf"cannot be imported \({reason}") as error:
            import_factory(name)
        assert_one_line(str(error.value))
        assert sys.path == before

    def test_rejects_a_module_that_raises(self, tmp_path, monkeypatch):
        (tmp_path / "broken_module_of_a_test.py").write_text("raise RuntimeError('a\\nb')")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(StabilityProbeError, match=r"imported \(RuntimeError: a b\); run"):
            import_factory("broken_module_of_a_test:make")

    def test_rejects_what_cannot_be_called(self):
        with pytest.raises(StabilityProbeError, match="'torch:nn': module cannot be called"):
            import_factory("torch:nn")


class TestCall:
    def test_by_name_and_by_object(self):
        for factory in ("torch.nn:Linear", nn.Linear, lambda **sizes: nn.Linear(**sizes)):
            made = call_factory(factory, {"in_features": 2, "out_features": 3})
            assert made.weight.shape == (3, 2)

    def test_leaves_the_random_state(self):
        before = torch.random.get_rng_state()
        call_factory(nn.Linear, {"in_features": 2, "out_features": 3})
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_rejects_one_that_raises(self):
        with pytest.raises(
            StabilityProbeError, match=r"factory 'Linear': failed with 1 arguments \(TypeError"
        ):
            call_factory(nn.Linear, {"in_features": 2})

    @pytest.mark.parametrize("made", [None, 3, nn.Linear])
    def test_rejects_what_is_no_module(self, made):
        with pytest.raises(
            StabilityProbeError, match=f"must return a torch.nn.Module, got {type(made).__name__}"
        ):
            call_factory(lambda: made, {})

    def test_names(self):
        assert factory_name("a:b") == "a:b"
        assert factory_name(nn.Linear) == "Linear"
        assert factory_name(TestCall.test_names) == "TestCall.test_names"


def weights(n):
    return [torch.zeros(n)]


class TestWithin:
    def test_a_model_in_proportion(self):
        before = torch.random.get_rng_state()
        model = build_within(PATH, lambda: nn.Linear(10, 10), weights(110))
        assert model.weight.device.type == "cpu"
        assert model.weight.std() > 0
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_model_that_cannot_be_built_without_storage(self):
        def make():
            model = nn.Linear(10, 10)
            assert model.weight.sum().item() != 0  # raises on the meta device
            return model

        assert build_within(PATH, make, weights(110)).weight.device.type == "cpu"

    @pytest.mark.parametrize(
        "make",
        [lambda: nn.Linear(20_000, 20_000), lambda: nn.BatchNorm1d(2**28)],
        ids=["parameter", "buffer"],
    )
    def test_rejects_far_more_bytes_before_they_are_there(self, make):
        devices = []

        def watched():
            devices.append(torch.empty(0).device.type)
            return make()

        with pytest.raises(
            StabilityProbeError, match=r"config.json: describes .* and the weights are 400 bytes in"
        ):
            build_within(PATH, watched, weights(100))
        assert devices == ["meta"]

    def test_rejects_far_more_tensors(self):
        with pytest.raises(StabilityProbeError, match="in 1005 tensors, and the weights are 4 byt"):
            build_within(
                PATH, lambda: nn.ModuleList(nn.Linear(1, 1) for _ in range(10**9)), weights(1)
            )

    def test_the_limit_grows_with_the_weights(self):
        build = lambda: nn.ModuleList(nn.Linear(1, 1) for _ in range(510))  # noqa: E731
        with pytest.raises(StabilityProbeError, match="in 1005 tensors"):
            build_within(PATH, build, weights(1))
        assert len(build_within(PATH, build, weights(1) * 5)) == 510

    def test_a_tensor_that_only_claims_its_size_does_not_count(self):
        claimed = torch.zeros(1).expand(2**40)
        with pytest.raises(StabilityProbeError, match="and the weights are 4 bytes in 1"):
            build_within(PATH, lambda: nn.Linear(20_000, 20_000), [claimed])

    def test_shared_weights_count_once(self):
        shared = torch.zeros(1000)
        with pytest.raises(StabilityProbeError, match="and the weights are 4000 bytes in 3"):
            build_within(PATH, lambda: nn.Linear(20_000, 20_000), [shared, shared, shared])

    def test_rejects_a_builder_that_raises(self):
        with pytest.raises(
            StabilityProbeError, match=r"cannot be read as a model's configuration .ZeroDivisionErr"
        ):
            build_within(PATH, lambda: nn.Linear(1 // 0, 1), weights(1))

    def test_later_models_are_not_limited(self):
        with pytest.raises(StabilityProbeError):
            build_within(PATH, lambda: nn.Linear(20_000, 20_000), weights(1))
        nn.ModuleList(nn.Linear(1, 1, device="meta") for _ in range(600))
