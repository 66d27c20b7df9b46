"""The README's example runs as it stands, on a model and a loader of the reader's."""

import re
from pathlib import Path

import pytest
import torch

from stability_probe import Run, UViT, UViTConfig

README = Path(__file__).parents[1] / "README.md"


def test_the_example_records_a_run_and_prints_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([0, 300, 600, 999]))
        for _ in range(3)
    ]
    loader = [(x, t, torch.randn(x.shape, generator=generator)) for x, t in batches]
    model = UViT(UViTConfig(embed_dim=16, depth=5, num_heads=2))
    x, t, _ = loader[0]
    exec(example, {"torch": torch, "model": model, "loader": loader, "x": x, "t": t})
    assert Run.open(tmp_path / "runs/cs").info["state"] == "complete"
    assert "3.4 HOLDS" in capsys.readouterr().out


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
