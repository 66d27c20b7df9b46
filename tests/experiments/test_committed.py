"""What is committed of the experiments is whole, and says one thing everywhere."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from experiments import claims_table
from experiments.__main__ import HERE, claims, configuration
from experiments.examination import MARKS, results
from experiments.studies import SCALES, grid_file
from stability_probe.runs import build_model, load_images
from stability_probe.runs.grid import Grid

README = HERE.parent / "README.md"


def verdict(claim):
    return json.loads((HERE / claim / "verdict.json").read_text())


def made_part(page: Path, name: str) -> str:
    begin, end = (mark.format(name) for mark in MARKS)
    return page.read_text().partition(begin)[2].partition(end)[0].strip("\n")


def test_every_claim_has_a_folder_and_the_other_way_round():
    assert {path.parent.name for path in HERE.glob("*/claim.py")} == set(claims())
    pages = re.findall(r"\((\w+)/README.md\)", (HERE / "README.md").read_text())
    assert set(pages) == {*claims(), "concentration"}


@pytest.mark.parametrize("claim", claims())
def test_a_claims_results_are_whole(claim):
    found, config = verdict(claim), configuration(claim)
    assert (found["title"], found["claim"]) == (config["title"], config["claim"])
    for name in ("results.csv", *(f"{figure}.png" for figure in found["figures"])):
        assert (HERE / claim / name).stat().st_size > 100
    count = Counter(finding["verdict"] for finding in found["findings"])
    if len(count) == 1:
        assert found["verdict"] == next(iter(count))
    else:
        assert f"({count['REPRODUCED']} of {len(found['findings'])}; " in found["verdict"]
    assert all(finding["n"] >= 5 for finding in found["findings"])


@pytest.mark.parametrize("claim", claims())
def test_its_page_says_what_its_verdict_says(claim):
    page = HERE / claim / "README.md"
    assert made_part(page, "results") == results(verdict(claim))
    prose = re.sub(r"<!-- results: begin.*end -->", "", page.read_text(), flags=re.DOTALL)
    assert len(prose.split()) > 60, "a page says how it was asked and what to make of it"


def test_the_readme_has_the_table_of_claims():
    assert made_part(README, "claims") == claims_table.table(HERE, claims())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("claim", [claim for claim in claims() if claim != "cost"])
def test_its_grids_can_be_run_over_five_seeds(claim, scale):
    for name in configuration(claim)["grids"][scale]:
        grid = Grid.from_yaml(grid_file(name, scale))
        assert len({config.seed for _, config in grid.cells()}) >= 5


def test_the_network_at_scale_gpu_is_u_vit_s_2():
    """44 million parameters, as published: depth 13, width 512, patches of 2 pixels at 32×32."""
    _, config = Grid.from_yaml(grid_file("photos-uvit", "gpu")).cells()[0]
    model = build_model(config, load_images(config.data).shape[1:])
    assert config.precision == "bf16"
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(44e6, rel=0.02)
