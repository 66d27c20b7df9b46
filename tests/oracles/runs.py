"""Records to put into run folders."""

import pandas as pd

from stability_probe.probes import COLUMNS


def rows(*steps: int, value: float = 1.0) -> pd.DataFrame:
    """Two records a step."""
    return pd.DataFrame(
        [(s, m, "loss", 0, "mean", value) for s in steps for m in ("loss", "energy")],
        columns=list(COLUMNS),
    )
