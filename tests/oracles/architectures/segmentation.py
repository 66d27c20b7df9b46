"""Hand-written UNets of image analysis: segmentation, registration, restoration."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.architectures.architecture import Architecture, noise, seeded
from tests.oracles.architectures.layers import ConvBlock, ResBlock, up


class LinkNet(nn.Module):
    """Residual encoder stages; the decoder adds the encoder's features in the root's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.encoder1 = nn.Sequential(ResBlock(4, 4, 2), ResBlock(4, 4))
        self.encoder2 = nn.Sequential(ResBlock(4, 8, 2), ResBlock(8, 8))
        self.encoder3 = nn.Sequential(ResBlock(8, 12, 2), ResBlock(12, 12))
        self.decoder3 = self._decoder(12, 8)
        self.decoder2 = self._decoder(8, 4)
        self.decoder1 = self._decoder(4, 4)
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def _decoder(self, fan_in: int, fan_out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(fan_in, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, fan_out, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.encoder1(self.stem(x))
        e2 = self.encoder2(e1)
        e3 = self.encoder3(e2)
        d3 = self.decoder3(e3) + e2
        d2 = self.decoder2(d3) + e1
        return self.head(self.decoder1(d2))


class UnpaddedUNet3d(nn.Module):
    """The original UNet in 3-D: convolutions without padding, skips cropped to the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = self._block(1, 2), self._block(2, 4)
        self.bottom = self._block(4, 8)
        self.pool = nn.MaxPool3d(2)
        self.up2, self.dec2 = nn.ConvTranspose3d(8, 4, 2, stride=2), self._block(8, 4)
        self.up1, self.dec1 = nn.ConvTranspose3d(4, 2, 2, stride=2), self._block(4, 2)
        self.head = nn.Conv3d(2, 1, 1)

    def _block(self, fan_in: int, fan_out: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(fan_in, fan_out, 3), nn.ReLU())

    @staticmethod
    def _crop(u: Tensor, like: Tensor) -> Tensor:
        start = (u.shape[2] - like.shape[2]) // 2
        part = slice(start, start + like.shape[2])
        return u[:, :, part, part, part]

    def forward(self, x: Tensor) -> Tensor:
        u1 = self.enc1(x)
        u2 = self.enc2(self.pool(u1))
        z = self.up2(self.bottom(self.pool(u2)))
        z = self.up1(self.dec2(torch.cat([self._crop(u2, z), z], dim=1)))
        z = self.dec1(torch.cat([self._crop(u1, z), z], dim=1))
        return self.head(z)


class PadUp(nn.Module):
    """Upsample, pad to the skip's size, concatenate (the skip first), convolve."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = ConvBlock(fan_in, fan_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        dh, dw = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [dw // 2, dw - dw // 2, dh // 2, dh - dh // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class OddSizesUNet(nn.Module):
    """inc, down, up, outc, for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = ConvBlock(1, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), ConvBlock(4, 8))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), ConvBlock(8, 8))
        self.up1, self.up2 = PadUp(16, 4), PadUp(8, 4)
        self.outc = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


class UNet1d(nn.Module):
    """Wave-U-Net: strided slices down, linear interpolation up; functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv1d(1, 4, 5, padding=2), nn.Conv1d(4, 6, 5, padding=2)])
        self.middle = nn.Conv1d(6, 8, 5, padding=2)
        self.up = nn.ModuleList([nn.Conv1d(14, 6, 5, padding=2), nn.Conv1d(10, 4, 5, padding=2)])
        self.out = nn.Conv1d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for conv in self.down:
            x = F.leaky_relu(conv(x))
            skips.append(x)
            x = x[:, :, ::2]
        x = F.leaky_relu(self.middle(x))
        for conv in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="linear")
            x = F.leaky_relu(conv(torch.cat([x, skips.pop()], dim=1)))
        return self.out(x).tanh()


class Gate(nn.Module):
    """u α, with α from u and the decoder's coarser signal."""

    def __init__(self, width: int, signal: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(width, 4, 2, stride=2, bias=False)
        self.phi = nn.Conv2d(signal, 4, 1)
        self.psi = nn.Conv2d(4, 1, 1)

    def forward(self, u: Tensor, signal: Tensor) -> Tensor:
        alpha = torch.sigmoid(self.psi(F.relu(self.theta(u) + self.phi(signal))))
        return u * up(alpha)


class AttentionUNet(nn.Module):
    """Attention U-Net: the skips are gated by the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.bottom = ConvBlock(1, 4), ConvBlock(4, 8), ConvBlock(8, 8)
        self.pool = nn.MaxPool2d(2)
        self.gate2, self.gate1 = Gate(8, 8), Gate(4, 4)
        self.dec2, self.dec1 = ConvBlock(16, 4), ConvBlock(8, 4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        u1 = self.enc1(x)
        u2 = self.enc2(self.pool(u1))
        z2 = self.bottom(self.pool(u2))
        z1 = self.dec2(torch.cat([self.gate2(u2, z2), up(z2)], dim=1))
        return self.head(self.dec1(torch.cat([self.gate1(u1, z1), up(z1)], dim=1)))


class ResNetEncoder(nn.Module):
    """A ResNet that returns its features, finest first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True)
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(ResBlock(4, 4), ResBlock(4, 4))
        self.layer2 = nn.Sequential(ResBlock(4, 8, 2), ResBlock(8, 8))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [x, self.stem(x)]
        features.append(self.layer1(self.maxpool(features[-1])))
        features.append(self.layer2(features[-1]))
        return features


