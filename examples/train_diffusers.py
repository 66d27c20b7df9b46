"""Train a small UNet2DModel on digits: diffusers' unconditional training script, probed.

    accelerate launch examples/train_diffusers.py --out runs/diffusers --steps 100
    stability-probe verify runs/diffusers/run

What stability_probe adds to such a script is marked with `# probe`.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader, TensorDataset

from stability_probe import (
    Run,
    StabilityProbe,
    StabilityProbeError,
    find_skips,
    log_to,
    scale_skips,
)
from stability_probe.runs import input_moments, load_images, noised_batch
from stability_probe.skips import parse_scaling


def main(args: argparse.Namespace) -> None:
    """Train, and save the pipeline."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.logger,
        project_dir=args.out,
    )
    images = load_images("digits")
    dataset = TensorDataset(images)
    if not 1 <= args.batch_size * accelerator.num_processes <= len(dataset):
        raise StabilityProbeError(
            f"--batch-size {args.batch_size}: there are {len(dataset)} images, and every process "
            "needs a whole batch of them"
        )
    set_seed(args.seed)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    skips = find_skips(model, torch.zeros(1, 1, 8, 8), torch.tensor([0]))  # probe
    scale_skips(model, skips, parse_scaling(args.scheme))  # probe, if skips are to be scaled
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    dataloader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True, drop_last=True)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.steps // 10, num_training_steps=args.steps
    )
    model, optimizer, dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, dataloader, lr_scheduler
    )
    accelerator.init_trackers("logs")
    run = Run(  # probe
        args.out / "run",
        {"scheme": args.scheme, "seed": args.seed},
        about={"input": input_moments(images, noise_scheduler)},
    )
    probing = StabilityProbe(  # probe
        model,
        skips,
        every=args.every,
        run=run,
        batch=noised_batch(images, noise_scheduler),
        on_records=log_to(accelerator),
    )
    global_step, losses = 0, []
    with nullcontext() if args.no_probe else probing as probe:  # probe
        while global_step < args.steps:
            for (clean_images,) in dataloader:
                noise = torch.randn_like(clean_images)
                timesteps = torch.randint(0, 1000, (len(noise),), device=noise.device)
                noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
                with accelerator.accumulate(model):
                    predicted = model(noisy_images, timesteps).sample
                    loss = F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
                    losses.append(loss.detach())
                    accelerator.backward(loss.mean())
                    if accelerator.sync_gradients:
                        if probe is not None:
                            probe.step(loss=torch.cat(losses))  # probe: before clipping
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    global_step += 1
                    mean = torch.cat(losses).mean().item()
                    logs = {"loss": mean, "lr": lr_scheduler.get_last_lr()[0]}
                    accelerator.log(logs, step=global_step)
                    losses.clear()
                    if global_step == args.steps:
                        break
    accelerator.end_training()
    if accelerator.is_main_process:
        pipeline = DDPMPipeline(unet=accelerator.unwrap_model(model), scheduler=noise_scheduler)
        pipeline.save_pretrained(args.out / "pipeline")
        print(f"run: {run.path}\ntracked: {args.out / 'logs'}\npipeline: {args.out / 'pipeline'}")


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Train a small UNet2DModel on digits.")
    parser.add_argument("--out", type=Path, default=Path("runs/diffusers"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scheme", default="cs:0.7", help="as `stability-probe train --scheme`")
    parser.add_argument("--logger", choices=["tensorboard", "wandb"], default="tensorboard")
    parser.add_argument("--every", type=int, default=1, help="record each n-th step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-probe", action="store_true", help="train without the probe")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_args())
    except StabilityProbeError as problem:  # a scheme that is not known, a folder in use
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
