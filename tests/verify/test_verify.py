import pytest

from stability_probe import Run, StabilityProbeError, verify
from stability_probe.verify.verify import PER_RUN
from tests.oracles.evidence import (
    INPUT,
    checkpoint,
    complete,
    ensemble,
    gains,
    joined,
    noised_inputs,
    relabelled,
    stored,
    trace,
    training,
)

ONE_RUN = ["3.1", "3.2", "3.3", "3.3", "3.4"]
"""Theorems of the claims that one training run is held against."""
ABOUT_ONE = len(PER_RUN) + 1


def statuses(verdicts):
    return {(v.theorem, v.claim[:10]): v.status for v in verdicts}


def test_a_run_on_which_everything_holds(tmp_path):
    verdicts = verify(stored(complete(), tmp_path / "run"))
    assert [v.theorem for v in verdicts] == ONE_RUN
    assert {v.status for v in verdicts} == {"HOLDS"}
    assert {v.run for v in verdicts} == {"cs:0.7"}


def test_a_frame_says_what_is_missing():
    verdicts = verify(complete().frame)
    assert [v.theorem for v in verdicts] == ONE_RUN
    assert {v.theorem: v.status for v in verdicts} == {
        "3.1": "HOLDS", "3.2": "INCONCLUSIVE", "3.3": "HOLDS", "3.4": "HOLDS",
    }  # fmt: skip
    assert {v.run for v in verdicts} == {"records"}


def test_records_without_scheduled_measurements_are_inconclusive():
    verdicts = verify(trace().frame)
    assert {v.status for v in verdicts} == {"INCONCLUSIVE"}
    assert all(v.advice for v in verdicts)


def test_several_runs_are_compared_as_well(tmp_path):
    kappas = {f"uniform:{k}": (k,) * 3 for k in (0.2, 0.4, 0.6, 0.8, 1.0)}
    runs = [
        stored(complete(scheme, kappa), tmp_path / str(i))
        for i, (scheme, kappa) in enumerate(kappas.items())
    ]
    verdicts = verify(runs)
    theorems = [v.theorem for v in verdicts]
    assert theorems == sorted(theorems)
    assert len(verdicts) == ABOUT_ONE * 5 + 2
    (oscillation,) = (v for v in verdicts if "over training" in v.claim)
    assert (oscillation.status, oscillation.n) == ("INCONCLUSIVE", 5)
    assert "120 orders of these runs can show no p below 0.0029" in oscillation.advice  # α/17
    (lemma,) = (v for v in verdicts if v.theorem == "3.2")
    assert (lemma.status, lemma.run, lemma.n) == ("HOLDS", "5 runs", 100)  # one seed
    bands = [v.run for v in verdicts if "in the band" in v.claim]
    assert bands == ["uniform:1.0", "uniform:0.8", "uniform:0.6", "uniform:0.4", "uniform:0.2"]


def test_ensembles_have_a_claim_of_their_own(tmp_path):
    runs = [stored(ensemble(), tmp_path / "nets"), stored(complete(), tmp_path / "run")]
    verdicts = verify(runs)
    assert [v.theorem for v in verdicts] == ["3.1", *ONE_RUN]
    assert "random networks" in verdicts[0].claim
    assert [v.theorem for v in verify(runs[0])] == ["3.1"]


def test_runs_on_different_inputs_get_a_lemma_each(tmp_path):
    noise = {**INPUT, "mean_alpha_squared": 0.0}
    given = [noised_inputs(), noised_inputs(64.0, input=noise, scheme="unscaled")]
    runs = [stored(e, tmp_path / str(i)) for i, e in enumerate(given)]
    lemmas = [v for v in verify(runs) if v.theorem == "3.2"]
    assert [v.status for v in lemmas] == ["HOLDS", "HOLDS"]
    assert sorted(v.bound for v in lemmas) == pytest.approx([32, 64])


def test_a_run_whose_energies_are_not_finite_is_judged(tmp_path):
    frame = complete().frame
    frame = frame.assign(value=frame.value.where(frame.metric != "sample_energy"))
    verdicts = verify(frame)
    (band,) = (v for v in verdicts if "in the band" in v.claim)
    assert band.status == "ASSUMPTION_UNMET"


def test_a_run_that_only_a_probe_wrote(tmp_path):
    run = Run(tmp_path / "mine")  # no kind, scheme, κ or seed in its run.json
    run.begin({"skips": []})
    run.append(complete().frame)
    verdicts = verify(run)
    assert [v.theorem for v in verdicts] == ONE_RUN
    assert {v.run for v in verdicts} == {"mine"}
    assert {v.status for v in verdicts} == {"HOLDS", "INCONCLUSIVE"}


def test_nothing_to_verify():
    with pytest.raises(StabilityProbeError, match="verify: at least one run is needed, got none"):
        verify([])


def test_a_frame_of_something_else():
    with pytest.raises(StabilityProbeError, match="records need the columns step, metric, site"):
        verify(complete().frame.drop(columns="metric"))


def test_a_run_with_nothing_recorded_yet(tmp_path):
    run = stored(training(input=INPUT), tmp_path / "run")
    assert {v.status for v in verify(run)} == {"INCONCLUSIVE"}


