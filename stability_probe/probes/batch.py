"""A fixed batch of inputs, in the form that the model takes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from stability_probe.errors import StabilityProbeError
from stability_probe.skips.taps import first_tensor

LossFn = Callable[[Tensor, Tensor], Tensor]


def per_sample_mse(output: Tensor, target: Tensor) -> Float[Tensor, " batch"]:
    """Mean squared error of every sample.

    Raises:
        StabilityProbeError: if the shapes differ.

    >>> import torch
    >>> per_sample_mse(torch.ones(2, 4), torch.zeros(2, 4)).tolist()
    [1.0, 1.0]
    """
    if output.shape != target.shape:
        raise StabilityProbeError(
            f"the output is {tuple(output.shape)} and the target {tuple(target.shape)}: they have "
            "to be of one shape for a mean squared error; leave the target away"
        )
    return (output - target).flatten(1).square().mean(dim=1)


@dataclass(frozen=True)
class ProbeBatch:
    """A fixed batch to probe a network on.

    Attributes:
        args: the model's positional arguments, x_t first.
        kwargs: its arguments by name; tensors as long as x_t are batched, anything else is not.
        target: what the output is compared with, or `None` if per-sample gradients are not wanted.
        loss_fn: (output, target) to one loss a sample.
        sensitive: how many leading samples the (dearer) Jacobian norms are taken on.
        per_frame: names of arguments whose tensors have several rows a sample, one after the other:
            what a network of videos takes once a frame.
        whole: whether the network takes batches of just this size, so that no fewer samples can be
            measured.

    Raises:
        StabilityProbeError: if there is no sample.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Tensor | None = None
    loss_fn: LossFn = per_sample_mse
    sensitive: int = 8
    per_frame: frozenset[str] = frozenset()
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.args or not isinstance(self.args[0], Tensor) or not self.args[0].numel():
            raise StabilityProbeError(
                "ProbeBatch: the first positional argument must be x_t with at least one sample"
            )
        if self.sensitive < 1:
            raise StabilityProbeError(
                f"ProbeBatch: sensitive must be at least 1, got {self.sensitive}"
            )

    @property
    def x(self) -> Tensor:
        """The noised inputs x_t."""
        x: Tensor = self.args[0]
        return x

    def call(self, model: Callable[..., Any], x: Tensor | None = None) -> Tensor:
        """The model's output on the batch, or with `x` in the place of x_t."""
        x = self.x if x is None else x
        return first_tensor(model(x, *self.args[1:], **self.kwargs))

    def losses(self, model: Callable[..., Any]) -> Tensor:
        """The loss of every sample.

        Raises:
            StabilityProbeError: if the batch has no target.
        """
        if self.target is None:
            raise StabilityProbeError("ProbeBatch: a loss needs a target, and there is none")
        return self.loss_fn(self.call(model), self.target)

    def tensors(self) -> list[Tensor]:
        """All batched tensors."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(collect)
        return found

    def with_tensors(self, tensors: Sequence[Tensor]) -> "ProbeBatch":
        """The batch with others in the place of its `tensors()`."""
        left = iter(tensors)
        return self.map(lambda _: next(left))

    def map(self, fn: Callable[[Tensor], Tensor]) -> "ProbeBatch":
        """The batch with `fn` applied to every batched tensor, in nested arguments too."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return fn(value) if value.ndim and len(value) == len(self.x) else value
            if isinstance(value, dict):
                return {name: apply(item) for name, item in value.items()}
            if type(value) in (tuple, list):
                return type(value)(map(apply, value))
            return value

        def by_name(name: str, value: Any) -> Any:
            if name not in self.per_frame:
                return apply(value)
            return fn(value.unflatten(0, (len(self.x), -1))).flatten(0, 1)

        return replace(
            self,
            args=tuple(map(apply, self.args)),
            kwargs={name: by_name(name, value) for name, value in self.kwargs.items()},
            target=apply(self.target),
        )

    def head(self, n: int) -> "ProbeBatch":
        """A copy of the first n samples, or of all if the network needs them."""
        return self.samples(slice(len(self.x) if self.whole else n))

    def samples(self, which: slice) -> "ProbeBatch":
        """A copy of some samples."""
        return self.map(lambda tensor: tensor[which].detach().clone())
