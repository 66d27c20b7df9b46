"""Float64 oracle of what a probe records: store every activation, compute everything afterwards.

Nothing of the package's taps, probes or reductions is used. Where Eq. 4's tensors are in each
network is written down here by hand, gradients come from `retain_grad`, and statistics from loops.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from stability_probe import TheoryUNet, UViT
from stability_probe.models.uvit import timestep_embedding
from stability_probe.probes import ProbeConfig

Row = tuple[str, str, int, str]
"""metric, site, level, stat."""

Batch = tuple[Tensor, Tensor, Tensor]
"""x_t, t and the target."""


@dataclass
class Pass:
    """Every tensor of one forward pass, by level."""

    x: Tensor
    t: Tensor
    u: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    ku: dict[int, Tensor] = field(default_factory=dict)
    merged: dict[int, Tensor] = field(default_factory=dict)
    h: dict[int, Tensor] = field(default_factory=dict)
    output: Tensor | None = None
    loss: Tensor | None = None


@dataclass(frozen=True)
class Places:
    """By hand: the modules of u_1..u_N, of the merges 1..N, of h_0..h_{N-1}, and the middle."""

    encoder: Sequence[nn.Module]
    merge: Sequence[nn.Module]
    decoder: Sequence[nn.Module]
    middle: nn.Module
    dim: int
    add: bool = False


def places(net: nn.Module) -> Places:
    """Where Eq. 4 is in a network; a UNet2DModel has two levels of one layer (N = 4)."""
    if isinstance(net, TheoryUNet):
        merges = [d.block for d in net.decoder]
        return Places(net.encoder, merges, net.decoder, net.middle, 1, add=net.merge == "add")
    if isinstance(net, UViT):
        out = list(net.out_blocks)[::-1]
        return Places(net.in_blocks, [b.skip_linear for b in out], out, net.mid_block, 2)
    down, up = net.down_blocks, net.up_blocks
    encoder = [net.conv_in, down[0].resnets[0], down[0].downsamplers[0], down[1].resnets[0]]
    merges = [up[1].resnets[1], up[1].resnets[0], up[0].resnets[1], up[0].resnets[0]]
    decoder = [*merges[:2], up[0].upsamplers[0], merges[3]]  # z_2 is what was enlarged
    return Places(encoder, merges, decoder, net.mid_block, 1)


def run_pass(net: nn.Module, x: Tensor, t: Tensor) -> Pass:
    """A forward pass that keeps every tensor, and its gradient once there is one."""
    where, seen = places(net), Pass(x, t)
    n = len(where.encoder)

    def keep(store: dict[int, Tensor], level: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            store[level] = output

        return hook

    def keep_merged(level: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.merged[level] = args[0]

        return hook

    def keep_added(level: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.ku[level] = args[1]

        return hook

    with ExitStack() as stack:
        for i in range(1, n + 1):
            hooks = (
                where.encoder[i - 1].register_forward_hook(keep(seen.u, i)),
                where.merge[i - 1].register_forward_pre_hook(keep_merged(i)),
                where.decoder[i - 1].register_forward_hook(keep(seen.h, i - 1)),
            )
            for hook in hooks:
                stack.callback(hook.remove)
            if where.add:
                hook = where.decoder[i - 1].register_forward_pre_hook(keep_added(i))
                stack.callback(hook.remove)
        stack.callback(where.middle.register_forward_hook(keep(seen.h, n)).remove)
        seen.output = output_of(net, x, t)
    for i in range(1, n + 1):
        if where.add:
            seen.z[i] = seen.h[i]
        else:
            width = seen.u[i].shape[where.dim]
            sizes = [seen.merged[i].shape[where.dim] - width, width]
            seen.z[i], seen.ku[i] = seen.merged[i].split(sizes, where.dim)
    return seen


def output_of(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """The network's output as a tensor."""
    out = net(x, t)
    return out if isinstance(out, Tensor) else out.sample


