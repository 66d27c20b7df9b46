"""The GitHub Action's shell steps, run as they stand in the file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.oracles.seeds import seeded

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())


def steps_run(folder: Path, **inputs: str) -> list[subprocess.CompletedProcess]:
    """The steps that the inputs ask for, until one fails, as the runner takes them."""
    given = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()} | inputs
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = []
    for step in ACTION["runs"]["steps"]:
        condition = step.get("if", "inputs.runs != ''")
        name, unwanted = re.fullmatch(r"inputs\.(\w+) != '(\w*)'", condition).groups()
        if given[name] == unwanted:
            continue
        assert "${{" not in step["run"]  # inputs come as variables, and are no code by accident
        env = {
            name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: given[m[1]], value)
            for name, value in step.get("env", {}).items()
        }
        summary = {"GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "PATH": path}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        environment = {**os.environ, **summary, **env}
        done.append(
            subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        )
        if done[-1].returncode:
            break
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with a baseline, and with runs that are fine and runs that are not."""
    folder = tmp_path_factory.mktemp("checkout")
    seeded(folder / "then", range(2))
    seeded(folder / "runs", range(10, 12))
    seeded(folder / "worse", range(10, 12), {("loss", "loss", 0): 9.0})
    command = ["stability-probe", "baseline", "then", "-o", "stability-baseline.json"]
    command[0] = str(Path(sys.executable).parent / command[0])
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_runs_that_are_fine(checkout):
    (checked,) = steps_run(checkout, runs="runs", install="no", options="--margin 0.2 --all")
    assert checked.returncode == 0, checked.stderr
    assert "energy.h_1" in checked.stdout  # as --all has it
    assert (checkout / "summary.md").read_text().startswith("## Training stability: passed")


@pytest.mark.slow
def test_thresholds_alone_quoted_as_in_a_shell(checkout):
    options = '--require "loss<1e9" --require "theorem_3_4 = HOLDS"'
    (checked,) = steps_run(checkout, runs="runs", install="no", baseline="", options=options)
    assert checked.returncode == 0, checked.stderr
    assert "theorem_3_4 = HOLDS" in checked.stdout


def test_runs_that_are_worse_fail_the_job(checkout):
    (checked,) = steps_run(checkout, runs="worse", install="no", junit="j.xml")
    assert checked.returncode == 1
    assert "loss" in checked.stdout
    assert "<failure" in (checkout / "j.xml").read_text()
    assert "**failed**" in (checkout / "summary.md").read_text()


@pytest.mark.slow
def test_the_command_records_first_and_what_fails_ends_the_job(checkout):
    recorded, checked = steps_run(checkout, runs="made", run="cp -r runs made", install="no")
    assert (recorded.returncode, checked.returncode) == (0, 0)
    (failed,) = steps_run(checkout, runs="made", run="false; true", install="no")
    assert failed.returncode == 1


@pytest.mark.slow
def test_the_package_is_installed_first(checkout):
    """With what pip has to do nothing for; by default it would be the action's own folder."""
    installed, _ = steps_run(checkout, runs="runs", install="pip")
    assert installed.returncode == 0, installed.stderr
    assert '"${INSTALL:-$GITHUB_ACTION_PATH}"' in ACTION["runs"]["steps"][0]["run"]


def test_every_input_is_used_and_described():
    text = (ROOT / "action.yml").read_text()
    for name, spec in ACTION["inputs"].items():
        assert spec["description"]
        assert f"inputs.{name}" in text


def test_the_hook_for_pre_commit_is_a_command_that_there_is():
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    command = [str(Path(sys.executable).parent / "stability-probe"), *hook["entry"].split()[1:]]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--baseline" in done.stdout
