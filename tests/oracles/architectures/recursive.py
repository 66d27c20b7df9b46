"""UNets that are built from the inside out: a level holds the whole of the next one."""

import torch
from torch import Tensor, nn

from stability_probe import TheoryUNet, UViT, UViTConfig
from tests.oracles.architectures.architecture import Architecture, noise, seeded
from tests.oracles.zoo import randomise


class PixToPix(nn.Module):
    """A level of the pix2pix generator: cat([x, up(submodule(down(x)))]).

    The first layer of `model` is a LeakyReLU. Where that is in place it also changes the `x` that
    is joined, so the feature that is passed on is the activation's output.
    """

    def __init__(self, outer: int, inner: int, submodule: nn.Module | None, inplace: bool) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.LeakyReLU(0.2, inplace),
            nn.Conv2d(outer, inner, 4, stride=2, padding=1),
            *([nn.InstanceNorm2d(inner), submodule] if submodule else []),
            nn.ReLU(inplace),
            nn.ConvTranspose2d(inner * (2 if submodule else 1), outer, 4, stride=2, padding=1),
            nn.InstanceNorm2d(outer),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], dim=1)


class PixToPixGenerator(nn.Module):
    """Three levels and the outermost, which has no skip."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        level = PixToPix(12, 16, None, inplace)
        level = PixToPix(8, 12, level, inplace)
        level = PixToPix(4, 8, level, inplace)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 4, stride=2, padding=1),
            level,
            nn.ReLU(inplace),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Level(nn.Module):
    """f_i(x) = b(a(x) + f_{i+1}(a(x)))."""

    def __init__(self, a: nn.Module, inner: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.inner, self.b = a, inner, b

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x)
        return self.b(u + self.inner(u))


def mlp(width: int = 12) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def recursive_mlp(depth: int = 3) -> nn.Module:
    model = mlp()
    for _ in range(depth):
        model = Level(mlp(), model, mlp())
    return model


def recursive_conv() -> nn.Module:
    """Strided convolutions down, transposed ones up."""
    model: nn.Module = nn.Conv2d(12, 12, 3, padding=1)
    for fan_in, width in ((8, 12), (4, 8), (1, 4)):
        a = nn.Sequential(nn.Conv2d(fan_in, width, 3, stride=2, padding=1), nn.ReLU())
        model = Level(a, model, nn.ConvTranspose2d(width, fan_in, 2, stride=2))
    return model


class SkipConnection(nn.Module):
    """Joins a submodule's output to its input, as MONAI's layer of that name does."""

    def __init__(self, submodule: nn.Module) -> None:
        super().__init__()
        self.submodule = submodule

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.submodule(x)], dim=1)


class SequentialUNet(nn.Module):
    """Sequential(down, SkipConnection(the same once more), up), to a depth of three."""

    def __init__(self) -> None:
        super().__init__()
        inner, deep = nn.Conv2d(8, 8, 3, padding=1), 8
        for outer, width in ((6, 8), (4, 6), (1, 4)):
            inner = nn.Sequential(
                nn.Sequential(nn.Conv2d(outer, width, 3, stride=2, padding=1), nn.PReLU()),
                SkipConnection(inner),
                nn.Sequential(nn.ConvTranspose2d(width + deep, outer, 2, stride=2), nn.PReLU()),
            )
            deep = outer
        self.model = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def uvit(depth: int) -> UViT:
    model = UViT(UViTConfig(embed_dim=16, depth=depth, num_heads=2))
    randomise(model, seed=1)
    return model


def _theory(n: int, merge: str, prefix: str = "") -> Architecture:
    def make() -> nn.Module:
        model = TheoryUNet(m=16, n_skips=n, merge=merge)
        return nn.Sequential(model) if prefix else model

    return Architecture(
        seeded(make),
        (noise(2, 16),),
        skips=tuple(
            (f"{prefix}encoder.{i}", f"{prefix}decoder.{i}.block", merge, (16,)) for i in range(n)
        ),
    )


def _uvit(depth: int) -> Architecture:
    n = depth // 2
    return Architecture(
        seeded(uvit, depth),
        (noise(2, 1, 8, 8), torch.tensor([20, 700])),
        skips=tuple(
            (f"in_blocks.{i}", f"out_blocks.{n - 1 - i}.skip_linear", "concat", (17, 16))
            for i in range(n)
        ),
    )


def _pix2pix(inplace: bool) -> Architecture:
    b1, b2, b3 = "model.1", "model.1.model.3", "model.1.model.3.model.3"
    conv = ("model.0", f"{b1}.model.2", f"{b2}.model.2")
    leaky = (f"{b1}.model.0", f"{b2}.model.0", f"{b3}.model.0")
    source = leaky if inplace else conv
    return Architecture(
        seeded(PixToPixGenerator, inplace),
        (noise(2, 1, 16, 16),),
        skips=(
            (source[0], "model.2", "concat", (4, 8, 8)),
            (source[1], f"{b1}.model.4", "concat", (8, 4, 4)),
            (source[2], f"{b2}.model.4", "concat", (12, 2, 2)),
        ),
    )


RECURSIVE = {
    **{f"theory-add-{n}": _theory(n, "add") for n in (1, 2, 3, 5)},
    **{f"theory-concat-{n}": _theory(n, "concat") for n in (1, 2, 3, 5)},
    "theory-in-a-sequential": _theory(2, "add", "0."),
    **{f"uvit-{depth}": _uvit(depth) for depth in (2, 3, 5, 8)},
    "pix2pix": _pix2pix(inplace=True),
    "pix2pix-out-of-place": _pix2pix(inplace=False),
    "recursive-mlp": Architecture(
        seeded(recursive_mlp),
        (noise(2, 12),),
        skips=(
            ("a", "b", "add", (12,)),
            ("inner.a", "inner.b", "add", (12,)),
            ("inner.inner.a", "inner.inner.b", "add", (12,)),
        ),
    ),
    "recursive-conv": Architecture(
        seeded(recursive_conv),
        (noise(2, 1, 16, 16),),
        skips=(
            ("a", "b", "add", (4, 8, 8)),
            ("inner.a", "inner.b", "add", (8, 4, 4)),
            ("inner.inner.a", "inner.inner.b", "add", (12, 2, 2)),
        ),
    ),
    "monai-style": Architecture(
        seeded(SequentialUNet),
        (noise(2, 1, 16, 16),),
        skips=(
            ("model.0", "model.2", "concat", (4, 8, 8)),
            ("model.1.submodule.0", "model.1.submodule.2", "concat", (6, 4, 4)),
            (
                "model.1.submodule.1.submodule.0",
                "model.1.submodule.1.submodule.2",
                "concat",
                (8, 2, 2),
            ),
        ),
    ),
}
