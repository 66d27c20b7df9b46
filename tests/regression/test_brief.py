"""A brief training of any network."""

import pytest
import torch
from torch import nn

from stability_probe import TheoryUNet
from stability_probe.errors import StabilityProbeError
from stability_probe.probes import StabilityProbe
from stability_probe.regression import brief, measures_of
from stability_probe.regression.brief import BriefTraining, brief_group, held_against
from stability_probe.skips import find_skips
from stability_probe.verify import Evidence

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
QUICK = BriefTraining(steps=4, sensitivity=False)


def net(n_skips=2):
    generator = torch.Generator().manual_seed(torch.randint(2**31, ()).item())
    return TheoryUNet(8, n_skips, unit_gain=True, generator=generator)


def test_numbers_are_those_of_the_same_training_by_hand():
    torch.manual_seed(3)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with StabilityProbe(model, find_skips(model, X), every=1, sensitivity_every=0) as probe:
        for _ in range(4):
            losses = (model(X) - X).square().mean(1)
            losses.mean().backward()
            probe.step(loss=losses)
            optimizer.step()
            optimizer.zero_grad()
    expected = measures_of(Evidence("by hand", probe.frame()))
    training = BriefTraining(4, learning_rate=1e-2, sensitivity=False)
    found = brief_group(net, (X,), [3], training)
    assert {k: v[0] for k, v in found.tested.items()} == pytest.approx(expected.tested)
    assert {k: v[0] for k, v in found.hints.items()} == pytest.approx(expected.hints)


def test_a_seed_is_always_the_same_and_another_is_not():
    one, again = (brief_group(net, (X,), [0, 1], QUICK) for _ in range(2))
    assert one == again
    by_chance = {name: v for name, v in one.tested.items() if not name.startswith("gain")}
    assert all(len(set(values)) == 2 for values in by_chance.values())


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    brief_group(net, (X,), [0], QUICK)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_steps_the_fresh_network_is_measured():
    found = brief_group(net, (X,), [0], BriefTraining(steps=0))
    assert not any(name.startswith("oscillation") for name in found.tested)
    assert {"loss", "energy.h_0", "sensitivity.exact", "path.skip_1"} <= set(found.tested)


def test_another_loss():
    found = brief_group(net, (X,), [0], BriefTraining(0, lambda out, x: out.abs().mean(1) + 7))
    assert found.tested["loss"][0] > 7


def test_an_output_of_another_shape_is_to_be_zero():
    wide = brief.reconstruction(torch.full((2, 3), 2.0), torch.ones(2, 5))
    assert wide.tolist() == [4.0, 4.0]
    assert brief.reconstruction(torch.ones(2, 3), torch.ones(2, 3)).tolist() == [0.0, 0.0]


def test_a_network_that_diverges_has_numbers_that_are_not_finite():
    found = brief_group(net, (X,), [0], BriefTraining(12, learning_rate=1e20, sensitivity=False))
    assert not torch.tensor(found.tested["loss"]).isfinite().all()


def test_what_has_to_be_the_same_and_what_may_differ(tmp_path):
    group = brief_group(net, (X,), [0, 1], QUICK)
    file = tmp_path / "b.json"
    held_against(file, group, 0.1, update=True)
    deeper = brief_group(lambda: net(3), (X,), [0, 1], QUICK)
    with pytest.raises(StabilityProbeError, match="n_skips is 2 and 3"):
        held_against(file, deeper, 0.1)
    with pytest.raises(StabilityProbeError, match="inputs 1 1 is 8 and 4"):
        held_against(file, brief_group(net, (X[:4],), [0, 1], QUICK), 0.1)
    wider = brief_group(lambda: nn.Sequential(net(), nn.Linear(8, 8)), (X,), [0, 1], QUICK)
    notes = held_against(file, wider, 0.1).groups[0].notes
    assert any(note.startswith("not as in the baseline: parameters is ") for note in notes)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((net, (X,), [], QUICK), "needs seeds, each once, got .."),
        ((net, (X,), [1, 1], QUICK), r"needs seeds, each once, got .1, 1."),
        ((lambda: TheoryUNet(8, 2), (X,), [0, 1], QUICK), "every seed gave the same numbers"),
        ((lambda: nn.Linear(8, 8), (X,), [0], QUICK), "Linear has no long skips; is it the whole"),
    ],
)
def test_refused(arguments, match):
    with pytest.raises(StabilityProbeError, match=match):
        brief_group(*arguments)


@pytest.mark.parametrize("setting", [{"steps": -1}, {"learning_rate": 0.0}])
def test_settings_out_of_range(setting):
    with pytest.raises(StabilityProbeError, match="train_steps must be at least 0 and learning_r"):
        BriefTraining(**setting)
