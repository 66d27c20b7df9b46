"""Energies of parameters and gradients, and relative updates."""

import pytest
import torch
from torch import nn

from stability_probe import TheoryUNet
from stability_probe.probes.gradients import ParameterProbe
from stability_probe.probes.records import as_frame
from stability_probe.skips import Block, parameter_blocks
from tests.oracles.recording import assert_rows, block_of, expected_parameters, output_of


def blocks_of(net, case):
    return parameter_blocks(net, case.skips(net), *case.data(2)[:2])


def frame_of(layout, values):
    """The numbers of one step as a frame."""
    return as_frame([layout.part([1], values[None].double().numpy())])


def backward(net, case, scale=1.0, seed=0):
    x, t, target = case.data(4, seed)
    (scale * (output_of(net, x, t) - target).square().mean()).backward()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_energies_are_those_of_each_tensor(case, scale):
    net = case.net()
    probe = ParameterProbe(net, blocks_of(net, case), updates=False)
    backward(net, case, scale)
    expected = expected_parameters(net, scale)
    assert len(expected) == 2 * len(list(net.parameters()))
    assert_rows(frame_of(*probe.read(scale)), expected, rtol=1e-5)


def test_reading_leaves_parameters_and_gradients(cases):
    net = cases["uvit"].net()
    probe = ParameterProbe(net, blocks_of(net, cases["uvit"]), updates=True)
    backward(net, cases["uvit"])
    before = [v.clone() for p in net.parameters() for v in (p.detach(), p.grad)]
    probe.read(4.0)
    after = [v for p in net.parameters() for v in (p.detach(), p.grad)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_unused_parameter_has_gradient_zero_and_a_frozen_one_none(cases):
    case = cases["add"]
    net = case.net()
    net.unused = nn.Linear(3, 3)
    net.middle.layer1.weight.requires_grad_(False)
    probe = ParameterProbe(net, blocks_of(net, case), updates=True)
    backward(net, case)
    frame = frame_of(*probe.read(1.0))
    found = frame.set_index(["metric", "site"]).value
    assert found["grad_energy", "other/unused.weight"] == 0
    assert found["grad_energy", "other/unused.bias"] == 0
    assert found["param_energy", "other/unused.weight"] > 0
    assert found["grad_energy", "mid/middle.layer2.weight"] > 0
    assert not frame.site.str.contains("middle.layer1").any()


def test_before_any_backward_pass_every_gradient_is_zero(cases):
    net = cases["add"].net()
    frame = frame_of(*ParameterProbe(net, blocks_of(net, cases["add"]), updates=True).read(1.0))
    assert set(frame[frame.metric == "grad_energy"].value) == {0.0}
    assert (frame[frame.metric == "param_energy"].value > 0).all()


@pytest.mark.parametrize(
    ("dtype", "kept", "value", "rtol"),
    [
        (torch.float16, torch.float32, 3000.0, 1e-4),  # whose norm no float16 holds
        (torch.bfloat16, torch.float32, 1.5, 1e-4),
        (torch.float64, torch.float64, 1 + 1e-9, 1e-12),
    ],
)
def test_norms_are_in_float32_at_least(dtype, kept, value, rtol):
    net = TheoryUNet(64, 1).to(dtype)
    for p in net.parameters():
        p.data.fill_(value)
        p.grad = torch.full_like(p, value)
    blocks = dict.fromkeys((name for name, _ in net.named_parameters()), Block("other"))
    layout, values = ParameterProbe(net, blocks, updates=True).read(1.0)
    assert values.dtype == kept
    exact = 64 * 64 * torch.tensor(value, dtype=dtype).double().item() ** 2
    for row in frame_of(layout, values).itertuples():
        expected = 0.0 if row.metric in ("update_ratio", "skipped") else exact
        assert row.value == pytest.approx(expected, rel=rtol, abs=0)


def test_nan_gradients_are_nan_and_no_others(cases):
    case = cases["add"]
    net = case.net()
    probe = ParameterProbe(net, blocks_of(net, case), updates=False)
    backward(net, case)
    net.encoder[1].layer1.weight.grad[0, 0] = float("nan")
    frame = frame_of(*probe.read(1.0))
    bad = frame[frame.value.isna()]
    assert bad[["metric", "site", "level"]].values.tolist() == [
        ["grad_energy", "a/encoder.1.layer1.weight", 2]
    ]


def test_updates_are_relative_to_the_last_reading_and_by_block(case):
    net = case.net()
    probe = ParameterProbe(net, blocks_of(net, case), updates=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)

    def updates():
        frame = frame_of(*probe.read(1.0))
        frame = frame[frame.metric == "update_ratio"]
        rows = zip(frame.site, frame.level, strict=True)
        found = dict(zip(rows, frame.value, strict=True))
        assert len(found) == len(frame)
        return found

    def copy():
        return {name: p.detach().double().clone() for name, p in net.named_parameters()}

    backward(net, case)
    start = updates()
    assert set(start) == {block_of(net, name) for name, _ in net.named_parameters()}
    assert set(start.values()) == {0.0}  # nothing has moved yet
    for steps in (1, 3):
        before = copy()
        for seed in range(steps):
            optimizer.zero_grad()
            backward(net, case, seed=seed)
            optimizer.step()
        now, found = copy(), updates()
        for block, ratio in found.items():
            mine = [name for name in now if block_of(net, name) == block]
            moved = sum((now[name] - before[name]).square().sum() for name in mine)
            size = sum(now[name].square().sum() for name in mine)
            assert ratio == pytest.approx((moved / size).sqrt().item(), rel=1e-4), block
            assert ratio > 0


@pytest.mark.parametrize("updates", [False, True])
def test_updates_are_measured_when_asked_for(updates):
    net = TheoryUNet(4, 1)
    blocks = dict.fromkeys((name for name, _ in net.named_parameters()), Block("other"))
    net(torch.ones(2, 4)).sum().backward()
    frame = frame_of(*ParameterProbe(net, blocks, updates).read(None))
    assert len(frame) == 2 * 6 + updates
    assert ("update_ratio" in set(frame.metric)) is updates


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_gradient_that_is_not_finite_marks_the_step_where_a_scaler_skips_it(cases, bad):
    case = cases["add"]
    net = case.net()
    probe = ParameterProbe(net, blocks_of(net, case), updates=False)
    backward(net, case, scale=4.0)
    if bad is not None:
        net.encoder[1].layer1.weight.grad[0, 0] = bad
    for scale in (1.0, 4.0, torch.tensor(4.0)):
        rows = frame_of(*probe.read(scale)).query("metric == 'skipped'")
        assert rows[["site", "level", "value"]].values.tolist() == [
            ["optimizer", 0, bad is not None]
        ]
    assert "skipped" not in set(frame_of(*probe.read(None)).metric)


def test_a_scaled_gradient_whose_square_no_float_holds_is_unscaled_first():
    net = nn.Linear(1, 1, bias=False)
    net.weight.grad = torch.full((1, 1), 1e25)
    probe = ParameterProbe(net, {"weight": Block("other")}, updates=False)
    found = frame_of(*probe.read(1e10)).query("metric == 'grad_energy'").value.item()
    assert found == pytest.approx(1e30)


def test_gradients_of_an_embedding_may_be_sparse():
    found = []
    for sparse in (False, True):
        net = nn.Embedding(9, 3, sparse=sparse)
        net.weight.data.fill_(1.0)
        net(torch.tensor([1, 1, 4])).square().sum().backward()
        probe = ParameterProbe(net, {"weight": Block("other")}, updates=False)
        found.append(frame_of(*probe.read(None)).value.tolist())
    assert found[0] == found[1] == pytest.approx([3 * 4.0**2 + 3 * 2.0**2, 27.0])


def test_unfreezing_one_parameter_leaves_the_updates_of_the_others(cases):
    net = cases["add"].net()
    frozen = net.encoder[0].layer1.weight.requires_grad_(False)
    probe = ParameterProbe(net, blocks_of(net, cases["add"]), updates=True)
    probe.read(None)
    with torch.no_grad():
        for p in net.parameters():
            p *= 1.5
    frozen.requires_grad_(True)
    rows = (
        frame_of(*probe.read(None)).query("metric == 'update_ratio'").set_index(["site", "level"])
    )
    assert rows.value["mid", 0] == pytest.approx(1 / 3)
    assert 0 < rows.value["a", 1] < 1 / 3  # it was not followed before


def test_the_state_carries_where_parameters_were(cases):
    """Updates go on from the last reading, in another probe too."""
    net = cases["add"].net()
    blocks = blocks_of(net, cases["add"])
    first = ParameterProbe(net, blocks, updates=True)
    first.read(None)
    state = first.state_dict()
    with torch.no_grad():
        for p in net.parameters():
            p *= 1.5
    second = ParameterProbe(net, blocks, updates=True)
    second.load_state_dict(state)
    for probe in (first, second):
        rows = frame_of(*probe.read(None)).query("metric == 'update_ratio'")
        assert rows.value.to_list() == pytest.approx([1 / 3] * len(rows))


def test_a_model_without_trained_parameters_has_no_rows():
    net = TheoryUNet(4, 1).requires_grad_(False)
    for model, blocks in ((net, {}), (nn.ReLU(), {})):
        layout, values = ParameterProbe(model, blocks, updates=True).read(1.0)
        assert len(layout) == values.numel() == 0
