"""Where a change is said to come from, for changes of known origin."""

import re

import pytest

from stability_probe.regression.causes import likely_cause
from stability_probe.regression.compare import compare
from stability_probe.regression.groups import Group


def group(hints=None, **tested):
    """Numbers of three seeds with hardly any spread."""
    jitter = (0.99, 1.0, 1.01)
    return Group(
        "g", {}, {}, "", ["0", "1", "2"],
        {name.replace("__", "."): [value * j for j in jitter] for name, value in tested.items()},
        {name: [value] * 3 for name, value in (hints or {}).items()},
    )  # fmt: skip


def cause(then, now):
    return likely_cause(then, now, compare(then.tested, now.tested))


PLAIN = dict.fromkeys(
    (
        "gain__skip_1", "gain__skip_2", "gain__skip_3", "loss", "energy__h_0", "energy__h_1",
        "energy__h_2", "energy__h_3", "gradient__a_1", "sensitivity__exact", "path__skip_1",
    ), 1.0,
)  # fmt: skip


def test_nothing_worse_has_no_cause():
    assert cause(group(**PLAIN), group(**PLAIN)) == ""


def test_a_skip_that_passes_more():
    now = group(**PLAIN | {"energy__h_0": 3.0, "gain__skip_2": 1.5})
    assert cause(group(**PLAIN), now) == (
        "skips pass more of their features: measured gain of skip 2: 1.5 (was 1)"
    )


def test_many_skips_that_pass_more_are_not_all_listed():
    gains = {f"gain__skip_{i}": 0.5 for i in range(1, 7)}
    now = group(**PLAIN | dict.fromkeys(gains, 1.0))
    assert cause(group(**PLAIN | gains), now).endswith("skip 3: 1 (was 0.5) and 3 more")


@pytest.mark.parametrize(
    ("risen", "text"),
    [
        (
            ("energy__h_0", "energy__h_1"),
            "from h_1 to h_0, with .* look at decoder block b_2, and at the learning rate",
        ),
        (("energy__h_0",), "at h_0, with .* look at decoder block b_1, and at the learning rate"),
        (
            ("energy__h_3", "energy__h_0"),
            "from h_3 to h_0, .* look at the middle or the encoder, and at the learning rate",
        ),
    ],
)
def test_features_that_have_grown_name_the_innermost_block(risen, text):
    found = cause(group(**PLAIN), group(**PLAIN | dict.fromkeys(risen, 4.0)))

    assert re.fullmatch(f"features are larger {text}", found)


def test_features_that_have_shrunk_are_not_as_they_were():
    """As without a normalisation: what is worse is the loss, and the network is another."""
    smaller = {"energy__h_0": 0.1, "energy__h_2": 0.1, "loss": 9.0}
    found = cause(group(**PLAIN), group(**PLAIN | smaller))
    assert found.startswith("features are smaller at h_0, h_2, so that the network itself is ano")


@pytest.mark.parametrize(
    ("risen", "text"),
    [
        (("loss", "gradient__a_1"), "look at the loss, the data and the learning rate"),
        (("sensitivity__exact", "path__skip_1"), "look at the layers on the worst path"),
        (("loss", "sensitivity__exact"), "features are as they were"),
    ],
)
def test_what_rises_without_the_features(risen, text):
    found = cause(group(**PLAIN), group(**PLAIN | dict.fromkeys(risen, 4.0)))
    assert found.endswith(text)


def test_a_run_that_diverged_is_named():
    now = group(**PLAIN)
    now.tested["loss"][1] = float("nan")
    assert cause(group(**PLAIN), now) == "training diverged with seed 1: see its loss"


@pytest.mark.parametrize(
    ("hints", "text"),
    [
        ({"loss.t0": 4.0}, "most at noise-level bin t0, where loss is ×4"),
        ({"sensitivity.exact.t=950": 8.0}, "most at t =950, where sensitivity.exact is ×8"),
    ],
)
def test_the_noise_level_that_stands_out(hints, text):
    flat = {f"loss.t{b}": 1.0 for b in range(4)}
    flat |= {f"sensitivity.exact.t={t}": 1.0 for t in (50, 500, 950)}
    now = group(flat | hints, **PLAIN | {"loss": 3.0})
    assert cause(group(flat, **PLAIN), now).endswith(f"; {text}")


def test_no_noise_level_is_named_where_all_rise_alike():
    flat = {f"loss.t{b}": 1.0 for b in range(4)}
    now = group(dict.fromkeys(flat, 3.0), **PLAIN | {"loss": 3.0})
    assert "most at" not in cause(group(flat, **PLAIN), now)


def test_hints_that_are_not_known_are_passed_over():
    """A bin that no sample fell into is null in the file."""
    then = group({"loss.t0": 1.0, "loss.t1": 1.0}, **PLAIN)
    then.hints["loss.t0"] = [None] * 3
    assert cause(then, group({"loss.t0": 9.0, "loss.t1": 1.0}, **PLAIN | {"loss": 3.0}))
