"""How often verdicts err, as a table: simulated records, judged by the real verdict functions.

    python -m benchmarks.error_rates [REPLICATIONS]

Prints a line for every case and writes the table into `docs/error-rates.md`, between the marks.
`tests/oracles/simulation.py` says how records are drawn.
"""

import sys
import time
from pathlib import Path

from tests.oracles.simulation import CASES, Case, Rates, simulate

REPLICATIONS, SEED = 1000, 2023
PAGE = Path(__file__).parent.parent / "docs" / "error-rates.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
HEAD = (
    "| claim | state | units | drawn | VIOLATED, % | HOLDS, % | INCONCLUSIVE, % | width |\n"
    "|---|---|---|---|---|---|---|---|"
)


def row(case: Case, rates: Rates) -> str:
    """A line of the table: shares in percent, with their 95 % intervals."""
    shares = []
    for status in ("VIOLATED", "HOLDS", "INCONCLUSIVE"):
        share, low, high = (100 * x for x in rates.rate(status))
        shares.append(f"{share:.1f} [{low:.1f}, {high:.1f}]")
    cells = [case.claim, f"{case.state}: {case.truth}", str(case.n), str(rates.replications)]
    return "| " + " | ".join([*cells, *shares, f"{rates.width:.3g}"]) + " |"


def main() -> None:
    """Simulate all cases and write the table."""
    replications = int(sys.argv[1]) if len(sys.argv) > 1 else REPLICATIONS
    started, lines = time.process_time(), []
    for case in CASES:  # what is clear needs no precision
        drawn = replications // 4 if case.state == "clear" else replications
        lines.append(row(case, simulate(case, drawn, SEED)))
        print(lines[-1], flush=True)
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text("\n".join([before + BEGIN, "", HEAD, *lines, "", END + after]))
    print(f"{time.process_time() - started:.0f} s of processor time")


if __name__ == "__main__":
    main()
