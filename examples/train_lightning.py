"""Train a small diffusion UNet on digits with Lightning, probed.

    python examples/train_lightning.py --out runs/lightning --steps 100
    stability-probe verify runs/lightning/run

What stability_probe adds is marked with `# probe`.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from stability_probe import Run, StabilityProbeError, find_skips, scale_skips
from stability_probe.integrations.lightning import StabilityCallback
from stability_probe.runs import input_moments, load_images, noised_batch
from stability_probe.skips import parse_scaling


class Diffusion(LightningModule):
    """Predicts the noise that was added to an image."""

    def __init__(self, scheme: str):
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        skips = find_skips(self.unet, torch.zeros(1, 1, 8, 8), torch.tensor([0]))  # probe
        scale_skips(self.unet, skips, parse_scaling(scheme))  # probe, if skips are to be scaled
        self.schedule = DDPMScheduler(num_train_timesteps=1000)

    def training_step(self, batch, batch_idx):
        (clean,) = batch
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=self.device)
        predicted = self.unet(self.schedule.add_noise(clean, noise, t), t).sample
        losses = (predicted - noise).square().mean(dim=(1, 2, 3))
        self.losses = losses.detach()  # probe: the loss of every sample
        self.log("loss", losses.mean())
        return losses.mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(options: argparse.Namespace) -> None:
    """Train, and save the weights."""
    images = load_images("digits")
    dataset = TensorDataset(images)
    if not 1 <= options.batch_size <= len(images):
        raise StabilityProbeError(
            f"--batch-size {options.batch_size}: there are {len(images)} images, and not one whole "
            "batch of them"
        )
    seed_everything(options.seed)
    network = Diffusion(options.scheme)
    moments = input_moments(images, network.schedule)  # probe
    probe = StabilityCallback(  # probe
        Run(options.out / "run", about={"input": moments}),
        model="unet",
        inputs=(torch.zeros(1, 1, 8, 8), torch.tensor([0])),
        batch=noised_batch(images, network.schedule),
        every=1,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[] if options.no_probe else [probe],
        logger=CSVLogger(options.out, name="", version="log"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(dataset, batch_size=options.batch_size, shuffle=True, drop_last=True)
    trainer.fit(network, loader)
    trainer.save_checkpoint(options.out / "last.ckpt")
    print(f"run: {options.out / 'run'}")


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Train a small diffusion UNet with Lightning.")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scheme", default="cs:0.7", help="as `stability-probe train --scheme`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-probe", action="store_true", help="train without the probe")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_args())
    except StabilityProbeError as problem:  # a scheme that is not known, a folder in use
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
