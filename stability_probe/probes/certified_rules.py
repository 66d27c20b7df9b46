r"""What every basic operation does to Lipschitz constants; `certified` says what for.

A tensor's constants L are kept by the site s whose tensor they refer to:
‖Δtensor‖ ≤ Σ_s L_s‖Δs‖. A rule takes a call of an operation and gives its result's constants.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stability_probe.errors import StabilityProbeError
from stability_probe.probes.features import Site
from stability_probe.skips.merges import tensors_in
from stability_probe.theory.lipschitz import (
    ACTIVATION_CONSTANTS,
    average_pooling_norm,
    convolution_norm,
    elu_constant,
    leaky_relu_constant,
    linear_norm,
    max_pooling_constant,
)

Constants = dict[Site, float]


@dataclass(frozen=True)
class Known:
    """What is known of a tensor.

    Attributes:
        constants: L by site.
        dim: the dimension along which it was concatenated last, if it was.
        parts: length and constants of every part there.
    """

    constants: Constants
    dim: int = 0
    parts: tuple[tuple[int, Constants], ...] = ()


@dataclass(frozen=True)
class Call:
    """A call of an operation on tensors some of which depend on a site.

    Attributes:
        name: the operation's name without the underscore of its in-place form.
        args: the arguments by name, defaults included.
        known: what is known of the tensors among them, by identity.
        result: what it returned.
        module: dotted path of the module it runs in.
    """

    name: str
    args: Mapping[str, Any]
    known: Mapping[int, Known]
    result: Any
    module: str

    def of(self, tensor: Any) -> Constants:
        """The constants of a tensor; none if it depends on no site."""
        found = self.known.get(id(tensor))
        return found.constants if found else {}

    def varies(self, value: Any) -> bool:
        """Whether an argument depends on a site."""
        return any(id(t) in self.known for t in tensors_in(value))

    def only(self, name: str) -> Tensor:
        """The argument that alone depends on a site.

        Raises:
            StabilityProbeError: if another one does.
        """
        others = [n for n, value in self.args.items() if n != name and self.varies(value)]
        if others:
            raise self.refused(f"its {others[0]} depends on the input as well")
        tensor: Tensor = self.args[name]
        return tensor

    def refused(self, why: str) -> StabilityProbeError:
        """The error that says that this operation cannot be certified."""
        place = f"in {self.module!r}" if self.module else "in the model's own forward"
        name = self.name.removeprefix("_").removeprefix("native_")
        return StabilityProbeError(
            f"no certified Lipschitz constant: {name} {place}: {why}; what "
            "can be certified are compositions of linear maps, convolutions and 1-Lipschitz "
            "activations"
        )


Rule = Callable[[Call], Known]

WHOLE_SOFTPLUS = 15.0
"""Threshold from which on softplus' jump to the identity, log(1 + e⁻ᵗ), is rounding in float32.

