"""Grids: which runs they have, what these are called, and what is refused."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_probe import StabilityProbeError
from stability_probe.probes import ProbeConfig, SensitivityConfig
from stability_probe.runs import Grid, RecordConfig, TrainConfig


def names(grid):
    return [name for name, _ in grid.cells()]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["unscaled", "ls", "cs:0.7", "kappa:1,0.5"]), min_size=1, unique=True),
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=3, unique=True),
)
def test_every_combination_is_a_run_with_a_name_of_its_own(seeds, schemes, rates):
    grid = Grid({"steps": 7}, {"seed": seeds, "scheme": schemes, "learning_rate": rates})
    cells = grid.cells()
    assert [config for _, config in cells] == [
        TrainConfig(steps=7, seed=seed, scheme=scheme, learning_rate=rate)
        for seed in seeds
        for scheme in schemes
        for rate in rates
    ]
    found = {name for name, _ in cells}
    assert len(found) == len(cells)
    assert all(re.fullmatch(r"[\w.+=,-]+", name) for name in found)
    wider = Grid(grid.base, {**grid.axes, "seed": [*seeds, 100]})
    assert found < set(names(wider)), "more values leave the names of the runs as they were"


def test_a_setting_may_be_left_open():
    sizes = [config.patch_size for _, config in Grid({}, {"patch_size": [None, 2]}).cells()]
    assert sizes == [None, 2]


class TestKappa:
    def test_goes_with_the_schemes_that_take_it(self):
        axes = {"scheme": ["unscaled", "cs", "uniform:0.1"], "kappa": [0.5, 0.7]}
        grid = Grid({}, axes)
        assert names(grid) == [
            "scheme=unscaled", "scheme=cs-0.5", "scheme=cs-0.7", "scheme=uniform-0.1",
        ]  # fmt: skip
        assert [grid.values(config) for _, config in grid.cells()] == [
            {"scheme": "unscaled", "kappa": None},
            {"scheme": "cs", "kappa": 0.5},
            {"scheme": "cs", "kappa": 0.7},
            {"scheme": "uniform:0.1", "kappa": None},
        ]

    def test_of_one_scheme(self):
        grid = Grid({"scheme": "uniform"}, {"kappa": [0, 1]})
        assert names(grid) == ["scheme=uniform-0.0", "scheme=uniform-1.0"]
        assert [grid.values(config) for _, config in grid.cells()] == [
            {"kappa": 0.0},
            {"kappa": 1.0},
        ]

    def test_of_all_runs(self):
        grid = Grid({"kappa": 0.9}, {"scheme": ["cs", "ls"]})
        assert [config.scheme for _, config in grid.cells()] == ["cs:0.9", "ls"]
        assert [grid.values(config)["scheme"] for _, config in grid.cells()] == ["cs", "ls"]


def test_a_file(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "base: {model: theory-unet, learning_rate: 1e-3}\n"  # a text, by the letter of YAML 1.1
        "grid: {n_skips: [2, 3], weight_decay: [0, 1e-2]}\n"
        "probing:\n  paths: true\n  probe: {noise_bins: 2, sensitivity: {epsilons: [0.1]}}\n"
        "weights: true\n"
    )
    grid = Grid.from_yaml(file)
    assert names(grid) == [
        f"n_skips={n},weight_decay={decay}" for n in (2, 3) for decay in ("0.0", "0.01")
    ]
    assert grid.cells()[0][1] == TrainConfig(
        model="theory-unet", learning_rate=1e-3, n_skips=2, weight_decay=0.0
    )
    probe = ProbeConfig(noise_bins=2, sensitivity=SensitivityConfig(epsilons=(0.1,)))
    assert grid.record_config() == RecordConfig(paths=True, probe=probe)
    assert grid.weights


SEEDS = {"seed": [0, 1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, {}), "grid: grid: has no axes; give one, such as"),
        (({}, {"seed": []}), "grid: grid.seed: has no values; give some, or leave it out"),
        (({}, {"seed": 3}), r"grid.seed: a list of values is needed, got 3; write \[3\]"),
        (({}, {"seed": "abc"}), "grid.seed: a list of values is needed, got 'abc'"),
        (({}, {"sed": [3]}), "sed: is unknown; choose from scheme, steps, seed, .*, kappa"),
        (({"sed": 3}, SEEDS), "sed: is unknown; choose from"),
        (({"seed": 3}, SEEDS), "grid.seed: is in base as well; take it out of one of them"),
        (({}, {"seed": [3, 4, 3]}), "has the run seed=3 twice; take one of them out"),
        (({}, {"seed": [True]}), "seed: a whole number is needed, got True"),
        (({}, {"seed": [0.5]}), "seed: a whole number is needed, got 0.5"),
        (({}, {"seed": [None]}), "seed: a whole number is needed, got None"),
        (({}, {"patch_size": ["2"]}), "patch_size: a whole number is needed, got '2'"),
        (({}, {"seed": [[1]]}), r"seed: a whole number is needed, got \[1\]"),
        (({}, {"learning_rate": ["fast"]}), "learning_rate: a number is needed, got 'fast'"),
        (({}, {"learning_rate": [10**400]}), "learning_rate must be positive, got inf"),
        (({"data": 3}, SEEDS), "data: a text is needed, got 3"),
        (({"data": "cats"}, SEEDS), "^grid: unknown data 'cats'; choose from"),
        (({"steps": 0}, SEEDS), "^grid: steps must be at least 1, got 0"),
        (({}, {"scheme": ["cs"]}), "a number must follow 'cs'"),
        (({}, {"kappa": [0.5]}), "kappa: no scheme takes it, of None; name one as cs or uniform"),
        (({"kappa": 1}, {"scheme": ["ls", "cs:1"]}), "kappa: no scheme takes it, of ls, cs:1"),
        (({"scheme": "cs"}, {"kappa": ["a"]}), "kappa: a number is needed, got 'a'"),
        (({"scheme": "cs"}, {"kappa": [1, 1.0]}), "has the run scheme=cs-1.0 twice"),
        (({}, {"scheme": ["cs", "cs:0.5"], "kappa": [0.5]}), "the run scheme=cs-0.5 twice"),
        (({}, {"scheme": ["kappa:" + "1," * 99 + "1"]}), "a run would be called .*; use fewer"),
        (({}, SEEDS, {"evry": 1}), "probing.evry: is unknown; choose from every, "),
        (({}, SEEDS, {"paths": 1}), "probing.paths: true or false is needed, got 1"),
        (({}, SEEDS, {"save_every": -1}), "grid: probing: save_every must be at least 0, got -1"),
        (({}, SEEDS, {"probe": 3}), "probing.probe: a mapping is needed, got 3"),
        (({}, SEEDS, {"probe": {"bins": 1}}), "probing.probe.bins: is unknown; choose from"),
        (({}, SEEDS, {"probe": {"noise_bins": 0}}), "noise_bins must be positive, got 0"),
        (
            ({}, SEEDS, {"probe": {"sensitivity": {"epsilons": 0.1}}}),
            "probing.probe.sensitivity.epsilons: a list is needed, got 0.1",
        ),
    ],
)  # fmt: skip
def test_refused(arguments, message):
    with pytest.raises(StabilityProbeError, match=message):
        Grid(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "grid.yaml: cannot be read as YAML"),
        ("grid: {seed: [1", "grid.yaml: cannot be read as YAML"),
        ("\xff".encode("latin-1"), "grid.yaml: cannot be read as YAML"),
        ("", "grid.yaml: a grid is needed, a mapping with the key grid; see docs/sweeps.md"),
        ("base: {}", "a grid is needed"),
        ("[1]", "a grid is needed"),
        ("grid: {seed: [1]}\naxes: {}", "unknown key 'axes'; choose from base, grid, probing, we"),
        ("grid: [seed]", r"grid.yaml: grid: a mapping is needed, got \['seed'\]"),
        ("grid: {seed: [1]}\nweights: 1", "grid.yaml: weights: true or false is needed, got 1"),
        ("grid: {seed: [x]}", "grid.yaml: seed: a whole number is needed, got 'x'"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    file = tmp_path / "grid.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StabilityProbeError, match=message) as caught:
        Grid.from_yaml(file)
    assert "\n" not in str(caught.value)
