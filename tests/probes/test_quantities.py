"""Energies, gains and cross terms, by hand."""

import pytest
import torch

from stability_probe.probes import Key
from stability_probe.probes.quantities import GRADIENT_NORM, NOISE_LEVEL, NORM, quantities


def merge(level, samples=2, **norms):
    """Norms around a merge; z_i is h_i."""
    given = {"u": 6.0, "ku": 3.0, "h": 4.0, "merged": 7.0} | norms
    return {Key(NORM, s, level, ""): torch.full((samples,), v) for s, v in given.items()}


def shown(found):
    return {(k.metric, k.site, k.level): v.tolist() for k, v in found.items()}


def test_a_merge_by_hand():
    """Half of u passes; 7² - 4² - 3² = 24."""
    assert shown(quantities(merge(2, 1), 1.0)) == {
        ("energy", "u", 2): [36.0], ("energy", "ku", 2): [9.0], ("energy", "h", 2): [16.0],
        ("energy", "z", 2): [16.0], ("energy", "merged", 2): [49.0],
        ("kappa", "skip", 2): [0.5], ("cross", "merge", 2): [24.0],
    }  # fmt: skip


def test_gradients_are_divided_by_the_scale_and_noise_levels_left_out():
    taken = {Key(GRADIENT_NORM, "h", 0, ""): torch.tensor([8.0]), NOISE_LEVEL: torch.ones(1)}
    assert shown(quantities(taken, 4.0)) == {("feature_grad_energy", "h", 0): [4.0]}


def test_the_output_of_the_network_is_no_z():
    found = quantities({Key(NORM, "h", 0, ""): torch.ones(1)}, 1.0)
    assert {k.site for k in found} == {"h"}


@pytest.mark.parametrize("missing", ["u", "ku", "h", "merged", "samples"])
def test_a_merge_that_was_seen_in_part_has_no_gain(missing):
    taken = merge(1)
    if missing == "samples":
        taken[Key(NORM, "u", 1, "")] = torch.ones(1)
    else:
        del taken[Key(NORM, missing, 1, "")]
    assert not {"kappa", "cross"} & {k.metric for k in quantities(taken, 1.0)}


def test_levels_come_in_order_whatever_passed_first():
    found = quantities(merge(3) | merge(1) | merge(2), 1.0)
    assert [k.level for k in found if k.metric == "kappa"] == [1, 2, 3]
