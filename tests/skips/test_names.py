"""Schemes by name."""

import pytest
import torch

from stability_probe import StabilityProbeError
from stability_probe.skips import (
    SCHEME_NAMES,
    ConstantScaling,
    FreeU,
    InverseSqrt2,
    LearnableScaling,
    SCTuner,
    Uniform,
    Unscaled,
    parse_scaling,
)
from stability_probe.skips.scaling import FixedScaling
from tests.oracles.skips import skips_of


@pytest.mark.parametrize(
    ("text", "kind", "coefficients"),
    [
        ("kappa:1,0.25", FixedScaling, [1.0, 0.25]),
        ("unscaled", Unscaled, [1.0, 1.0]),
        ("inverse-sqrt2", InverseSqrt2, [2**-0.5] * 2),
        ("uniform:0.3", Uniform, [0.3, 0.3]),
        ("uniform:0", Uniform, [0.0, 0.0]),
        ("cs:0.7", ConstantScaling, [1.0, 0.7]),
        ("cs:1e-1", ConstantScaling, [1.0, 0.1]),
        ("ls", LearnableScaling, None),
        ("ls-non-shared", LearnableScaling, None),
        ("freeu", FreeU, None),
        ("sc-tuner", SCTuner, None),
    ],
)
def test_parse(text, kind, coefficients):
    scheme = parse_scaling(text)
    assert type(scheme) is kind
    assert scheme.coefficients(2) == coefficients
    assert scheme.name == text.replace("1e-1", "0.1")
    assert parse_scaling(scheme.name).name == scheme.name


def test_ls_names_tell_the_two_apart():
    assert parse_scaling("ls").shared
    assert not parse_scaling("ls-non-shared").shared


def test_every_listed_name_parses():
    for name in SCHEME_NAMES:
        parse_scaling(name.replace("KAPPA", "0.5").replace("C", "0.5"))


@pytest.mark.parametrize(
    "text", ["", "freedom", "freeu:1", "CS:0.5", "ls:3", "unscaled:1", ":0.5", "cs=0.5"]
)
def test_parse_rejects_an_unknown_name(text):
    with pytest.raises(
        StabilityProbeError, match=f"unknown scheme '{text}'; choose from {', '.join(SCHEME_NAMES)}"
    ):
        parse_scaling(text)


@pytest.mark.parametrize("text", ["kappa", "kappa:", "kappa:1,,2", "kappa:1;2"])
def test_parse_rejects_a_broken_list_of_numbers(text):
    with pytest.raises(
        StabilityProbeError,
        match=f"scheme '{text}': numbers with commas .* follow 'kappa', as in kappa:1,",
    ):
        parse_scaling(text)


@pytest.mark.parametrize("name", ["cs", "uniform"])
@pytest.mark.parametrize("rest", ["", ":", ":x", ":0.5:2", ":0,5"])
def test_parse_rejects_a_missing_or_broken_number(name, rest):
    with pytest.raises(
        StabilityProbeError,
        match=f"scheme '{name}{rest}': a number must follow '{name}', as in {name}:0.7",
    ):
        parse_scaling(name + rest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cs:0", r"κ must lie in \(0, 1\], got 0"),
        ("cs:nan", r"κ must lie in \(0, 1\], got nan"),
        ("cs:1.5", r"κ must lie in \(0, 1\], got 1.5"),
        ("uniform:-1", "κ must be a finite number ≥ 0, got -1"),
        ("kappa:1,-0.5", r"needs finite numbers ≥ 0, one a skip, got \[1.0, -0.5\]"),
        ("uniform:inf", "κ must be a finite number ≥ 0, got inf"),
    ],
)
def test_parse_rejects_a_number_out_of_range(text, message):
    with pytest.raises(StabilityProbeError, match=message):
        parse_scaling(text)


@pytest.mark.parametrize("name", ["ls", "ls-non-shared", "sc-tuner"])
def test_the_generator_draws_the_weights(name):
    skips = skips_of((8, 4), (8, 4))

    def weights(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        scheme = parse_scaling(name, generator)
        scheme.prepare(skips)
        return torch.cat([p.flatten() for p in scheme.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(weights(None), weights(None))
