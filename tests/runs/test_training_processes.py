"""Training in two processes: the steps of one process with the same batches."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stability_probe import StabilityProbeError, find_skips, scale_skips
from stability_probe.errors import TrainingDiverged
from stability_probe.runs import (
    RecordConfig,
    TrainConfig,
    build_model,
    load_images,
    record_training,
    tracking,
    train,
)
from stability_probe.runs.processes import from_all, join, leave
from stability_probe.runs.recording import seeded_scaling
from stability_probe.runs.training import _share

OPTIONS = {"width": 8, "n_skips": 4, "batch_size": 6, "steps": 5, "warmup": 2, "seed": 3}
CASES = [
    ("theory-unet", "unscaled"), ("theory-unet", "ls"), ("uvit", "ls-non-shared"),
    ("uvit", "uniform:0"), ("unet2d", "cs:0.7"),
]  # fmt: skip


def trained(model, scheme):
    """Losses and noise levels of all processes, and the weights; ten images are under two epochs"""
    config = TrainConfig(model=model, scheme=scheme, **OPTIONS)
    images = load_images("digits")[:10]
    net = build_model(config, images.shape[1:])
    skips = find_skips(net, images[:1], torch.zeros(1).long())
    with scale_skips(net, skips, seeded_scaling(scheme, config.seed)):
        found = {"loss": [], "t": [], "rate": []}
        for step in train(net, images, config):
            assert len(step.loss) == len(step.noise_level) == 6 / join().num_processes
            found["loss"].append(torch.cat(from_all(step.loss)))
            found["t"].append(torch.cat(from_all(step.noise_level)))
            found["rate"].append(step.learning_rate)
        weights = {name: value.clone() for name, value in net.state_dict().items()}
    return {
        name: torch.tensor(v) if name == "rate" else torch.stack(v) for name, v in found.items()
    }, weights


def train_all(file):
    join()
    found = [trained(*case) for case in CASES]
    for _, weights in found:
        for mine in weights.values():
            assert all(torch.equal(mine, other) for other in from_all(mine))
    if torch.distributed.get_rank() == 0:
        torch.save(found, file)
    leave()


@pytest.mark.slow
def test_two_take_the_steps_of_one(forks, tmp_path):
    ended = forks.call(train_all, tmp_path / "found.pt", processes=2)
    assert ended.codes == (0, 0), ended.told
    for case, (found, weights) in zip(CASES, torch.load(tmp_path / "found.pt"), strict=True):
        expected, expected_weights = trained(*case)
        assert torch.equal(found["t"], expected["t"])
        assert torch.equal(found["rate"], expected["rate"])
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
        # AdamW gives every gradient the same size, also those that are nothing but rounding.
        apart = [(weights[n] - w).abs().max() for n, w in expected_weights.items()]
        assert max(apart) < (1e-2 if case[0] == "unet2d" else 1e-5), case


class BreaksForOne(nn.Module):
    """Its third loss is not finite, in the second process alone."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.tensor(1.0)), 0

    def forward(self, x, t):
        self.calls += 1
        broken = self.calls == 3 and torch.distributed.get_rank() == 1
        return self.w * x * (float("nan") if broken else 1.0)


def diverge():
    config = TrainConfig(**{**OPTIONS, "steps": 9})
    join()
    taken = train(BreaksForOne(), load_images("digits"), config)
    finite = []
    with pytest.raises(TrainingDiverged, match="not finite at step 3 of 9"):
        for step in taken:
            finite.append(bool(step.loss.isfinite().all()))
    assert finite == [True, True, torch.distributed.get_rank() == 0]
    assert not taken.finite
    leave()


def test_all_stop_where_one_diverges(forks):
    started = time.monotonic()
    ended = forks.call(diverge, processes=2)
    assert ended.codes == (0, 0), ended.told
    assert time.monotonic() - started < 60


def refuse():
    model = BreaksForOne()
    for size, images in ((5, 9), (6, 3)):  # three images are a batch of three
        config = TrainConfig(**{**OPTIONS, "batch_size": size})
        with pytest.raises(
            StabilityProbeError,
            match=f"multiple of their number 2, got {size if images > 6 else 3}; ",
        ):
            train(model, load_images("digits")[:images], config)
    leave()


def test_a_batch_that_cannot_be_shared_is_refused(forks):
    ended = forks.call(refuse, processes=2)
    assert ended.codes == (0, 0), ended.told


def go_on(file):
    """A state of two processes, and what comes after it, in two again."""
    config = TrainConfig(model="theory-unet", **OPTIONS)
    images = load_images("digits")[:10]
    taken = train(build_model(config, images.shape[1:]), images, config)
    losses = []
    for step in taken:
        losses.append(step.loss)
        if step.step == 2:
            torch.manual_seed(torch.distributed.get_rank())
            state = taken.state_dict()
            if torch.distributed.get_rank() == 0:
                torch.save(state, file)
            from_all(0)
            drawn = torch.rand(1)
    again = train(build_model(config, images.shape[1:]), images, config)
    again.load_state_dict(torch.load(file))
    assert torch.equal(torch.rand(1), drawn)  # every process has its own random numbers
    assert len({x.item() for x in from_all(drawn)}) == 2
    for step in again:
        assert torch.equal(step.loss, losses[step.step - 1])
    assert again.step == 5
    leave()


def test_two_go_on(forks, tmp_path):
    ended = forks.call(go_on, tmp_path / "state.pt", processes=2)
    assert ended.codes == (0, 0), ended.told
    config = TrainConfig(model="theory-unet", **OPTIONS)
    images = load_images("digits")[:10]
    alone = train(build_model(config, images.shape[1:]), images, config)
    alone.load_state_dict(torch.load(tmp_path / "state.pt"))  # one may take over from two
    assert [step.step for step in alone] == [3, 4, 5]


def track(folder):
    """A tracker that cannot be started in the main process is an error in both."""
    config = TrainConfig(model="theory-unet", **OPTIONS)
    rows, probing = [], RecordConfig(sensitivity_every=0)

    def make(run, after):
        assert torch.distributed.get_rank() == 0
        return SimpleNamespace(
            name="wandb", start=list, finish=list, log=lambda values, step: rows.append(step)
        )

    tracking._MADE["wandb"] = make
    record_training(config, folder / "run", probing, track=["wandb"])
    assert rows == ([1, 2, 3, 4, 5] if torch.distributed.get_rank() == 0 else [])
    tracking._MADE["wandb"] = lambda run, after: SimpleNamespace(start=lambda: 1 / 0)
    with pytest.raises(StabilityProbeError, match="wandb cannot be started"):
        record_training(config, folder / "other", probing, track=["wandb"])
    leave()


def test_of_two_the_main_one_tracks(forks, tmp_path):
    ended = forks.call(track, tmp_path, processes=2)
    assert ended.codes == (0, 0), ended.told


@pytest.mark.parametrize(("processes", "size"), [(1, 7), (2, 6), (3, 6), (6, 6)])
def test_shares_are_contiguous_equal_and_all(processes, size):
    samples = torch.arange(size)
    shares = [samples[_share(size, processes, k)] for k in range(processes)]
    assert torch.equal(torch.cat(shares), samples)
    assert {len(share) for share in shares} == {size // processes}
