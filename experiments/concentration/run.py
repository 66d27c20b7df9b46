"""Theorem 3.1's probability statement on random networks of Eq. 4.

    python experiments/concentration/run.py --out DIR [--networks R] [--seed S]

Writes coverage.csv, slopes.csv, by_rho.csv, verdicts.json and concentration.png into DIR. See the
README beside it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stability_probe.plots.concentration import plot_concentration
from stability_probe.runs.concentration import simulated_energies
from stability_probe.theory import feature_energy_law, log_energy_variance
from stability_probe.verify.concentration import concentration_verdict, depth_verdict
from stability_probe.verify.decays import Decays, coverage_table, fit_decays, slopes_by_rho
from stability_probe.verify.verdict import Verdict

WIDTHS = (32, 64, 128, 256, 512, 1024)
DEPTHS = (1, 2, 4, 8, 16)
FEWEST = 500
"""Networks a cell with which every fit has cells to rest on."""
RESAMPLES = 200
"""Resamples that the intervals of the verdict on five numbers of skips need."""
SIDES = ("both", "lower", "upper")
RHOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def simulate(networks: int, seed: int) -> dict[tuple[int, int], np.ndarray]:
    """‖h_i‖²/E‖h_i‖² of unscaled networks with unit-gain blocks, for every width and depth."""
    generator = np.random.default_rng(seed)
    return {
        (m, n): simulated_energies(m, [1.0] * n, networks, generator)
        / feature_energy_law([1.0] * n)
        for n in DEPTHS
        for m in WIDTHS
    }


def slopes_table(table: pd.DataFrame, decays: Decays) -> pd.DataFrame:
    """The fits for every N, beside the derived slope and the slopes of either side alone."""
    slopes = decays.frame()
    slopes["derived"] = [2 / log_energy_variance([1.0] * n).max() for n in slopes.n_skips]
    slopes["slope_times_blocks"] = slopes.slope * (slopes.n_skips + 1)
    for side in SIDES[1:]:
        fits = fit_decays(table, "all", side, resamples=0).frame().set_index("n_skips")
        slopes[f"{side}_side"] = slopes.n_skips.map(fits.slope)
    return slopes


def side_table(table: pd.DataFrame, slopes: pd.DataFrame) -> pd.DataFrame:
    """The slope at every ρ and side, over the derived one of small ρ."""
    derived = slopes.set_index("n_skips").derived
    sides = [slopes_by_rho(table, side=side).assign(side=side) for side in SIDES]
    by_rho = pd.concat(sides, ignore_index=True)
    return by_rho.assign(relative=by_rho.slope / by_rho.n_skips.map(derived))


def describe(verdict: Verdict) -> str:
    """A verdict on one line."""
    number = ""
    if verdict.interval is not None:
        low, high = verdict.interval
        number = f" ({verdict.statistic}: {verdict.estimate:.3g} [{low:.3g}, {high:.3g}])"
    return f"{verdict.status}: {verdict.run}: {verdict.claim}{number}; {verdict.advice}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--networks", type=int, default=50_000, help="networks a cell")
    parser.add_argument("--resamples", type=int, default=1000, help="resamples of the bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.networks < FEWEST:
        parser.error(f"--networks: needs at least {FEWEST}, got {options.networks}")
    if options.resamples < RESAMPLES:
        parser.error(f"--resamples: needs at least {RESAMPLES}, got {options.resamples}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"--out {options.out}: is there already; name another folder")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out {options.out}: cannot be made ({problem.strerror})")
    table = coverage_table(simulate(options.networks, options.seed), RHOS)
    verdicts = []
    for event, name in (("all", "h_0..h_N"), ("h0", "h_0 alone")):
        decays = fit_decays(table, event, resamples=options.resamples)
        verdicts += [concentration_verdict(decays, name), depth_verdict(decays, name)]
        if event == "all":
            slopes = slopes_table(table, decays)
    table.to_csv(options.out / "coverage.csv", index=False)
    slopes.to_csv(options.out / "slopes.csv", index=False)
    text = json.dumps([verdict.as_dict() for verdict in verdicts], indent=1, ensure_ascii=False)
    (options.out / "verdicts.json").write_text(text, encoding="utf-8")
    by_rho = side_table(table, slopes)
    by_rho.to_csv(options.out / "by_rho.csv", index=False)
    plot_concentration(table, slopes, by_rho).savefig(options.out / "concentration.png", dpi=90)
    print(slopes.round(4).to_string(index=False))
    for verdict in verdicts:
        print(describe(verdict))


if __name__ == "__main__":
    main()
