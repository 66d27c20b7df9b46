import pytest

from stability_probe import Verdict
from stability_probe.report.summary import findings, meaning, summary, troubles
from stability_probe.verify import Evidence
from tests.oracles.evidence import relabelled, trace, training


def verdicts(text: str) -> list[Verdict]:
    """One a letter: H, V, A or I."""
    names = {"H": "HOLDS", "V": "VIOLATED", "A": "ASSUMPTION_UNMET", "I": "INCONCLUSIVE"}
    return [Verdict("3.1", f"run {i}", "a claim", names[c]) for i, c in enumerate(text)]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("", "looked at, and there was nothing that the theorems could be tested on."),
        ("H", "with 1 verdict. The claim holds."),
        ("HH", "with 2 verdicts. All claims hold."),
        ("HVV", "with 3 verdicts. 1 holds and 2 are violated."),
        ("HHVI", "2 hold, 1 is violated and 1 could not be decided."),
        ("A", "0 hold, 0 are violated and 1 does not apply, since something that the theorem "
              "assumes is not so."),
        ("AAI", "1 could not be decided and 2 do not apply, since"),
    ],
)  # fmt: skip
def test_the_summary_counts(found, said):
    assert said in summary(verdicts(found), 2)
    assert summary(verdicts(found), 2).startswith("2 runs were ")
    assert summary(verdicts(found), 1).startswith("One run was ")


def test_what_to_make_of_it():
    assert meaning(verdicts("HV")).startswith("Violated means")
    assert "Look at the slack" in meaning(verdicts("HI"))
    assert meaning(verdicts("I")) == meaning([]) != meaning(verdicts("H"))


def test_violated_claims_are_counted_by_run():
    other = Verdict("3.4", "run", "another", "VIOLATED")
    found = [(f.claim, f.runs, f.of) for f in findings([*verdicts("HVVI"), other])]
    assert found == [("a claim", 2, 4), ("another", 1, 1)]
    assert findings(verdicts("HIA")) == []


def test_runs_that_did_not_end_as_they_should():
    failed = relabelled(trace(), state="failed", reason="TrainingDiverged: at step 3")
    said = troubles([failed, relabelled(training(), state="running")])
    assert said[0] == (
        "cs:0.7: failed (TrainingDiverged: at step 3). What it recorded before is shown."
    )
    assert "still running, or killed" in said[1] and "recorded nothing yet" in said[2]
    assert troubles([relabelled(trace(), state="complete")]) == []


def test_a_network_without_skips():
    run = trace()
    bare = Evidence("mine", run.frame[run.frame.metric == "loss"], {"state": "complete"})
    assert "mine: no long skips were recorded" in troubles([bare])[0]
