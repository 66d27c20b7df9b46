r"""Gradient energies of single samples in linear and convolution layers, without the gradients.

Such a layer is $y_t = W a_t$ at every position $t$ (a token, a pixel with its neighbours, a frame,
or a further call of the layer). With $g_t = \partial\ell_s/\partial y_t$ the gradient of a
sample's loss is $\nabla_W\ell_s = \sum_t g_t a_t^\top = GA^\top$, for $A$ of shape $(d_{in}, T)$
and $G$ of $(d_{out}, T)$, and

$$\|\nabla_W\ell_s\|^2 = \|GA^\top\|_F^2 = \langle A^\top A, G^\top G\rangle.$$

The product takes $T d_{in} d_{out}$ multiplications, the two Gram matrices $T^2(d_{in} + d_{out})$.
$A$ is caught on the forward pass, and one backward pass of the summed losses gives every $G$, as
long as samples do not interact and lie one after the other in the tensors' first dimension.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that are a product of their weight with something known."""

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def outer_energy(
    a: Float[Tensor, "batch groups d_in positions"],
    g: Float[Tensor, "batch groups d_out positions"],
) -> Float[Tensor, " batch"]:
    """‖G Aᵀ‖² of every sample, summed over groups, in the cheaper way.

    >>> a, g = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0]]]])
    >>> outer_energy(a, g)  # ‖3·(1, 2)‖²
    tensor([45.])
    """
    d_in, d_out, positions = a.shape[2], g.shape[2], a.shape[3]
    if positions * (d_in + d_out) < d_in * d_out:
        return ((a.mT @ a) * (g.mT @ g)).sum((1, 2, 3))
    return (g @ a.mT).square().sum((1, 2, 3))


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        layer: the layer.
        input: what it read.
        edge: where the gradient of its output arrives, before anything is written into it.
        out_shape: shape of the output.
    """

    layer: Layer
    input: Tensor
    edge: GradientEdge
    out_shape: torch.Size

    @property
    def bytes_held(self) -> int:
        """Bytes of the output's gradient."""
        return self.input.element_size() * prod(self.out_shape)

    @property
    def bytes_worked(self) -> int:
        """Bytes of A, and of one product or two Gram matrices, if the call is of one sample."""
        weight = self.layer.weight
        positions = prod(self.out_shape) // len(weight)
        d_in, d_out = prod(weight.shape[1:]), len(weight)
        numbers = positions * d_in * getattr(self.layer, "groups", 1)
        return self.input.element_size() * (numbers + min(d_in * d_out, 2 * positions**2))

    def factors(self, g: Tensor, samples: int) -> tuple[Tensor, Tensor] | None:
        """A and G, (samples, groups, d, T), or `None` if their rows are not `samples` alike."""
        a, g = self.input, g.to(self.input.dtype)
        if not a.numel() or len(a) % samples or len(g) != len(a):
            return None
        if isinstance(self.layer, nn.Linear):
            a, g = (v.reshape(samples, 1, -1, v.shape[-1]).mT for v in (a, g))
        else:
            a, g = windows(self.layer, a), g.flatten(2)
            a, g = (_by_sample(v, self.layer.groups, samples) for v in (a, g))
        return (a, g) if a.shape[3] == g.shape[3] else None


def _by_sample(v: Tensor, groups: int, samples: int) -> Tensor:
    """(samples·frames, groups·d, T) to (samples, groups, d, frames·T)."""
    grouped: Tensor = v.unflatten(1, (groups, -1))
    if len(grouped) == samples:
        return grouped
    frames: Tensor = grouped.unflatten(0, (samples, -1)).permute(0, 2, 3, 1, 4)
    return frames.flatten(3)


def windows(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Float[Tensor, "rows channels *positions"]
) -> Float[Tensor, "rows features places"]:
    """What a convolution multiplies its weight with: (rows, channels·kernel size, positions).

    >>> windows(nn.Conv1d(1, 1, 2, stride=2), torch.arange(4.0).view(1, 1, 4))
    tensor([[[0., 2.],
             [1., 3.]]])
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    around = layer._reversed_padding_repeated_twice
    x = F.pad(x, around, mode=mode) if any(around) else x
    x = x.contiguous()
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    places = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps = x.stride()[2:]
    seen = x.as_strided(
        (*x.shape[:2], *kernel, *places),
        (
            *x.stride()[:2],
            *(d * step for d, step in zip(dilation, steps, strict=True)),
            *(s * step for s, step in zip(stride, steps, strict=True)),
        ),
    )
    return seen.reshape(len(x), x.shape[1] * prod(kernel), prod(places))


@contextmanager
def layer_calls(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[list[LayerCall]]:
    """Collects the calls of the layers that own one of the weights."""
    calls: list[LayerCall] = []
    wanted = {id(w) for w in weights.values()}

    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        a = args[0] if args else kwargs.get("input")
        if not isinstance(a, Tensor) or not isinstance(output, Tensor):
            return
        fits = a.ndim >= 2 if isinstance(layer, nn.Linear) else a.ndim == layer.weight.ndim
        if fits and output.requires_grad:
            calls.append(LayerCall(layer, a.detach(), get_gradient_edge(output), output.shape))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, LAYERS) and id(module.weight) in wanted:
                handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
        yield calls


@dataclass(frozen=True)
class LayerEnergy:
    """‖∇_W ℓ_s‖² of a weight by its layers' calls.

    Attributes:
        shape: groups, d_in and T of a sample, by which calls of other samples are told alike.
        energy: one number a sample.
    """

    shape: tuple[int, ...]
    energy: Tensor


def layer_energies(
    weights: Mapping[str, Tensor], calls: Sequence[LayerCall], losses: Float[Tensor, " batch"]
) -> dict[str, LayerEnergy]:
    """‖∇_W ℓ_s‖² as far as calls of layers say, with one backward pass for all samples.

    Weights used in other ways too have wrong numbers here; those of samples that do not lie one
    after the other, none.
    """
    by_weight: dict[int, list[tuple[Tensor, Tensor] | None]] = {}
    edges = [call.edge for call in calls]
    ones = torch.ones_like(losses)
    grads = torch.autograd.grad(losses, edges, ones, allow_unused=True) if edges else ()
    found = {}
    names = {id(w): name for name, w in weights.items()}
    last = {id(call.layer.weight): index for index, call in enumerate(calls)}
    for index, (call, g) in enumerate(zip(calls, grads, strict=True)):
        key = id(call.layer.weight)
        factors = by_weight.setdefault(key, [])
        if g is not None:
            factors.append(call.factors(g, len(losses)))
        if index == last[key]:
            energy = _energy(by_weight.pop(key))
            if energy is not None:
                found[names[key]] = energy
    return found


def _energy(factors: Sequence[tuple[Tensor, Tensor] | None]) -> LayerEnergy | None:
    """The energy of a weight from A and G of all calls, whose positions are put together."""
    known = [f for f in factors if f is not None]
    if not known or len(known) < len(factors):
        return None
    a, g = (v[0] if len(v) == 1 else torch.cat(v, dim=3) for v in zip(*known, strict=True))
    return LayerEnergy(tuple(a.shape[1:]), outer_energy(a, g))