In float64 it is a step of 3·10⁻⁷ at most, which no constant accounts for.
"""


def times(constants: Constants, factor: float) -> Constants:
    """Constants multiplied by a number.

    >>> times({("x", 0): 2.0}, 3.0)
    {('x', 0): 6.0}
    """
    return {site: factor * value for site, value in constants.items()}


def plus(many: Sequence[Constants]) -> Constants:
    """Constants of a sum: ‖Δ(v + w)‖ ≤ ‖Δv‖ + ‖Δw‖.

    >>> plus([{("x", 0): 2.0}, {("x", 0): 3.0}])
    {('x', 0): 5.0}
    """
    return {s: sum(c.get(s, 0.0) for c in many) for s in _sites(many)}


def beside(many: Sequence[Constants]) -> Constants:
    """Constants of a concatenation: ‖Δ(v, w)‖² = ‖Δv‖² + ‖Δw‖².

    >>> beside([{("x", 0): 3.0}, {("x", 0): 4.0}])
    {('x', 0): 5.0}
    """
    return {s: math.hypot(*(c.get(s, 0.0) for c in many)) for s in _sites(many)}


def refusal(call: Call) -> StabilityProbeError:
    """The error for an operation without a rule."""
    return call.refused(next((why for part, why in _REASONS if part in call.name), _UNKNOWN))


def _sites(many: Sequence[Constants]) -> Iterator[Site]:
    return iter(dict.fromkeys(site for constants in many for site in constants))


def _spread(call: Call, tensor: Tensor) -> float:
    """The norm of repeating a tensor's entries until it has the result's shape."""
    return math.sqrt(max(1.0, call.result.numel() / max(1, tensor.numel())))


def _scaled(factor: Callable[[Call], float], name: str = "self") -> Rule:
    """A rule for operations that multiply the constants of one argument by a number."""

    def rule(call: Call) -> Known:
        return Known(times(call.of(call.only(name)), factor(call)))

    return rule


def _constant(factor: float) -> Rule:
    return _scaled(lambda call: factor)


def _slice(call: Call) -> Known:
    """A cut; of a concatenation, no more than the parts it meets."""
    tensor = call.only("self")
    known, dim = call.known[id(tensor)], call.args["dim"] % tensor.ndim
    if not known.parts or dim != known.dim:
        return Known(known.constants)
    cut = range(tensor.shape[dim])[call.args["start"] : call.args["end"] : call.args["step"]]
    met, start = [], 0
    for length, constants in known.parts:
        if any(start <= place < start + length for place in cut):
            met.append(constants)
        start += length
    return Known(beside(met))


def _sum(call: Call) -> Known:
    """Self + alpha · other, either of which may be spread; signs do not matter."""
    terms = []
    for name, factor in (("self", 1.0), ("other", abs(call.args.get("alpha", 1)))):
        if call.name == "rsub":
            factor = abs(call.args.get("alpha", 1)) if name == "self" else 1.0
        value = call.args[name]
        if call.varies(value):
            terms.append(times(call.of(value), factor * _spread(call, value)))
    return Known(plus(terms))


def _product(call: Call) -> Known:
    a, b = call.args["self"], call.args["other"]
    if call.varies(a) and call.varies(b):
        raise call.refused("a product of two tensors that both depend on the input")
    varying, constant = (a, b) if call.varies(a) else (b, a)
    assert varying is not None
    return Known(times(call.of(varying), _largest(constant) * _spread(call, varying)))


def _quotient(call: Call) -> Known:
    a, b = call.only("self"), call.args["other"]
    if call.args.get("rounding_mode"):
        raise call.refused("it rounds, so it is not continuous")
    inverse = b.detach().double().reciprocal() if isinstance(b, Tensor) else math.inf
    if not isinstance(b, Tensor) and b:
        inverse = 1 / b
    return Known(times(call.of(a), _largest(inverse) * _spread(call, a)))


def _concatenation(call: Call) -> Known:
    tensors = call.args["tensors"]
    parts = [call.of(t) for t in tensors]
    dim = call.args["dim"] % call.result.ndim
    if call.name == "stack":
        return Known(beside(parts))
    shaped = [(t.shape[dim] if t.ndim > dim else 0, p) for t, p in zip(tensors, parts, strict=True)]
    return Known(beside(parts), dim, tuple(shaped))


def _matrix_product(left: str, right: str, bias: str | None = None) -> Rule:
    """A rule for products of two matrices, or of two batches of them."""

    def rule(call: Call) -> Known:
        a, b = call.args[left], call.args[right]
        if call.varies(a) and call.varies(b):
            raise call.refused("a product of two tensors that both depend on the input")
        alpha = abs(call.args.get("alpha", 1))
        varying, matrix = (a, b) if call.varies(a) else (b, a)
        terms = [times(call.of(varying), alpha * linear_norm(matrix))] if call.of(varying) else []
        added = call.args[bias] if bias else None
        if added is not None and call.varies(added):
            factor = abs(call.args.get("beta", 1)) * _spread(call, added)
            terms.append(times(call.of(added), factor))
        return Known(plus(terms))

    return rule


def _convolution(call: Call) -> float:
    args, weight = call.args, call.args["weight"]
    size = call.result.shape[2:] if args["transposed"] else args["input"].shape[2:]
    stride, padding, dilation = (
        _each(args[name], len(size)) for name in ("stride", "padding", "dilation")
    )
    return convolution_norm(weight, size, stride, padding, dilation, args["groups"])


def _stored_statistics(call: Call) -> float:
    """max|γ/√(σ² + ε)| of batch norm in evaluation mode."""
    args = call.args
    if args.get("training", args.get("train", False)):
        raise call.refused("it normalises by the batch's own statistics")
    epsilon = args.get("eps", args.get("epsilon"))
    scale = (args["running_var"].detach().double() + epsilon).rsqrt()
    gamma = args["weight"]
    return _largest(scale if gamma is None else scale * gamma.detach().double())


def _average_pooling(call: Call) -> float:
    kernel, stride = _windows(call)
    args = call.args
    if args.get("divisor_override") or args["ceil_mode"] or not args["count_include_pad"]:
        raise call.refused("only averages over whole windows are certified")
    return average_pooling_norm(kernel, stride)


def _max_pooling(call: Call) -> float:
    kernel, stride = _windows(call)
    dilation = _each(call.args["dilation"], len(kernel))
    if max(dilation) > 1:
        stride = [1] * len(stride)  # no entry lies in more windows than with stride 1
    return max_pooling_constant(kernel, stride)


def _windows(call: Call) -> tuple[Sequence[int], Sequence[int]]:
    kernel = call.args["kernel_size"]
    stride = call.args["stride"] or kernel
    d = int(call.name.partition("_pool")[2][0])
    return _each(kernel, d), _each(stride, d)


def _nearest_upsampling(call: Call) -> float:
    tensor = call.args.get("self", call.args.get("input"))
    ratios = [a / b for a, b in zip(call.result.shape[2:], tensor.shape[2:], strict=True)]
    given = [v for n, v in call.args.items() if n.startswith("scale") and v is not None]
    scales = [s for v in given for s in (v if isinstance(v, tuple | list) else [v])]
    if any(r != round(r) for r in ratios) or (scales and list(map(float, scales)) != ratios):
        raise call.refused("only upsampling by whole factors is certified")
    return math.sqrt(math.prod(ratios))


def _elu(call: Call) -> float:
    return elu_constant(*(float(call.args[n]) for n in ("alpha", "scale", "input_scale")))


def _mean(call: Call) -> float:
    return math.sqrt(call.result.numel() / call.args["self"].numel())


def _each(value: Any, d: int) -> list[int]:
    values = list(value) if isinstance(value, tuple | list) else [value]
    return values * d if len(values) == 1 else values


def _largest(value: Any) -> float:
    """max|c| of a number or a tensor."""
    if not isinstance(value, Tensor):
        return abs(float(value))
    return float(value.detach().double().abs().max()) if value.numel() else 0.0


def _softplus(call: Call) -> float:
    if float(call.args["threshold"]) < WHOLE_SOFTPLUS:
        raise call.refused("it jumps at its threshold")
    return 1.0


_REARRANGING = (
    "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "squeeze",
    "unsqueeze", "clone", "detach", "alias", "_to_copy", "select", "split", "split_with_sizes",
    "chunk", "unbind", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "flip", "roll", "neg",
)  # fmt: skip
VALUELESS = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "new_empty_strided",
}  # fmt: skip
"""Operations that take nothing but shape and type from their tensors."""

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_REARRANGING, _constant(1.0)),
    **{name: _constant(c) for name, c in ACTIVATION_CONSTANTS.items()},
    "softplus": _scaled(_softplus),
    "leaky_relu": _scaled(lambda call: leaky_relu_constant(float(call.args["negative_slope"]))),
    "elu": _scaled(_elu),
    "slice": _slice,
    **dict.fromkeys(("expand", "repeat"), _scaled(lambda call: _spread(call, call.args["self"]))),
    "copy": lambda call: Known(times(call.of(call.args["src"]), _spread(call, call.args["src"]))),
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    "mul": _product,
    "div": _quotient,
    **dict.fromkeys(("cat", "stack"), _concatenation),
    "mm": _matrix_product("self", "mat2"),
    "bmm": _matrix_product("self", "mat2"),
    "addmm": _matrix_product("mat1", "mat2", "self"),
    "baddbmm": _matrix_product("batch1", "batch2", "self"),
    "linear": _matrix_product("input", "weight"),
    "convolution": _scaled(_convolution, "input"),
    **dict.fromkeys(
        ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"),
        _scaled(_stored_statistics, "input"),
    ),
    **{f"avg_pool{d}d": _scaled(_average_pooling) for d in (1, 2, 3)},
    **{f"max_pool{d}d_with_indices": _scaled(_max_pooling) for d in (1, 2, 3)},
    **{f"upsample_nearest{d}d": _scaled(_nearest_upsampling) for d in (1, 2, 3)},
    "mean": _scaled(_mean),
    "sum": _scaled(lambda call: 1 / _mean(call)),
}
"""Rules by name of operation."""

_REASONS = (
    ("layer_norm", "it divides by a sample's own deviation, which no useful constant bounds"),
    ("group_norm", "it divides by a sample's own deviation, which no useful constant bounds"),
    ("batch_norm", "it normalises by the batch's own statistics"),
    ("attention", "attention multiplies features by features, so its slope grows with them"),
    ("softmax", "attention multiplies features by features, so its slope grows with them"),
    ("silu", "its slope exceeds 1"),
    ("gelu", "its slope exceeds 1"),
)
_UNKNOWN = "no constant of it is known here"
