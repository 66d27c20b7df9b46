"""What `probe` and `suggest` share: the network, its scaling, and samples at noise levels."""

import pytest
import torch
from torch import nn

from stability_probe import StabilityProbeError, TheoryUNet, UViT, UViTConfig
from stability_probe.cli.options import SubjectOptions
from stability_probe.cli.points import PointOptions, measurable, prepare


@pytest.fixture
def uvit(tmp_path):
    config = UViTConfig(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=4, num_heads=2
    )  # fmt: skip
    file = tmp_path / "net.pth"
    torch.save(UViT(config).state_dict(), file)
    return SubjectOptions(file, batch=3, seed=1)


class TestPrepare:
    def test_samples_at_every_noise_level(self, uvit):
        found = prepare(uvit, PointOptions(noise_levels="10,900", sensitive=2))
        assert [p.noise_level for p in found.points] == [10, 900]
        for point, t in zip(found.points, (10, 900), strict=True):
            assert point.batch.x.shape == (3, 1, 8, 8)
            assert point.batch.args[1:] == () and point.batch.sensitive == 2
            (times,) = point.batch.kwargs.values()
            assert times.tolist() == [t] * 3
        assert found.scheme is None
        assert len(found.subject.skips) == 2

    def test_noise_is_that_of_the_schedule(self, uvit):
        """x_t = √ᾱ x_0 + √(1 − ᾱ) ε, both of variance 1 here; late it is another sample."""
        early, late = (p.batch.x for p in prepare(uvit, PointOptions(noise_levels="0,999")).points)
        assert (early - late).norm() > 0.5 * early.norm()

    @pytest.mark.parametrize(
        ("scheme", "name"), [(None, "as found, none is added"), ("cs:0.5", "cs:0.5")]
    )
    def test_the_scaling_is_said(self, uvit, scheme, name, capsys):
        found = prepare(uvit, PointOptions("10", scheme=scheme))
        assert found.notes[-1] == f"scaling: {name}"
        assert f"note: scaling: {name}" in capsys.readouterr().err

    def test_learned_gates_of_the_checkpoint_are_the_scaling(self, tmp_path):
        config = UViTConfig(
            img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=4, num_heads=2
        )  # fmt: skip
        state = UViT(config).state_dict()
        tokens = state["pos_embed"].shape[1]
        state |= {
            "se.layer1.weight": torch.zeros(2, tokens), "se.layer1.bias": torch.zeros(2),
            "se.layer2.weight": torch.zeros(tokens, 2), "se.layer2.bias": torch.zeros(tokens),
        }  # fmt: skip
        file = tmp_path / "ls.pth"
        torch.save(state, file)
        found = prepare(SubjectOptions(file), PointOptions("10"))
        assert found.notes[-1] == "scaling: ls"
        assert found.scheme.coefficients(2) is None
        assert prepare(SubjectOptions(file), PointOptions("10", scheme="cs:0.7")).scheme.name == (
            "cs:0.7"
        )

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            (PointOptions("10", sensitive=0), "--sensitive: must be at least 1, got 0"),
            (PointOptions("1O"), "--noise-levels"),
            (PointOptions("10", scheme="half"), "unknown scheme 'half'"),
        ],
    )
    def test_bad_options(self, uvit, how, message):
        with pytest.raises(StabilityProbeError, match=message):
            prepare(uvit, how)

    def test_a_network_without_long_skips(self, tmp_path):
        file = tmp_path / "net.pt"
        torch.save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict(), file)
        what = SubjectOptions(file, model="tests.cli.test_points:chain", input="4")
        with pytest.raises(StabilityProbeError, match=r"Sequential has no long skips \(N = 0\)"):
            prepare(what, PointOptions())


def chain():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


class TestMeasurable:
    def test_what_a_network_raises_is_one_line(self):
        with (
            pytest.raises(
                StabilityProbeError,
                match=r"^TheoryUNet cannot be measured \(KeyError: .*\); kept in run$",
            ) as caught,
            measurable(TheoryUNet(4, 1), "kept in run"),
        ):
            {}["x"]
        assert isinstance(caught.value.__cause__, KeyError)

    def test_errors_that_say_enough_and_interrupts_pass(self):
        with pytest.raises(StabilityProbeError, match=r"^mine$"), measurable(TheoryUNet(4, 1)):
            raise StabilityProbeError("mine")
        with pytest.raises(KeyboardInterrupt), measurable(TheoryUNet(4, 1)):
            raise KeyboardInterrupt
