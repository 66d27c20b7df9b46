"""The order of the data."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from stability_probe.runs.batches import Batches

SIZES = [(1, 1), (5, 5), (8, 4), (10, 4), (7, 6)]


def with_draws(batches, generator, n):
    """Some batches, with as many numbers drawn in between as a step draws."""
    return [
        (next(batches).tolist(), torch.randn(3, generator=generator).tolist()) for _ in range(n)
    ]


def prepared(samples, size, generator):
    """What a prepared shuffling loader gives, epoch after epoch."""
    loader = Accelerator(cpu=True).prepare(
        DataLoader(
            TensorDataset(torch.arange(samples)),
            batch_size=size,
            shuffle=True,
            drop_last=True,
            generator=generator,
        )
    )
    while True:
        for (batch,) in loader:
            yield batch


@pytest.mark.parametrize(("samples", "size"), SIZES)
def test_is_that_of_a_prepared_loader(samples, size):
    mine, theirs = (torch.Generator().manual_seed(4) for _ in range(2))
    expected = with_draws(prepared(samples, size, theirs), theirs, 9)
    assert with_draws(Batches(samples, size, mine), mine, 9) == expected
    assert torch.equal(mine.get_state(), theirs.get_state())


@pytest.mark.parametrize(("samples", "size"), SIZES)
@pytest.mark.parametrize("taken", range(5))
def test_goes_on_from_anywhere(samples, size, taken):
    first, second = torch.Generator().manual_seed(0), torch.Generator().manual_seed(9)
    batches = Batches(samples, size, first)
    with_draws(batches, first, taken)
    state, random = batches.state_dict(), first.get_state()
    expected = with_draws(batches, first, 7)
    again = Batches(samples, size, second)
    with_draws(again, second, 2)
    for _ in range(2):  # and what was taken since has not changed the state
        again.load_state_dict(state)
        second.set_state(random)
        assert with_draws(again, second, 7) == expected


def test_an_epoch_shows_no_sample_twice_and_epochs_differ():
    batches = Batches(10, 4, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(batches), next(batches)]).tolist() for _ in range(20)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert set(itertools.chain(*epochs)) == set(range(10))