class SkipDecoderBlock(nn.Module):
    """forward(x, skip): upsample, concatenate if there is a skip, two convolutions."""

    def __init__(self, fan_in: int, skip: int, fan_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBlock(fan_in + skip, fan_out), ConvBlock(fan_out, fan_out)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = up(x)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


class SkipDecoder(nn.Module):
    """Takes all features of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [SkipDecoderBlock(8, 4, 6), SkipDecoderBlock(6, 4, 4), SkipDecoderBlock(4, 0, 4)]
        )

    def forward(self, *features: Tensor) -> Tensor:
        x, *skips = features[:0:-1]
        for i, block in enumerate(self.blocks):
            x = block(x, skips[i] if i < len(skips) else None)
        return x


class ResNetUNet(nn.Module):
    """An encoder module that returns a list, a decoder module that takes it, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = ResNetEncoder(), SkipDecoder()
        self.segmentation_head = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.segmentation_head(self.decoder(*self.encoder(x)))


class VoxelMorph(nn.Module):
    """Registration: the finest skip is the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._conv(2, 4, 2), self._conv(4, 6, 2), self._conv(6, 6, 2)])
        self.up = nn.ModuleList([self._conv(6, 6), self._conv(12, 6), self._conv(10, 6)])
        self.last = self._conv(8, 4)
        self.flow = nn.Conv2d(4, 2, 3, padding=1)

    def _conv(self, fan_in: int, fan_out: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1), nn.LeakyReLU(0.2)
        )

    def forward(self, x: Tensor) -> Tensor:
        encoded = [x]
        for layer in self.down:
            encoded.append(layer(encoded[-1]))
        x = encoded.pop()
        for layer in self.up:
            x = torch.cat([up(layer(x)), encoded.pop()], dim=1)
        return self.flow(self.last(x))


SEGMENTATION = {
    "linknet": Architecture(
        seeded(LinkNet),
        (noise(2, 1, 16, 16),),
        skips=(
            ("encoder1", "decoder1", "add", (4, 8, 8)),
            ("encoder2", "decoder2", "add", (8, 4, 4)),
        ),
    ),
    "unpadded-3d": Architecture(
        seeded(UnpaddedUNet3d),
        (noise(2, 1, 22, 22, 22),),
        skips=(
            ("enc1", "dec1", "concat", (2, 4, 4, 4)),
            ("enc2", "dec2", "concat", (4, 4, 4, 4)),
        ),
    ),
    "odd-sizes": Architecture(
        seeded(OddSizesUNet),
        (noise(2, 1, 15, 15),),
        skips=(
            ("inc", "up2.conv", "concat", (4, 15, 15)),
            ("down1", "up1.conv", "concat", (8, 7, 7)),
        ),
    ),
    "unet-1d": Architecture(
        seeded(UNet1d),
        (noise(2, 1, 16),),
        skips=(
            ("down.0", "up.1", "concat", (4, 16)),
            ("down.1", "up.0", "concat", (6, 8)),
        ),
    ),
    # What is joined is u α; u itself is the output of the encoder's block.
    "attention-unet": Architecture(
        seeded(AttentionUNet),
        (noise(2, 1, 16, 16),),
        skips=(
            ("enc1", "dec1", "concat", (4, 16, 16)),
            ("enc2", "dec2", "concat", (8, 8, 8)),
        ),
    ),
    "resnet-unet": Architecture(
        seeded(ResNetUNet),
        (noise(2, 1, 16, 16),),
        skips=(
            ("encoder.stem", "decoder.blocks.1.conv1", "concat", (4, 8, 8)),
            ("encoder.layer1", "decoder.blocks.0.conv1", "concat", (4, 4, 4)),
        ),
    ),
    "voxelmorph": Architecture(
        seeded(VoxelMorph),
        (noise(2, 2, 16, 16),),
        skips=(
            ("", "last", "concat", (2, 16, 16)),
            ("down.0", "up.2", "concat", (4, 8, 8)),
            ("down.1", "up.1", "concat", (6, 4, 4)),
        ),
    ),
}
