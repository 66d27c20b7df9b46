"""Networks without a long skip: residuals, branches and dense connections within blocks."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
    UNet1DModel,
    VQModel,
)
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.architectures.architecture import Architecture, noise, seeded
from tests.oracles.architectures.layers import ConvBlock, ResBlock, TransformerBlock, up

T = torch.tensor([20, 700])
TEXT = noise(2, 5, 8, seed=8)


class ResNet(nn.Module):
    """A stem, residual blocks, pooling and a classifier."""

    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class SqueezeExcite(nn.Module):
    """A residual block whose branch is gated by its own mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBlock(width, width), ConvBlock(width, width)
        self.fc1, self.fc2 = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.conv1(x))
        gate = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(h, 1))))
        return F.relu(x + h * gate.sigmoid())


class InvertedResidual(nn.Module):
    """ConvNeXt's block: depthwise convolution, channel norm, MLP, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.gamma * self.shrink(F.gelu(self.expand(h)))
        return x + h.permute(0, 3, 1, 2)


class DenseLayer(nn.Module):
    def __init__(self, fan_in: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(fan_in)
        self.conv = nn.Conv2d(fan_in, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class DenseBlock(nn.Module):
    """Every layer reads all features before it, kept in a list."""

    def __init__(self, fan_in: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvBlock(fan_in + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return torch.cat(features, dim=1)


class Inception(nn.Module):
    """Four branches, concatenated."""

    def __init__(self, fan_in: int) -> None:
        super().__init__()
        self.branch1 = ConvBlock(fan_in, 2)
        self.branch2 = nn.Sequential(nn.Conv2d(fan_in, 2, 1), ConvBlock(2, 4))
        self.branch3 = nn.Sequential(nn.Conv2d(fan_in, 2, 1), ConvBlock(2, 2), ConvBlock(2, 2))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(fan_in, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return torch.cat([branch(x) for branch in branches], dim=1)


class MixerBlock(nn.Module):
    """An MLP over tokens and one over channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Patches(nn.Module):
    """Image to tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Patches(8)
        self.blocks = nn.Sequential(MixerBlock(16, 8), MixerBlock(16, 8), MixerBlock(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(dim=1))


class ViT(nn.Module):
    """A class token is put before the patches' tokens; positions are added."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = Patches(8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 17, 8))
        self.blocks = nn.ModuleList(TransformerBlock(8) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class GPT(nn.Module):
    """Causal; the head is the token table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(TransformerBlock(8, causal=True) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.T


class Autoencoder(nn.Module):
    """Strided convolutions to a vector and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(ConvBlock(1, 4, 2), ConvBlock(4, 8, 2), nn.Flatten())
        self.code, self.grow = nn.Linear(32, 6), nn.Linear(6, 32)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (8, 2, 2)),
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.grow(self.code(self.encoder(x))))


