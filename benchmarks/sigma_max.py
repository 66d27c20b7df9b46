"""Largest singular values of trained networks' Jacobians: what each method costs, and its error.

    python benchmarks/sigma_max.py

A U-ViT of 13 blocks (16×16 digits) and a UNet2DModel (32×32 faces) are trained for a few hundred
steps. At two noise levels, from five random starts each, σ_max(J) of one sample is asked for to 1 %
from

* power iteration on JᵀJ, stopped when the estimate changes by less than 0.1 %;
* `scipy.sparse.linalg.svds` (ARPACK);
* Golub–Kahan–Lanczos, stopped when the residual is below 1 %;
* the same, stopped by its certificate (`jacobian_norm`).

The truth is the full Jacobian's. A product pair is one with J and one with Jᵀ; ARPACK's are counted
apart. A pair by double backward on a retained graph and a pair by forward mode and backward are
timed against a forward-backward, interleaved.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_probe.runs import TrainConfig, build_model, load_images, train
from stability_probe.skips.taps import first_tensor
from stability_probe.theory import jacobian_norm, jacobian_products

STARTS, TIMED = 5, 20
LEVELS = {50: 0.95, 500: 0.28}
"""Noise levels t and α_t there."""
WORKLOADS = {
    "U-ViT, 13 blocks, 16×16": (TrainConfig(n_skips=6, width=128, batch_size=16, steps=300), 16),
    "UNet2DModel, 32×32": (
        TrainConfig(model="unet2d", data="faces", n_skips=6, width=32, batch_size=8, steps=150),
        32,
    ),
}

Products = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def trained(config: TrainConfig, size: int) -> tuple[nn.Module, Tensor]:
    """A trained network in evaluation mode, and an image for it."""
    images = F.interpolate(load_images(config.data), size=(size, size), mode="bilinear")
    model = build_model(config, images.shape[1:])
    for _ in train(model, images, config):
        pass
    return model.eval().requires_grad_(False), images[:1]


def power_iteration(products: Products, start: Tensor) -> tuple[float, int]:
    """Estimate and pairs; it stops when the estimate changes by less than 0.1 %."""
    push, pull = products
    v, last, pairs = start / start.norm(), 0.0, 0
    while True:
        pairs += 1
        u = push(v)
        sigma = u.norm().item()
        v = pull(u)
        v = v / v.norm()
        if abs(sigma - last) < 1e-3 * sigma:
            return sigma, pairs
        last = sigma


def arpack(products: Products, start: Tensor) -> tuple[float, int]:
    """Estimate and products, halved."""
    count = 0

    def operate(fn: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        def apply(v: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            return fn(torch.from_numpy(np.ascontiguousarray(v)).to(start).view(1, -1)).numpy()[0]

        return apply

    n = start.numel()
    operator = LinearOperator(
        (n, n), matvec=operate(products[0]), rmatvec=operate(products[1]), dtype=np.float32
    )
    sigma = svds(operator, k=1, tol=1e-2, v0=start.numpy()[0], return_singular_vectors=False)
    return float(sigma[0]), count // 2


def residual_rule(products: Products, start: Tensor) -> tuple[float, int]:
    """Golub–Kahan–Lanczos until some singular value surely is within 1 % of the estimate."""
    push, pull = products
    right, left = [start[0] / start.norm()], []
    alphas, betas = [], []
    while True:
        u = push(right[-1][None])[0]
        for _ in range(2):
            u = u - sum((q @ u) * q for q in left)
        alphas.append(u.norm().item())
        left.append(u / u.norm())
        v = pull(left[-1][None])[0]
        for _ in range(2):
            v = v - sum((q @ v) * q for q in right)
        small = np.diag(alphas) + np.diag(betas, 1)
        betas.append(v.norm().item())
        p, sigma, _ = np.linalg.svd(small)
        if betas[-1] * abs(p[-1, 0]) <= 1e-2 * sigma[0]:
            return float(sigma[0]), len(alphas)
        right.append(v / v.norm())


def costs(model: nn.Module, x: Tensor, t: Tensor) -> dict[str, list[float]]:
    """Seconds of a forward-backward and of one product pair in each way, interleaved."""

    def call(v: Tensor) -> Tensor:
        return first_tensor(model(v, t))

    leaf = x.clone().requires_grad_()
    out = call(leaf)
    push, pull = jacobian_products(out, leaf)
    w = torch.ones_like(out)

    def forward_backward() -> None:
        torch.autograd.grad(call(leaf), leaf, w)

    def double_backward() -> None:
        push(x)
        pull(w)

    def forward_mode() -> None:
        jvp(call, (x,), (x,))
        vjp(call, x)[1](w)

    ways = {"forward-backward": forward_backward, "double backward": double_backward,
            "forward mode": forward_mode}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TIMED):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Print the tables."""
    table = Table(title=f"σ_max(J) to 1 %, {STARTS} starts, batch 1")
    for column in ("network", "t", "method", "pairs", "largest error", "claimed error"):
        table.add_column(column)
    price = Table(title="cost of a product pair, in forward-backwards (median)")
    for column in ("network", "double backward, graph retained", "forward mode + backward"):
        price.add_column(column)
    for name, (config, size) in WORKLOADS.items():
        model, image = trained(config, size)
        for level, alpha in LEVELS.items():
            generator = torch.Generator().manual_seed(level)
            noise = torch.randn(image.shape, generator=generator)
            x = (alpha * image + (1 - alpha**2) ** 0.5 * noise).requires_grad_()
            t = torch.tensor([level])
            with sdpa_kernel(SDPBackend.MATH):
                out = first_tensor(model(x, t))
                rows = [torch.autograd.grad(out, x, e.view_as(out), retain_graph=True)[0].flatten()
                        for e in torch.eye(out.numel())]  # fmt: skip
                truth = torch.linalg.svdvals(torch.stack(rows).double())[0].item()
                products = jacobian_products(out, x)
                found: dict[str, list[tuple[float, int, float]]] = {}
                for seed in range(STARTS):
                    start = torch.randn(1, x.numel(), generator=generator)
                    for method in (power_iteration, arpack, residual_rule):
                        sigma, pairs = method(products, start)
                        found.setdefault(method.__name__, []).append((sigma, pairs, np.nan))
                    norm = jacobian_norm(out, x, generator=torch.Generator().manual_seed(seed))
                    width = (norm.upper / norm.value - 1).item()
                    assert norm.upper.item() >= truth * (1 - 1e-5), "the certificate failed"
                    found.setdefault("certificate", []).append(
                        (norm.value.item(), norm.products, width)
                    )
            for method, runs in found.items():
                pairs = [p for _, p, _ in runs]
                error = max(abs(s / truth - 1) for s, _, _ in runs)
                claim = max(w for _, _, w in runs)
                table.add_row(
                    name, str(level), method, f"{min(pairs)}–{max(pairs)}", f"{error:.2%}",
                    "none" if np.isnan(claim) else f"{claim:.2%}",
                )  # fmt: skip
        with sdpa_kernel(SDPBackend.MATH):
            seconds = costs(model, x.detach(), t)
        unit = statistics.median(seconds["forward-backward"])
        ratios = [statistics.median(seconds[way]) / unit for way in list(seconds)[1:]]
        price.add_row(name, *(f"{ratio:.2f}" for ratio in ratios))
    console = Console(width=120)
    console.print(table, price)


if __name__ == "__main__":
    main()
