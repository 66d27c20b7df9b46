"""What a long skip connection is."""

from dataclasses import dataclass, field
from typing import Any, Literal

from stability_probe.skips.taps import Tap


class SkipWarning(UserWarning):
    """Something about a model's skips that a person should know; the message says what."""


@dataclass(frozen=True)
class SkipConnection:
    """One long skip: z_{i-1} = b_i(merge(z_i, κ_i u_i)), i = `level` (Eq. 4).

    Attributes:
        level: i, counted from 1, the outermost skip.
        source: dotted path of the module that the encoder feature u_i came out of last; "" is the
            network's input.
        sink: dotted path of the module that reads the merged tensor.
        merge: `"concat"` or `"add"`.
        shape: shape of u_i as it enters the merge, without the batch dimension.
        kappa: the κ_i that the model's own code applies; `None` if u_i is changed in another way.
        feature: where u_i passes in the encoder, before anything is done to it on its way to the
            merge; `None` where u_i is the network's input.
        skip: where u_i passes on its way into the merge, and can be scaled.
        main: where z_i passes on its way into the merge.
        merged: where the merged tensor passes.
        decoded: where h_{i-1}, what b_i makes of it, passes.
    """

    level: int
    source: str
    sink: str
    merge: Literal["concat", "add"]
    shape: tuple[int, ...]
    kappa: float | None
    feature: Tap | None = field(repr=False)
    skip: Tap = field(repr=False)
    main: Tap = field(repr=False)
    merged: Tap = field(repr=False)
    decoded: Tap = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The fields that describe the skip to a reader, ready for JSON."""
        return {
            "level": self.level,
            "source": self.source,
            "sink": self.sink,
            "merge": self.merge,
            "shape": list(self.shape),
            "kappa": self.kappa,
        }
