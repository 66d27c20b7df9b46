"""What the README shows runs as it stands, on models and files of the reader's."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from stability_probe import Run, UViT, UViTConfig
from stability_probe.cli import main
from stability_probe.runs import load_images
from tests.checkpoints.saved_files import FACTORY, conv_unet, diffusers_unet, save_export
from tests.oracles.seeds import seeded

README = Path(__file__).parents[1] / "README.md"


def block(language: str, section: str) -> str:
    """The one block of code in a section."""
    text = README.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return str(found)


def batches(channels: int, size: int) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 300, 600, 999])
    shape = (4, channels, size, size)
    return [
        (torch.randn(shape, generator=generator), t, torch.randn(shape, generator=generator))
        for _ in range(3)
    ]


def noised_digits(batches: int) -> dict[str, Any]:
    """What the README's loop calls the reader's own: data, schedule, 200 samples, and a loader."""
    generator = torch.Generator().manual_seed(0)
    images, schedule = load_images("digits"), DDPMScheduler()

    def noised(count: int) -> tuple[torch.Tensor, ...]:
        clean = images[torch.randint(len(images), (count,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (count,), generator=generator)
        return schedule.add_noise(clean, noise, t), t, noise

    x, t, noise = noised(200)
    loader = [noised(8) for _ in range(batches)]
    names = {"images": images, "schedule": schedule, "loader": loader}
    return {**names, "x": x, "t": t, "noise": noise}


@pytest.mark.parametrize("kind", ["uvit", "diffusers"])
def test_probe_your_own_training_loop(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, or changed as its comment says; and it leaves most verdicts decided."""
    monkeypatch.chdir(tmp_path)
    example = block("python", "Probe your own training loop")
    if kind == "uvit":
        model: torch.nn.Module = UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2))
    else:
        model = small_unet()
        example = example.replace("model(x, t)  # of a diffusers model: ", "")
        assert "predicted = model(x, t).sample\n" in example
    exec(example, {"model": model, **noised_digits(batches=25)})
    assert Run.open(tmp_path / "runs/cs").info["state"] == "complete"
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [theorem for theorem, _ in printed] == ["3.1", "3.2", "3.3", "3.3", "3.4"]
    assert ["3.4", "HOLDS"] in printed
    assert sum(status == "INCONCLUSIVE" for _, status in printed) <= 1


def small_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=2,
        block_out_channels=(4, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def test_stabilise_your_own_unet_in_two_lines() -> None:
    model = small_unet()
    x, t, _ = batches(1, 8)[0]
    before = model(x, t).sample
    names = {"model": model, "x": x, "t": t}
    exec(block("python", "Stabilise your own UNet in two lines"), names)
    assert len(names["skips"]) == 4
    assert names["scaled"].kappa == pytest.approx([1, 0.7, 0.49, 0.343])
    assert not torch.allclose(model(x, t).sample, before)
    names["scaled"].remove()
    assert torch.equal(model(x, t).sample, before)


@pytest.mark.filterwarnings("ignore")
def test_probe_any_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command with the reader's paths in place of those shown, on few samples."""
    monkeypatch.chdir(tmp_path)
    diffusers_unet().save_pretrained(tmp_path / "path/to/unet")
    torch.save(UViT(UViTConfig(embed_dim=16, depth=5, num_heads=1)).state_dict(), "uvit.pth")
    save_export(tmp_path)
    save_file(conv_unet().state_dict(), "net.safetensors")
    lines = block("bash", "Probe any checkpoint").splitlines()
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line, comments=True)
        theirs = {"my.package:make_net": FACTORY, "3,32,32": "1,8,8"}
        words = [theirs.get(word, word) for word in words]
        if words[1] == "probe":
            words += ["--batch", "4", "--sensitive", "1"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, (line, capsys.readouterr().err)
    made = sorted(path.name for path in Path("runs").iterdir())
    assert made == ["exported", "net", "unet", "uvit"]
    assert all(len(list(Path("runs", name, "figures").iterdir())) == 5 for name in made)


def test_guard_it_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seeded(tmp_path / "runs")
    lines = block("bash", "Guard it in CI").splitlines()
    assert len(lines) == 3
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, line


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
