"""What a probe records: rows of step, metric, site, level, stat, value.

| metric | site | level | stat | value |
|---|---|---|---|---|
| `energy` | `x` `u` `ku` `z` `merged` `h` `output` | 0, i | `mean` `min` `max`, `t0` ... | ‖·‖² |
| `cross` | `merge` | i | the same | ‖merged‖² − ‖z‖² − ‖κu‖², 2κ⟨z,u⟩ where merges add |
| `kappa` | `skip` | i | the same | measured gain ‖κu‖/‖u‖ |
| `feature_grad_energy` | `h` `u` | i | the same | ‖∂L/∂·‖², L the loss back-propagated |
| `loss` | `loss` | 0 | the same | per-sample loss |
| `samples` | `loss` | 0 | `t0` ... | number of samples in the noise-level bin |
| `grad_energy`, `param_energy` | block/parameter | i | `value` | ‖∇W‖², ‖W‖² |
| `update_ratio` | block kind | i | `value` | ‖Δθ‖/‖θ‖ since the last record |
| `secant` | `eps=r` | 0 | `s0` ... per sample | largest ‖Δout‖/ε over directions, ε = r‖x_t‖ |
| `secant_mean` | `eps=r` | 0 | `s0` ... | mean ‖Δout‖/ε over the same directions |
| `secant_worst` | `eps=r` | 0 | `s0` ... | the same from −δ to +δ along the worst direction |
| `sigma_max` | `J` | 0 | `s0` ... | σ_max of the Jacobian, from below |
| `lipschitz` | `a` `b` `mid` `skip` | i | `s0` ... | Jacobian norm of block or skip, from below |
| `path` | `skip` `mid` `around` | i | `s0` ... | κ_i‖P_i‖, ‖P_mid‖, paths around, from below |
| `gate_term` | `skip` | i | `s0` ... | ‖u_i ∂κ_i/∂x‖ of a learned gate, from below |
| `..._upper` | the same | | `s0` ... | upper bounds of these four, certified |
| `gate_bound` | `skip` | i | `s0` ... | ‖u_i‖ ‖∂κ_i/∂x‖, certified |
| `path_share` | as `path` | i | `s0` ... | part of the path in wᵀJv = σ_max; they add up to 1 |
| `path_alignment` | as `path` | i | `s0` ... | ‖κ_i P_i v‖ / ‖κ_i P_i‖, v the worst direction |
| `path_gap` | `J` | 0 | `s0` ... | ‖(J − all paths)ᵀw‖/‖Jᵀw‖ for a random w |
| `sample_loss` | `loss` | 0 | `s0` ... | ℓ_s |
| `sample_energy` | `x` `target` `h` `ku` `z` | i | `s0` ... | ‖x_t‖², ‖h_i‖², ... |
| `sample_kappa` | `skip` | i | `s0` ... | measured gain ‖κu‖/‖u‖ on the probe batch |
| `counterfactual_energy` | `s=r` | i | `s0` ... | ‖h_i‖² with all κ multiplied by r |
| `sample_grad_energy` | `a` `b` | i | `s0` ... | largest ‖∇W_p ℓ_s‖² over the block's weights |

h_0 is the output of the last decoder block, as h_i is of the others; `output` is what the network
returns, after the layers that read h_0 out. `level` is 0 where a quantity belongs to the whole
network. Means, minima and maxima are over the samples of a step; `s0`, `s1`, ... are the single
samples of the probe batch. Stats `t0`, `t1`, ... are means over the samples whose noise level falls
into that bin of equal width, the least noisy first.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

COLUMNS = ("step", "metric", "site", "level", "stat", "value")
"""Columns of a frame of records."""


class Key(NamedTuple):
    """What a recorded number is: everything of a row but its step and its value."""

    metric: str
    site: str
    level: int
    stat: str


@runtime_checkable
class RunFolder(Protocol):
    """Where a probe puts its records; `runs.Run` is one."""

    def begin(self, info: Mapping[str, Any]) -> None:
        """Record what is known at the start; refuse a folder with records in it."""
        ...

    def append(self, frame: pd.DataFrame) -> None:
        """Store records for good."""
        ...

    def end(self, state: str, reason: str | None, info: Mapping[str, Any]) -> None:
        """Record how the run ended."""
        ...

    def records(self) -> pd.DataFrame:
        """All records so far."""
        ...


class RecordBuffer:
    """Recorded numbers that are still on the device, at most a few steps of them.

    >>> buffer = RecordBuffer()
    >>> buffer.add(1, [Key("loss", "loss", 0, "mean")], torch.tensor([0.5]))
    >>> buffer.frame().values.tolist()
    [[1, 'loss', 'loss', 0, 'mean', 0.5]]
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, Sequence[Key], Tensor]] = []

    def __len__(self) -> int:
        """How many steps the numbers are of."""
        return len({step for step, _, _ in self._steps})

    def add(self, step: int, keys: Sequence[Key], values: Tensor) -> None:
        """Keep the numbers of one step: a vector, one entry a key."""
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys for {len(values)} values at step {step}")
        self._steps.append((step, keys, values.detach()))

    def clear(self) -> None:
        """Forget the numbers."""
        self._steps = []

    def frame(self) -> pd.DataFrame:
        """Copy the numbers off the device, as a frame of records."""
        steps = self._steps
        if not steps:
            return empty_frame()
        values = torch.cat([v.double() for _, _, v in steps]).cpu().numpy()
        keys = [key for _, ks, _ in steps for key in ks]
        numbers = np.repeat([s for s, _, _ in steps], [len(ks) for _, ks, _ in steps])
        frame = pd.DataFrame(keys, columns=list(Key._fields))
        frame.insert(0, "step", numbers)
        frame["value"] = values
        return _without_empty_bins(frame)


def empty_frame() -> pd.DataFrame:
    """A frame of no records."""
    return pd.DataFrame({name: [] for name in COLUMNS})


def _without_empty_bins(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop the means of noise-level bins that no sample fell into."""
    counts = frame[(frame.metric == "samples") & (frame.value == 0)]
    if counts.empty:
        return frame
    empty = pd.MultiIndex.from_frame(counts[["step", "stat"]])
    rows = pd.MultiIndex.from_frame(frame[["step", "stat"]])
    return frame[~rows.isin(empty)].reset_index(drop=True)
