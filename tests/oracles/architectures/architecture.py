"""What an entry of the zoo is, and how its weights and inputs are made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Skip = tuple[str, str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """A model, an example input, and the long skips that its source code has.

    `skips` holds one (source, sink, merge, shape) a long skip, level 1 (the outermost) first. They
    are read off the model's code by these rules:

    * the source is the outermost module that puts out the encoder feature alone (as a tensor or a
      container of just one); the feature is what the encoder itself goes on with, so projections,
      norms, gates and crops on the skip's way to the merge come after the source;
    * where the feature is a sum that is written outside of any module, the source is the module at
      the end of the sum's longer path;
    * the sink is the first, outermost module that takes the merged tensor;
    * the shape is the feature's where it enters the merge, after a crop.
    """

    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    skips: tuple[Skip, ...] = ()

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors that the model puts out for the example input."""
        return tensors(model(*self.args, **self.kwargs))


def seeded(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """A builder whose every call gives the same weights, none of them all zero."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(*args, **kwargs)
            enliven(model)
        return model

    return build


@torch.no_grad()
def enliven(model: nn.Module, std: float = 0.1) -> None:
    """Draw the parameters that begin as zero, so that what they gate takes part."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=std)


def noise(*shape: int, seed: int = 7) -> Tensor:
    """A fixed standard normal tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(value: Any) -> list[Tensor]:
    """The tensors inside of nested dicts, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors(getattr(value, name))]
    return []
