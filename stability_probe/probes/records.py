"""What a probe records: rows of step, metric, site, level, stat, value.

| metric | site | level | stat | value |
|---|---|---|---|---|
| `energy` | `x` `u` `ku` `z` `merged` `h` `output` | 0, i | `mean` `min` `max`, `t0` ... | ‖·‖² |
| `cross` | `merge` | i | the same | ‖merged‖² − ‖z‖² − ‖κu‖², 2κ⟨z,u⟩ where merges add |
| `kappa` | `skip` | i | the same | measured gain ‖κu‖/‖u‖ |
| `feature_grad_energy` | `h` `u` | i | the same | ‖∂L/∂·‖², L the loss back-propagated |
| `loss` | `loss` | 0 | the same | per-sample loss |
| `samples` | `loss` | 0 | `t0` ... | number of samples in the noise-level bin |
| `skipped` | `optimizer` | 0 | `value` | 1 if a gradient was not finite: a GradScaler skips |
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

The gradient at `u` is of all uses of u_i; where the skip can only be seen as a part of the merged
tensor, it is of that part.

`param_energy` and `feature_grad_energy` are details: they are recorded in one of ten steps
(`ProbeConfig.details_every`).

h_0 is the output of the last decoder block, as h_i is of the others; `output` is what the network
returns, after the layers that read h_0 out. `level` is 0 where a quantity belongs to the whole
network. Means, minima and maxima are over the samples of a step; `s0`, `s1`, ... are the single
samples of the probe batch. Stats `t0`, `t1`, ... are means over the samples whose noise level falls
into that bin of equal width, the least noisy first.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd
from pandas.api.types import union_categoricals

COLUMNS = ("step", "metric", "site", "level", "stat", "value")
"""Columns of a frame of records."""
CATEGORIES = ("metric", "site", "stat")
"""Those of them that hold names."""


Join = Literal["sum", "min", "max", "same"]
"""What a number is over several processes: the sum, least or largest of theirs, or the same."""


class Key(NamedTuple):
    """What a recorded number is: everything of a row but its step and its value."""

    metric: str
    site: str
    level: int
    stat: str


class Column(NamedTuple):
    """A number of every step as it waits to be stored.

    Attributes:
        key: what it is, or `None` if it only serves other columns.
        join: what it is over several processes: the sum, least or largest of theirs, or the `same`
            in all of them.
        weight: the place of the column that this one is divided by at the end; -1 for none.
        how: what is recorded: the `value`; a `count`, if it is not 0; the `mean`, value / weight,
            if the weight is not 0; or the `root`, √(value / weight).
    """

    key: Key | None
    join: Join = "same"
    weight: int = -1
    how: Literal["value", "count", "mean", "root"] = "value"


class Layout:
    """What the columns are of numbers that were taken together.

    Layouts are compared by identity, since every step has one: whoever takes numbers makes the
    layout once.
    """

    order = 2

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self.columns)

    def part(self, steps: list[int], values: npt.NDArray[np.float64]) -> "Part":
        """Numbers (k, columns) of k steps, with what they are."""
        return Part(self, steps, values)

    @cached_property
    def _shown(self) -> npt.NDArray[np.intp]:
        return np.array([i for i, c in enumerate(self.columns) if c.key is not None], dtype=np.intp)

    @cached_property
    def _names(self) -> dict[str, pd.Categorical]:
        """The name of every shown column, by part of the key."""
        keys = [c.key for c in self.columns if c.key is not None]
        return {name: pd.Categorical([getattr(key, name) for key in keys]) for name in CATEGORIES}

    def frame(self, steps: Sequence[int], values: npt.NDArray[np.float64]) -> pd.DataFrame:
        """The records that numbers of several steps are.

        Args:
            steps: the steps, k of them.
            values: (k, columns).
        """
        shown = [self.columns[i] for i in self._shown]
        how = np.array([c.how for c in shown], dtype=str)
        own = values[:, self._shown]
        weights = np.array([c.weight for c in shown], dtype=np.intp)
        weight = np.where(weights < 0, 1.0, values[:, weights])
        with np.errstate(divide="ignore", invalid="ignore"):
            numbers = own / weight
            numbers[:, how == "root"] **= 0.5
        missing = (how == "mean") & (weight == 0) | (how == "count") & (own == 0)
        there, times = ~missing.ravel(), len(steps)
        columns: dict[str, Any] = {"step": np.repeat(np.asarray(steps, dtype=np.int64), len(shown))}
        for name, kinds in self._names.items():
            codes = np.tile(kinds.codes, times)
            columns[name] = pd.Categorical.from_codes(codes, dtype=kinds.dtype)
        columns["level"] = np.tile([c.key.level for c in shown if c.key is not None], times)
        columns["value"] = numbers.ravel()
        frame = pd.DataFrame(columns)[list(COLUMNS)]
        return frame if there.all() else frame[there].reset_index(drop=True)


class Part(NamedTuple):
    """Numbers of several steps off the device.

    Attributes:
        layout: what the columns are.
        steps: the steps, k of them.
        values: (k, columns).
    """

    layout: Layout
    steps: list[int]
    values: npt.NDArray[np.float64]


@runtime_checkable
class Numbered(Protocol):
    """What numbers of a step are while they wait on the device; a `Layout` is one.

    Attributes:
        order: their place among the numbers of a step.
    """

    order: int

    def __len__(self) -> int:
        """How many they are."""
        ...

    def part(self, steps: list[int], values: npt.NDArray[np.float64]) -> Part:
        """What is recorded of the numbers (k, `len`) of k steps, off the device."""
        ...


@runtime_checkable
class RunFolder(Protocol):
    """Where a probe puts its records; `runs.Run` is one."""

    def begin(self, info: Mapping[str, Any]) -> None:
        """Record what is known at the start; refuse a folder with records in it."""
        ...

    def resume(self, step: int) -> None:
        """Go on with a run that stopped: what is recorded after `step` is dropped."""
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


def empty_frame() -> pd.DataFrame:
    """A frame of no records."""
    return pd.DataFrame({name: [] for name in COLUMNS})


def as_frame(parts: Sequence[Part]) -> pd.DataFrame:
    """The records that numbers are, in the order of their steps."""
    frame = joined([part.layout.frame(part.steps, part.values) for part in parts])
    if frame.step.is_monotonic_increasing:
        return frame
    return frame.sort_values("step", kind="stable", ignore_index=True)


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Frames of records one after the other; names stay categories."""
    frames = [frame for frame in frames if not frame.empty]
    if not frames:
        return empty_frame()
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        parts = [frame[name] for frame in frames]
        if name in CATEGORIES:
            named = [part.astype("category").array for part in parts]
            columns[name] = union_categoricals(named)
        else:
            columns[name] = np.concatenate([part.to_numpy() for part in parts])
    return pd.DataFrame(columns)
