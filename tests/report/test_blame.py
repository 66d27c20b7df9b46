import pytest

from stability_probe.report.blame import blame_of
from stability_probe.verify import Evidence
from tests.oracles.evidence import chain, checkpoint, ensemble, relabelled, with_paths, without

SKIPS = [{"source": "conv_in", "sink": "up.1"}, {"source": "", "sink": "up.0"}]


def test_a_training_by_its_last_measurement():
    run = relabelled(with_paths(chain()), skips=SKIPS)
    (found,) = blame_of([run])
    assert found.sentence == (
        "At step 100 most goes through skip 1 (conv_in → up.1): 55 % of the bound."
    )
    assert [way.name for way in found.ways] == ["skip 1", "skip 2", "the middle"]
    assert [way.norm for way in found.ways] == pytest.approx([3, 1.5, 1])
    assert sum(way.bound for way in found.ways) == pytest.approx(1)
    assert [way.kappa for way in found.ways] == [1.0, 0.5, None]
    assert [way.place for way in found.ways] == ["conv_in → up.1", "input → up.0", ""]
    assert {way.worst for way in found.ways} == {None}  # not recorded here


def test_a_checkpoint_by_noise_level():
    (found,) = blame_of([checkpoint(noise_levels=(50.0, 950.0))])
    assert [way.when for way in found.ways] == ["t = 50"] * 3 + ["t = 950"] * 3


def test_a_probe_that_was_killed_after_its_first_noise_level():
    run = checkpoint()
    (found,) = blame_of([Evidence(run.name, run.frame[run.frame.step == 1], run.info)])
    assert {way.when for way in found.ways} == {"t = 50"}


def test_what_goes_around_all_skips_is_a_way_too():
    (found,) = blame_of([with_paths(chain(), around=0.5)])
    assert found.ways[-1].name == "around all skips" and found.ways[-1].norm == 0.5
    assert sum(way.bound for way in found.ways) == pytest.approx(1)


def test_runs_without_paths_are_left_out():
    assert blame_of([chain(), ensemble(5), without(checkpoint(), "path")]) == []
