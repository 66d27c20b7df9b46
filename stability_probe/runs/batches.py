"""Endless batches in random order, which can go on from where another process left them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class Batches(Iterator[Int[Tensor, " batch"]]):
    """Numbers of the samples of one batch after another, epoch after epoch.

    An epoch shows no sample twice; the samples that are left over at its end, too few for a batch,
    are not shown in it.

    Args:
        samples: how many samples there are.
        size: of a batch, at most `samples`.
        generator: source of the order, which others may draw from between two batches. What is
            drawn from it, and when, is what a shuffling `DataLoader` draws that `accelerate` has
            prepared, so that a seed means the same batches.

    >>> batches = Batches(5, 2, torch.Generator().manual_seed(0))
    >>> epoch = torch.cat([next(batches), next(batches)])
    >>> len(epoch.unique())
    4
    """

    def __init__(self, samples: int, size: int, generator: torch.Generator) -> None:
        self._samples, self._size, self._generator = samples, size, generator
        self._order = torch.empty(0, dtype=torch.int64)
        self._taken = 0

    def __next__(self) -> Int[Tensor, " batch"]:
        if self._left() == 0:
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)  # workers' seed
            self._order, self._taken = self._permutation(), 0
        batch = self._order[self._taken : self._taken + self._size]
        self._taken += self._size
        if self._left() == 0:
            self._permutation()  # of which a sampler takes the first `samples` % `samples` numbers
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The order of the epoch under way, and how much of it has been shown.

        The generator's state is for its owner to keep.
        """
        return {"order": self._order.clone(), "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another object was when it gave its state."""
        self._order, self._taken = state["order"].clone(), int(state["taken"])

    def _left(self) -> int:
        """Whole batches that the epoch under way has left."""
        return (len(self._order) - self._taken) // self._size

    def _permutation(self) -> Tensor:
        return torch.randperm(self._samples, generator=self._generator)