@pytest.mark.parametrize("info", [{"seed": 0}, {}])
def test_runs_of_one_scheme_and_seed(tmp_path, info):
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        runs.append(stored(relabelled(trace(), **info), tmp_path / name / "cs"))
    assert len(verify(runs)) == 2 * ABOUT_ONE + 2


def test_kappa_in_run_json_that_does_not_fit_the_records(tmp_path):
    run = stored(relabelled(complete(), kappa=[1.0]), tmp_path / "run")
    with pytest.raises(StabilityProbeError, match="kappa"):
        verify(run)


def test_verdicts_on_a_run_that_failed_say_so(tmp_path):
    run = stored(complete(), tmp_path / "run")
    run.update({"state": "failed", "reason": "the loss was not finite at step 3"})
    for verdict in verify(run):
        assert verdict.advice.endswith("the run failed: the loss was not finite at step 3")


class TestSeveralClaims:
    def test_alpha_is_shared_by_the_claims_that_are_tested(self, tmp_path):
        runs = [stored(ensemble(), tmp_path / "nets"), stored(complete(), tmp_path / "run")]
        verdicts = verify(runs, alpha=0.1)
        tested = [v for v in verdicts if v.theorem != "3.4"]
        assert [v.status for v in tested] == ["HOLDS"] * 5
        law, band, lemma, slope, bound = (v.confidence for v in tested)
        assert law == pytest.approx(1 - 0.1 / 5 / 2)  # slope and intercept share it
        assert lemma == pytest.approx(1 - 0.1 / 5)
        assert band == slope == bound == pytest.approx(1 - 2 * 0.1 / 5)

    def test_claims_without_records_take_no_part(self):
        (lemma,) = (v for v in verify(noised_inputs().frame) if v.theorem == "3.2")
        assert lemma.confidence is None  # a bare frame: no claim is tested at all

    def test_a_claim_alone_has_all_of_alpha(self, tmp_path):
        (verdict, *_) = (
            v for v in verify(stored(noised_inputs(), tmp_path / "r")) if v.theorem == "3.2"
        )
        assert verdict.confidence == pytest.approx(0.95)

    def test_more_claims_widen_the_intervals(self, tmp_path):
        runs = [stored(ensemble(seed=s), tmp_path / f"{s}" / "cs") for s in range(4)]
        alone, among = verify(runs[0])[0], verify(runs)
        (same,) = (v for v in among if v.estimate == alone.estimate)
        assert same.interval[0] < alone.interval[0] < alone.interval[1] < same.interval[1]

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 5.0, float("nan")])
    def test_alpha_out_of_range(self, alpha):
        with pytest.raises(StabilityProbeError, match=r"alpha is the rate of false alarms, in"):
            verify(complete().frame, alpha=alpha)


class TestSchemesWithoutKappa:
    """What scales u_i is no multiplication by a number: the theorems do not speak of it."""

    WHY = "its gain depends on frequency"

    def test_every_claim_about_one_run_is_unmet_with_its_numbers(self, tmp_path):
        run = relabelled(complete(), unmet=self.WHY)
        measured = {v.claim: v for v in verify(stored(complete(), tmp_path / "met"))}
        verdicts = verify(stored(run, tmp_path / "unmet"))
        unmet = [v for v in verdicts if v.theorem != "3.2"]
        assert [v.theorem for v in unmet] == ["3.1", "3.3", "3.3", "3.4"]
        for v in unmet:
            assert v.status == "ASSUMPTION_UNMET"
            assert v.advice.startswith(
                "its gain depends on frequency; measured gains 1 (1..1), 0.7 (0.7..0.7), 0.49 (0."
            )
            same = measured[v.claim]
            assert (v.measured, v.bound, v.estimate) == (same.measured, same.bound, same.estimate)
            assert v.interval is not None

    def test_the_lemma_does_not_depend_on_the_scheme(self, tmp_path):
        verdicts = verify(stored(relabelled(complete(), unmet=self.WHY), tmp_path / "run"))
        (lemma,) = (v for v in verdicts if v.theorem == "3.2")
        assert (lemma.status, lemma.confidence) == ("HOLDS", pytest.approx(0.95))  # alone at risk

    @pytest.mark.parametrize("evidence", [ensemble(), checkpoint()])
    def test_ensembles_and_checkpoints(self, tmp_path, evidence):
        verdicts = verify(stored(relabelled(evidence, unmet=self.WHY), tmp_path / "run"))
        assert {v.status for v in verdicts} == {"ASSUMPTION_UNMET"}

    def test_spread_of_the_gains(self, tmp_path):
        run = joined(training(gains((1.0, 0.5), (1, 2), spread=0.2), unmet=self.WHY))
        (verdict, *_) = verify(stored(relabelled(run, kappa=None), tmp_path / "run"))
        assert "measured gains 1 (0.8..1.2), 0.5 (0.4..0.6)" in verdict.advice

    def test_no_gains(self, tmp_path):
        run = relabelled(training(unmet=self.WHY), kappa=[1.0])
        (verdict, *_) = verify(stored(run, tmp_path / "run"))
        assert "no gains were measured" in verdict.advice
