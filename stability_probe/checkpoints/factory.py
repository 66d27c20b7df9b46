"""Models for weights that do not say what they are of.

`import_factory` finds the user's own function. `build_within` is for sizes that come from a file,
which may be damaged: the model is first built without storage (PyTorch's meta device), and given up
as soon as it has far more parameters than the weights could fill.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from stability_probe.checkpoints.reading import brief, problem, reading
from stability_probe.errors import StabilityProbeError

Factory = Callable[..., nn.Module]

_SPARE_BYTES = 2**28
_SPARE_TENSORS = 1000


def import_factory(name: str) -> Factory:
    """The function that "package.module:function" names; the current directory is searched too.

    Raises:
        StabilityProbeError: if there is none.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise StabilityProbeError(
            f"factory {name!r}: must have the form package.module:function, "
            "for example diffusers:UNet2DModel"
        )
    sys.path.insert(0, "")  # the current directory
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise StabilityProbeError(
            f"factory {name!r}: cannot be imported ({brief(error)}); "
            "run where the module can be found, or install it"
        ) from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise StabilityProbeError(f"factory {name!r}: {type(found).__name__} cannot be called")
    return found  # type: ignore[no-any-return]


def factory_name(factory: str | Factory) -> str:
    """What to call a factory.

    >>> factory_name("diffusers:UNet2DModel"), factory_name(nn.Linear)
    ('diffusers:UNet2DModel', 'Linear')
    """
    return factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))


def call_factory(factory: str | Factory, args: Mapping[str, Any]) -> nn.Module:
    """The module that a factory makes; the global random state is left as it was.

    Raises:
        StabilityProbeError: if it raises, or makes something else.
    """
    name = factory_name(factory)
    make = import_factory(factory) if isinstance(factory, str) else factory
    try:
        with torch.random.fork_rng(devices=[]):
            made: Any = make(**args)
    except Exception as error:
        raise StabilityProbeError(
            f"factory {name!r}: failed with {len(args)} arguments ({brief(error)}); "
            "give others with --model-args (factory_args)"
        ) from error
    if not isinstance(made, nn.Module):
        raise StabilityProbeError(
            f"factory {name!r}: must return a torch.nn.Module, got {type(made).__name__}"
        )
    return made


def build_within(path: Path, make: Callable[[], nn.Module], weights: list[Tensor]) -> nn.Module:
    """A module whose sizes come from a file, if they are in proportion to its weights.

    Raises:
        StabilityProbeError: if they are not, or the module cannot be built.
    """
    size = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in weights if t.numel()}.values())
    with reading(path, "a model's configuration"), torch.random.fork_rng(devices=[]):
        try:
            with _at_most(path, len(weights), size), torch.device("meta"):
                make()
        except StabilityProbeError:
            raise
        except Exception:  # wrong, or a model that computes with its tensors: building it tells
            pass
        with _at_most(path, len(weights), size):
            return make()


@contextmanager
def _at_most(path: Path, count: int, size: int) -> Iterator[None]:
    """Stop the making of modules that have far more than `count` tensors or `size` bytes."""
    built = {"tensors": 0, "bytes": 0}

    def register(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        built["tensors"] += 1
        built["bytes"] += tensor.numel() * tensor.element_size()
        if (
            built["tensors"] > 4 * count + _SPARE_TENSORS
            or built["bytes"] > 16 * size + _SPARE_BYTES
        ):
            raise problem(path, f"describes a model of more than {built['bytes']} bytes in "
                          f"{built['tensors']} tensors, and the weights are {size} bytes in "
                          f"{count}; it is damaged or of other weights")  # fmt: skip

    hooks = [
        registration.register_module_parameter_registration_hook(register),
        registration.register_module_buffer_registration_hook(register),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
