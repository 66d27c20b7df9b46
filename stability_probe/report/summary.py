"""What the verdicts come to, in a sentence or two for somebody who knows none of the theorems."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stability_probe.verify import Evidence, Verdict


def summary(verdicts: Sequence[Verdict], runs: int) -> str:
    """How many claims hold, and how many do not.

    >>> summary([Verdict("3.4", "cs", "chain", "HOLDS")], 1)
    'One run was held against the theorems, with 1 verdict. The claim holds.'
    """
    count = Counter(verdict.status for verdict in verdicts)
    tested = "One run was" if runs == 1 else f"{runs} runs were"
    if not verdicts:
        return f"{tested} looked at, and there was nothing that the theorems could be tested on."
    many = len(verdicts)
    start = f"{tested} held against the theorems, with {many} verdict{'s' * (many > 1)}. "
    if count["HOLDS"] == many:
        return start + ("The claim holds." if many == 1 else "All claims hold.")
    said = [
        f"{count['HOLDS']} hold{'s' * (count['HOLDS'] == 1)}",
        f"{count['VIOLATED']} {'is' if count['VIOLATED'] == 1 else 'are'} violated",
    ]
    if count["INCONCLUSIVE"]:
        said.append(f"{count['INCONCLUSIVE']} could not be decided")
    if count["ASSUMPTION_UNMET"]:
        said.append(f"{count['ASSUMPTION_UNMET']} do{'es' * (count['ASSUMPTION_UNMET'] == 1)} not "
                    "apply, since something that the theorem assumes is not so")  # fmt: skip
    return f"{start}{', '.join(said[:-1])} and {said[-1]}."


@dataclass(frozen=True)
class Finding:
    """A claim that is violated.

    Attributes:
        claim: as the verdicts have it.
        runs: of how many runs.
        of: how many it was tested on.
    """

    claim: str
    runs: int
    of: int


def findings(verdicts: Sequence[Verdict]) -> list[Finding]:
    """The claims that are violated, in the order of the verdicts."""
    tested = Counter(verdict.claim for verdict in verdicts)
    violated = Counter(verdict.claim for verdict in verdicts if verdict.status == "VIOLATED")
    return [Finding(claim, runs, tested[claim]) for claim, runs in violated.items()]


def meaning(verdicts: Sequence[Verdict]) -> str:
    """What to make of it."""
    statuses = {verdict.status for verdict in verdicts}
    if "VIOLATED" in statuses:
        return (
            "Violated means that what was measured contradicts the claim, beyond what chance would "
            "do. The theorems are about networks before training, so that a trained network may "
            "violate one with nothing being broken; but do not rely there on what the theorem says "
            "about scaling skips."
        )
    if "HOLDS" in statuses:
        return (
            "Nothing that was measured contradicts the theorems. Look at the slack before you rely "
            "on a bound: a bound that is thousands of times too large is true and says little."
        )
    return "The advice in the table says what would allow a verdict."


def troubles(evidence: Sequence[Evidence]) -> list[str]:
    """What a reader has to know of runs that did not end as they should have."""
    found = []
    for run in evidence:
        state, reason = run.info.get("state"), run.info.get("reason")
        if state == "failed":
            found.append(f"{run.name}: failed ({reason}). What it recorded before is shown.")
        elif state == "running":
            found.append(f"{run.name}: still running, or killed. What it has recorded is shown.")
        if run.frame.empty:
            found.append(f"{run.name}: has recorded nothing yet.")
        elif run.kind == "training" and not run.n_skips:
            found.append(
                f"{run.name}: no long skips were recorded, which is what the theorems are about."
            )
    return found
