"""What a long skip connection is."""

from dataclasses import dataclass, field
from typing import Any, Literal

from stability_probe.skips.taps import ArgumentTap, SliceTap, Tap


@dataclass(frozen=True)
class SkipConnection:
    """One long skip: z_{i-1} = b_i(merge(z_i, κ_i u_i)), i = `level` (Eq. 4).

    Attributes:
        level: i, counted from 1, the outermost skip.
        source: dotted path of the module whose output is the encoder feature u_i.
        sink: dotted path of the module that reads the merged tensor.
        merge: `"concat"` or `"add"`.
        shape: shape of u_i without the batch dimension.
        block: dotted path of the last module of the decoder block b_i; its output is h_{i-1}.
        skip: where u_i passes on its way into the merge, and can be scaled.
        main: where z_i passes on its way into the merge.
        merged: where the merged tensor passes.
    """

    level: int
    source: str
    sink: str
    merge: Literal["concat", "add"]
    shape: tuple[int, ...]
    block: str = field(repr=False)
    skip: Tap = field(repr=False)
    main: ArgumentTap | SliceTap = field(repr=False)
    merged: ArgumentTap = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The fields that describe the skip to a reader, ready for JSON."""
        return {
            "level": self.level,
            "source": self.source,
            "sink": self.sink,
            "merge": self.merge,
            "shape": list(self.shape),
        }