def expected_step(
    net: nn.Module,
    batches: Sequence[Batch],
    *,
    grad_scale: float = 1.0,
    bins: int = 4,
    levels: float = 1000.0,
    within: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[Row, float]:
    """The rows of one step, gradients accumulated over `batches`; they stay in the parameters.

    Forward passes run `within` a context.
    """
    passes = []
    for x, t, target in batches:
        with within():
            seen = run_pass(net, x, t)
        seen.loss = (seen.output - target).square().flatten(1).mean(1)
        (grad_scale * seen.loss.mean() / len(batches)).backward()
        passes.append(seen)
    rows = expected_samples(passes, places(net).add, grad_scale, bins=bins, levels=levels)
    return rows | expected_parameters(net, grad_scale)


def expected_samples(
    passes: Sequence[Pass],
    add: bool,
    grad_scale: float = 1.0,
    *,
    bins: int = 4,
    levels: float = 1000.0,
) -> dict[Row, float]:
    """The rows of passes that have gone forward and back, merging by a sum or a concatenation."""
    t = torch.cat([p.t for p in passes]).numpy()
    rows: dict[Row, float] = {}
    for (metric, site, level), values in _per_sample(passes, add, grad_scale).items():
        for stat, value in _statistics(values, t, bins, levels).items():
            rows[metric, site, level, stat] = value
    for b, inside in _bins(t, bins, levels).items():
        rows["samples", "loss", 0, b] = float(inside.sum())
    return rows


DETAILED = {"sensitivity_every": 0, "config": ProbeConfig(details_every=1)}
"""Settings of a probe that records all of `expected_step` whenever it records a step."""


def expected_parameters(net: nn.Module, grad_scale: float = 1.0) -> dict[Row, float]:
    """`grad_energy` and `param_energy` of every parameter that trains."""
    rows: dict[Row, float] = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            kind, level = block_of(net, name)
            grad = torch.zeros_like(p) if p.grad is None else p.grad.double() / grad_scale
            rows["grad_energy", f"{kind}/{name}", level, "value"] = energy(grad[None]).item()
            rows["param_energy", f"{kind}/{name}", level, "value"] = energy(p[None]).item()
    return rows


def energy(v: Tensor) -> Tensor:
    """‖v_s‖² of every sample in float64."""
    return v.detach().double().flatten(1).pow(2).sum(1)


def _per_sample(
    passes: Sequence[Pass], add: bool, grad_scale: float
) -> dict[tuple[str, str, int], np.ndarray]:
    found: dict[tuple[str, str, int], np.ndarray] = {}
    n = len(passes[0].u)

    def put(metric: str, site: str, level: int, value: Callable[[Pass], Tensor]) -> None:
        found[metric, site, level] = torch.cat([value(p).detach() for p in passes]).numpy()

    put("loss", "loss", 0, lambda p: p.loss)
    put("energy", "x", 0, lambda p: energy(p.x))
    put("energy", "output", 0, lambda p: energy(p.output))
    for i in range(1, n + 1):
        for site in ("u", "ku", "z", "merged"):
            put("energy", site, i, lambda p, site=site, i=i: energy(getattr(p, site)[i]))
        put("kappa", "skip", i, lambda p, i=i: (energy(p.ku[i]) / energy(p.u[i])).sqrt())
        put("cross", "merge", i, lambda p, i=i: _cross(p.z[i], p.ku[i], add))
        put("feature_grad_energy", "u", i, lambda p, i=i: energy(p.u[i].grad.double() / grad_scale))
    for i in range(n + 1):
        put("energy", "h", i, lambda p, i=i: energy(p.h[i] if i < n else p.z[n]))
        put("feature_grad_energy", "h", i, lambda p, i=i: energy(p.h[i].grad.double() / grad_scale))
    return found


def _cross(z: Tensor, ku: Tensor, add: bool) -> Tensor:
    """‖merged‖² − ‖z‖² − ‖κu‖² by its other formula: 2⟨z, κu⟩ of a sum, 0 of a concatenation."""
    return 2 * (z.double() * ku.double()).flatten(1).sum(1) if add else torch.zeros(len(z))


def _bins(t: np.ndarray, bins: int, levels: float) -> dict[str, np.ndarray]:
    index = np.minimum((t / (levels / bins)).astype(int), bins - 1)
    return {f"t{b}": index == b for b in range(bins) if (index == b).any()}


def _statistics(v: np.ndarray, t: np.ndarray, bins: int, levels: float) -> dict[str, float]:
    whole = {"mean": v.mean(), "min": v.min(), "max": v.max()}
    return whole | {b: v[inside].mean() for b, inside in _bins(t, bins, levels).items()}


def block_of(net: nn.Module, name: str) -> tuple[str, int]:
    """By hand: kind and level of the block of Eq. 4 that a parameter belongs to."""
    if name.startswith(("se.", "time_embed", "pos_embed")):
        return "other", 0
    if name.startswith("mid"):
        return "mid", 0
    where = places(net)
    for kind, modules in (("a", where.encoder), ("b", where.merge), ("b", where.decoder)):
        for level, module in enumerate(modules, start=1):
            if any(p is net.get_parameter(name) for p in module.parameters()):
                return kind, level
    return ("a", 1) if name.startswith("patch_embed") else ("b", 1)


def assert_rows(
    frame: pd.DataFrame, expected: dict[Row, float], *, rtol: float = 1e-10, metrics: str = ""
) -> None:
    """The frame has exactly the expected rows with the expected values, NaN where NaN is due."""
    if not any(row[0] == "skipped" for row in expected):  # a mark, and no measurement
        frame = frame[frame.metric != "skipped"]
    if metrics:
        frame = frame[frame.metric.isin(metrics.split())]
        expected = {row: v for row, v in expected.items() if row[0] in metrics.split()}
    index = zip(frame.metric, frame.site, frame.level, frame.stat, strict=True)
    got = dict(zip(index, frame.value, strict=True))
    assert len(got) == len(frame), "a row is there twice"
    assert got.keys() == expected.keys(), sorted(set(got) ^ set(expected))[:10]
    largest = {"energy": 0.0}
    for (metric, *_), value in expected.items():
        largest[metric] = np.nanmax([largest.get(metric, 0.0), abs(value)])
    for row, value in expected.items():
        if np.isnan(value) or np.isnan(got[row]):
            assert np.isnan(value) and np.isnan(got[row]), (row, got[row], value)
            continue
        # parameter norms are kept in float32; cross terms are differences of energies
        relative = max(rtol, 1e-6) if row[1].find("/") >= 0 else rtol
        absolute = rtol * (largest["energy"] if row[0] == "cross" else 1e-6 * largest[row[0]])
        assert abs(got[row] - value) <= relative * abs(value) + absolute, (row, got[row], value)


BlockFn = Callable[[Tensor], Tensor]


def blocks_at(
    net: nn.Module, x: Tensor, t: Tensor, kappa: Sequence[float]
) -> tuple[dict[tuple[str, int], tuple[BlockFn, Tensor]], Tensor]:
    """By hand at one sample (1, ...): every block of Eq. 4 with its input, and the output z_0.

    The blocks are functions of a batch of any length.
    """
    a, b, mid, merge = parts_of(net, x, t)
    blocks: dict[tuple[str, int], tuple[BlockFn, Tensor]] = {}
    u, v = {}, x
    for i, fn in enumerate(a, start=1):
        blocks["a", i] = (fn, v)
        u[i] = v = fn(v)
    blocks["mid", 0] = (mid, v)
    z = mid(v)
    for i in range(len(a), 0, -1):
        blocks["skip", i] = (partial(operator.mul, kappa[i - 1]), u[i])
        merged = merge(z, kappa[i - 1] * u[i])
        blocks["b", i] = (b[i - 1], merged)
        z = b[i - 1](merged)
    return blocks, z


Parts = tuple[list[BlockFn], list[BlockFn], BlockFn, Callable[[Tensor, Tensor], Tensor]]


def parts_of(net: nn.Module, x: Tensor, t: Tensor) -> "Parts":
    """The blocks a_1.., b_1.., the middle, and the merge of z and κu."""
    return _uvit(net, x, t) if isinstance(net, UViT) else _theory(net)


def _theory(net: TheoryUNet) -> Parts:
    def join(z: Tensor, u: Tensor) -> Tensor:
        return z + u if net.merge == "add" else torch.cat([z, u], dim=1)

    return list(net.encoder), [d.block for d in net.decoder], net.middle, join


def _uvit(net: UViT, x: Tensor, t: Tensor) -> Parts:
    def body(block: nn.Module) -> BlockFn:
        def fn(v: Tensor) -> Tensor:
            v = v + block.attn(block.norm1(v))
            return v + block.mlp(block.norm2(v))

        return fn

    def embed(image: Tensor) -> Tensor:
        tokens = net.patch_embed(image)
        time = timestep_embedding(t, tokens.shape[2]).to(tokens.dtype)
        time = time[:, None].expand(len(image), -1, -1)
        return torch.cat([time, tokens], 1) + net.pos_embed

    def image(tokens: Tensor) -> Tensor:
        pixels = net.decoder_pred(net.norm(tokens))[:, 1:].reshape(-1, 4, 4, 2, 2, 1)
        return net.final_layer(pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, *x.shape[1:]))

    inner = [body(block) for block in net.in_blocks]
    a = [lambda v: inner[0](embed(v)), *inner[1:]]
    outer = list(net.out_blocks)[::-1]
    b = [lambda v, o=o: body(o)(o.skip_linear(v)) for o in outer]
    last = b[0]
    b[0] = lambda v: image(last(v))
    return a, b, body(net.mid_block), lambda z, u: torch.cat([z, u], dim=-1)
