import dataclasses
import json
from typing import get_args

import pytest

from stability_probe.runs.run import finite
from stability_probe.verify import Status, Verdict, verdict_table

PUBLIC = {
    "theorem", "claim", "status", "measured", "bound", "slack", "interval", "n", "advice",
}  # fmt: skip


def verdict(**values):
    return Verdict(**{"theorem": "3.4", "run": "cs", "claim": "c", "status": "HOLDS", **values})


def test_statuses_are_the_four_documented_ones():
    assert get_args(Status) == ("HOLDS", "VIOLATED", "ASSUMPTION_UNMET", "INCONCLUSIVE")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"status": "MAYBE"}, r"unknown status 'MAYBE'; it is one of \('HOLDS'"),
        ({"theorem": "3.5"}, r"unknown theorem '3.5'; it is one of \('3.1'"),
        ({"interval": (2.0, 1.0)}, r"interval \(2.0, 1.0\) is upside down"),
        ({"confidence": 0.0}, r"confidence must lie in \(0, 1\), got 0.0"),
        ({"confidence": 95.0}, r"confidence must lie in \(0, 1\), got 95.0"),
    ],
)
def test_invariants(values, message):
    with pytest.raises(ValueError, match=message):
        unchecked(values)


def unchecked(values):
    """A verdict made past the type checker of the tests, as by a caller without one."""
    made = object.__new__(Verdict)
    for name, value in {**vars(verdict()), **values}.items():
        object.__setattr__(made, name, value)
    made.__post_init__()


def test_a_point_is_an_interval():
    assert verdict(interval=(1.0, 1.0)).interval == (1.0, 1.0)


def test_a_verdict_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict().status = "VIOLATED"


@pytest.mark.parametrize(
    ("measured", "bound", "slack"),
    [(2.0, 8.0, 4.0), (4.0, 2.0, 0.5), (None, 8.0, None), (2.0, None, None), (0.0, 8.0, None),
     (2.0, 0.0, 0.0)],
)  # fmt: skip
def test_slack_is_bound_over_measured(measured, bound, slack):
    assert verdict(measured=measured, bound=bound).slack == slack


def test_as_dict_has_the_public_keys_and_four_more():
    row = verdict(measured=2.0, bound=8.0, interval=(0.5, 1.0), n=3, advice="a").as_dict()
    assert set(row) == PUBLIC | {"run", "statistic", "estimate", "confidence"}
    assert row["slack"] == 4.0 and row["interval"] == (0.5, 1.0) and row["n"] == 3


def test_as_dict_goes_into_json_with_null_for_nan():
    nan, inf = float("nan"), float("inf")
    row = verdict(measured=nan, bound=inf, estimate=1.0, interval=(nan, inf)).as_dict()
    read = json.loads(json.dumps(finite(row), allow_nan=False))
    assert (read["measured"], read["bound"], read["slack"]) == (None, None, None)
    assert read["interval"] == [None, None] and read["estimate"] == 1.0


class TestTable:
    def test_has_a_row_a_verdict_by_theorem(self):
        table = verdict_table([verdict(theorem="3.1"), verdict(claim="d", n=7)])
        assert list(table.index) == ["3.1", "3.4"] and table.index.name == "theorem"
        assert list(table.claim) == ["c", "d"] and list(table.n) == [0, 7]

    def test_of_nothing_has_its_columns(self):
        assert "status" in verdict_table([]) and len(verdict_table([])) == 0

    @pytest.mark.parametrize(
        ("number", "text"),
        [(None, "–"), (0.0, "0"), (1.2345, "1.23"), (999.6, "1,000"), (12345.0, "12,300"),
         (2.5e7, "2.5e+07"), (-4321.0, "-4,320"), (float("inf"), "inf")],
    )  # fmt: skip
    def test_numbers_have_three_digits(self, number, text):
        assert verdict_table([verdict(measured=number)]).measured.iloc[0] == text

    def test_an_interval_is_one_text(self):
        assert verdict_table([verdict(interval=(0.25, 1500.0))]).interval.iloc[0] == "0.25 … 1,500"
