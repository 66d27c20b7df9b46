"""How tight each level of Theorem 3.4's hierarchy is, on random and trained networks.

    python benchmarks/tightness.py

For every network and noise level the means over samples of the measured secants, σ_max(J) and its
certified bounds, and the ratio pathwise / exact at the worst sample. Printed as Markdown.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from stability_probe import StabilityProbeError, TheoryUNet, find_skips, scale_skips
from stability_probe.probes import ProbeBatch, SensitivityConfig, SensitivityProbe
from stability_probe.probes.buffer import RecordBuffer
from stability_probe.probes.certified import certified_constants
from stability_probe.probes.summaries import per_sample
from stability_probe.runs import TrainConfig, build_model, load_images, train
from stability_probe.runs.training import noise_scheduler
from stability_probe.skips import parse_scaling
from stability_probe.theory import max_block_gain, robustness_bound
from stability_probe.verify import Evidence
from stability_probe.verify.robustness import robustness_chain

LEVELS, SAMPLES = (50, 500, 950), 6


@dataclass(frozen=True)
class Subject:
    """A network, clean samples for it, and the scheme that it was trained with."""

    name: str
    net: nn.Module
    images: Tensor
    scheme: str = "unscaled"


def trained(name: str, config: TrainConfig) -> Subject:
    """A network of a configuration, trained under its scheme."""
    images = load_images(config.data)
    net = build_model(config, images.shape[1:])
    if config.steps > 1:
        skips = find_skips(net, images[:1], torch.zeros(1))
        with scale_skips(net, skips, parse_scaling(config.scheme)):
            for _ in train(net, images, config):
                pass
    return Subject(name, net.eval(), images[:SAMPLES], config.scheme)


def subjects() -> list[Subject]:
    """The networks."""
    gaussian = torch.randn(SAMPLES, 128, generator=torch.Generator().manual_seed(0))
    uvit = partial(TrainConfig, n_skips=6, width=64, steps=400)
    unet = partial(TrainConfig, model="unet2d", n_skips=6, width=32, batch_size=32, steps=200)
    return [
        Subject("TheoryUNet, random, add", TheoryUNet(128, 4), gaussian),
        Subject("TheoryUNet, random, concat", TheoryUNet(128, 4, merge="concat"), gaussian),
        Subject("TheoryUNet, random, CS(0.7)", TheoryUNet(128, 4), gaussian, "cs:0.7"),
        trained("TheoryUNet, trained", TrainConfig(model="theory-unet", n_skips=4, steps=400)),
        trained("U-ViT, random", uvit(steps=1)),
        trained("U-ViT, trained", uvit()),
        trained("U-ViT, 12 skips, trained", uvit(n_skips=12)),
        trained("U-ViT, CS(0.7), trained", uvit(scheme="cs:0.7")),
        trained("UNet2DModel, random", unet(steps=1)),
        trained("UNet2DModel, trained", unet()),
        trained("UNet2DModel, CS(0.7), trained", unet(scheme="cs:0.7")),
    ]


def rows(subject: Subject) -> list[str]:
    """A row a noise level."""
    alphas = noise_scheduler(TrainConfig()).alphas_cumprod
    found = []
    levels = (None,) if isinstance(subject.net, TheoryUNet) and subject.images.ndim == 2 else LEVELS
    for t in levels:
        noise = torch.randn(subject.images.shape, generator=torch.Generator().manual_seed(1))
        signal = 0.0 if t is None else float(alphas[t])
        x = signal**0.5 * subject.images + (1 - signal) ** 0.5 * noise
        batch = ProbeBatch((x, torch.full((SAMPLES,), t or 0)), sensitive=SAMPLES)
        skips = find_skips(subject.net, *batch.head(1).args)
        scheme = parse_scaling(subject.scheme)
        with scale_skips(subject.net, skips, scheme) as scaled:
            probe = SensitivityProbe(subject.net, skips, {}, batch, SensitivityConfig(paths=True))
            buffer = RecordBuffer()
            buffer.add(1, *per_sample(probe.measure()))
            kappa = scaled.kappa or []
            try:
                c = certified_constants(subject.net, skips, batch)
                m0 = max_block_gain(np.array(c.lip_a), np.array(c.lip_b))
                certified = f"{float(robustness_bound(kappa, m0, c.l0)):.2g}"
            except StabilityProbeError:
                certified = "none"
        chain = robustness_chain(Evidence("e", buffer.frame(), {"kappa": kappa}))
        assert chain is not None and chain.upper.pathwise is not None
        means = (chain.random, chain.secant, chain.exact, chain.upper.pathwise,
                 chain.upper.blockwise, chain.upper.paper)  # fmt: skip
        worst = np.nanmax(chain.upper.pathwise / chain.exact)  # NaN: a sample without sensitivity
        where = "–" if t is None else str(t)
        numbers = " | ".join(f"{v.mean():.3g}" for v in means)
        found.append(
            f"| {subject.name} | {where} | {numbers} | {certified} | {worst:.2f} | "
            f"{np.nanmax(chain.gap):.0e} |"
        )
    return found


def main() -> None:
    """Print the table."""
    print("| network | t | random | worst direction | σ_max | pathwise | blockwise | paper |"
          " paper, global constants | pathwise / σ_max, worst sample | gap |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for subject in subjects():
        for row in rows(subject):
            print(row, flush=True)


if __name__ == "__main__":
    main()