class DnCNN(nn.Module):
    """x - f(x): the network finds the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ConvBlock(1, 4), ConvBlock(4, 4), ConvBlock(4, 4), nn.Conv2d(4, 1, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x - self.layers(x)


class PyramidPooling(nn.Module):
    """PSPNet's head: the features beside themselves, averaged at several scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (1, 2)
        self.convs = nn.ModuleList(nn.Conv2d(width, 2, 1) for _ in self.sizes)
        self.bottleneck = ConvBlock(width + 2 * len(self.sizes), 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [
            F.interpolate(conv(F.adaptive_avg_pool2d(x, size)), size=x.shape[2:], mode="bilinear")
            for size, conv in zip(self.sizes, self.convs, strict=True)
        ]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class AtrousPyramid(nn.Module):
    """DeepLab's head: dilated convolutions and an image-wide mean, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.point = nn.Conv2d(width, 2, 1)
        self.dilated = nn.ModuleList(
            nn.Conv2d(width, 2, 3, padding=rate, dilation=rate) for rate in (1, 2)
        )
        self.pooled = nn.Conv2d(width, 2, 1)
        self.project = ConvBlock(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.pooled(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[2:])
        return self.project(
            torch.cat([self.point(x), *[conv(x) for conv in self.dilated], mean], dim=1)
        )


class PyramidNet(nn.Module):
    """A ResNet, a head over its last features, and the image's size again."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.backbone = nn.Sequential(ResBlock(4, 4), ResBlock(4, 8, 2), ResBlock(8, 8))
        self.head = head
        self.classify = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return up(self.classify(self.head(self.backbone(self.stem(x)))))


class Recurrent(nn.Module):
    """Two layers of an LSTM, then a linear layer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class UnrolledCell(nn.Module):
    """A GRU cell, called once a step; the states are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(len(x), 6), []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return self.head(torch.stack(states, dim=1))


class ElmanCell(nn.Module):
    """A recurrence by hand: the state is concatenated with every step's input."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4 + 8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = torch.tanh(self.step(torch.cat([x[:, t], h], dim=1)))
        return self.head(h)


class InputInjection(nn.Module):
    """One layer, again and again, that reads the embedded input every time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        u = self.embed(x)
        z = torch.zeros_like(u)
        for _ in range(4):
            z = self.layer(z + u)
        return self.head(z)


class StyleGenerator(nn.Module):
    """A generator whose images of all resolutions add up to the output, as in StyleGAN2."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.linspace(-1, 1, 4 * 16).view(1, 4, 4, 4))
        self.style = nn.Linear(6, 4)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.to_rgb = nn.ModuleList(nn.Conv2d(4, 3, 1) for _ in range(4))

    def forward(self, z: Tensor) -> Tensor:
        style = self.style(z)[:, :, None, None]
        x, image = self.constant, None
        for block, to_rgb in zip(self.blocks, self.to_rgb, strict=True):
            x = F.leaky_relu(block(up(x) * style), 0.2)
            rgb = to_rgb(x * style)
            image = rgb if image is None else up(image) + rgb
        assert image is not None
        return image


def _classifier(*blocks: Any, width: int) -> nn.Module:
    return ResNet(*(block() for block in blocks), width=width)


def _image(*blocks: Any, width: int) -> Architecture:
    return Architecture(seeded(_classifier, *blocks, width=width), (noise(2, 1, 8, 8),))


def _of(make: Any, *args: Any, **kwargs: Any) -> Architecture:
    return Architecture(seeded(make, *args, **kwargs), (noise(2, 1, 8, 8),))


OURS = {
    "resnet": _image(
        lambda: ResBlock(4, 4),
        lambda: ResBlock(4, 8, 2),
        lambda: ResBlock(8, 8),
        lambda: ResBlock(8, 8),
        width=8,
    ),
    "resnet-of-one-block": _image(lambda: ResBlock(4, 4), width=4),
    "squeeze-excite": _image(lambda: SqueezeExcite(4), lambda: SqueezeExcite(4), width=4),
    "convnext": _image(
        lambda: InvertedResidual(4),
        lambda: nn.Conv2d(4, 6, 2, stride=2),
        lambda: InvertedResidual(6),
        lambda: InvertedResidual(6),
        width=6,
    ),
    "densenet": _image(
        lambda: DenseBlock(4, 2, 3),
        lambda: nn.Sequential(nn.Conv2d(10, 6, 1), nn.AvgPool2d(2)),
        lambda: DenseBlock(6, 2, 3),
        width=12,
    ),
    "densenet-of-layers": _image(
        lambda: DenseLayer(4, 2), lambda: DenseLayer(6, 2), lambda: DenseLayer(8, 2), width=10
    ),
    "densenet-of-one-block": _image(lambda: DenseBlock(4, 2, 3), width=10),
    "inception": _image(lambda: Inception(4), lambda: Inception(10), width=10),
    "elman-cell": Architecture(seeded(ElmanCell), (noise(2, 5, 4),)),
    "input-injection": Architecture(seeded(InputInjection), (noise(2, 4),)),
    "style-generator": Architecture(seeded(StyleGenerator), (noise(2, 6),)),
    "mixer": _of(Mixer),
    "vit": _of(ViT),
    "vit-of-one-block": _of(ViT, 1),
    "autoencoder": _of(Autoencoder),
    "dncnn": _of(DnCNN),
    "pyramid-pooling": _of(lambda: PyramidNet(PyramidPooling(8))),
    "atrous-pyramid": _of(lambda: PyramidNet(AtrousPyramid(8))),
    "gpt": Architecture(seeded(GPT), (torch.tensor([[1, 4, 2, 9, 0, 3], [5, 5, 7, 10, 8, 6]]),)),
    "lstm": Architecture(seeded(Recurrent), (noise(2, 5, 3),)),
    "gru-cell": Architecture(seeded(UnrolledCell), (noise(2, 5, 3),)),
}

_LATENT = noise(2, 4, 8, 8)
_VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 4,
    "block_out_channels": (4, 8), "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip

DIFFUSERS = {
    "autoencoder-kl": Architecture(seeded(AutoencoderKL, **_VAE), (noise(2, 3, 8, 8),)),
    "vq-model": Architecture(seeded(VQModel, **_VAE, num_vq_embeddings=16), (noise(2, 3, 8, 8),)),
    "autoencoder-tiny": Architecture(
        seeded(
            AutoencoderTiny,
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
        ),
        (noise(2, 3, 8, 8).sigmoid(),),
    ),
    "dit": Architecture(
        seeded(
            DiTTransformer2DModel,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=3,
            norm_num_groups=4,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        (_LATENT, T),
        {"class_labels": torch.tensor([1, 3])},
    ),
    "pixart": Architecture(
        seeded(
            PixArtTransformer2DModel,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=3,
            norm_num_groups=4,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=8,
        ),
        (_LATENT,),
        {
            "encoder_hidden_states": TEXT,
            "timestep": T,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "sd3": Architecture(
        seeded(
            SD3Transformer2DModel,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
        ),
        (_LATENT, TEXT, noise(2, 8, seed=9), T),
    ),
    "transformer-2d": Architecture(
        seeded(
            Transformer2DModel,
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=8,
            num_layers=3,
            norm_num_groups=4,
            cross_attention_dim=8,
        ),
        (noise(2, 8, 8, 8), TEXT),
    ),
    # The features of every resolution are put out, and none is joined to another.
    "controlnet": Architecture(
        seeded(
            ControlNetModel,
            in_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
            conditioning_embedding_out_channels=(4, 4),
        ),
        (_LATENT, T, TEXT, noise(2, 3, 16, 16, seed=9)),
    ),
    # Down to a classifier: the features that the stages put aside are never joined.
    "unet1d-value": Architecture(
        seeded(
            UNet1DModel,
            sample_size=16,
            in_channels=3,
            out_channels=3,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            flip_sin_to_cos=False,
            freq_shift=1.0,
            block_out_channels=(8, 16, 32),
            down_block_types=("DownResnetBlock1D",) * 3,
            up_block_types=(),
            mid_block_type="ValueFunctionMidBlock1D",
            out_block_type="ValueFunction",
            downsample_each_block=True,
            act_fn="mish",
        ),
        (noise(2, 3, 32), T),
    ),
}

WITHOUT = OURS | DIFFUSERS
