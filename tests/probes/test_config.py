"""The settings of a probe."""

import pytest

from stability_probe.errors import StabilityProbeError
from stability_probe.probes import ProbeConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_bins", 0),
        ("noise_levels", 0.0),
        ("noise_levels", -1.0),
        ("flush_every", -1),
        ("timeout", 0.0),
    ],
)
def test_a_setting_out_of_range_is_refused(name, value):
    with pytest.raises(StabilityProbeError, match=f"{name} must be positive, got {value}$"):
        ProbeConfig(**{name: value})
