"""Models that cannot be probed as they are."""

import pytest
import torch
from torch import nn

from stability_probe import StabilityProbe, TheoryUNet, find_skips
from stability_probe.errors import StabilityProbeError
from stability_probe.probes.refusals import refuse_unfit


class Holder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: Holder(nn.DataParallel(net))])
def test_data_parallel_is_refused_with_advice(wrap):
    net = TheoryUNet(8, 2)
    skips = find_skips(net, torch.ones(1, 8))
    model = wrap(net)
    with (
        pytest.raises(StabilityProbeError, match=r"DataParallel: .*DistributedDataParallel"),
        StabilityProbe(model, skips),
    ):
        pass
    assert not net._forward_hooks


def test_fully_sharded_wrappers_of_the_first_kind_are_refused():
    kind = type("FullyShardedDataParallel", (Holder,), {})
    with pytest.raises(StabilityProbeError, match=r"use torch\.distributed\.fsdp\.fully_shard"):
        refuse_unfit(kind(nn.Linear(1, 1)), 0)


def test_scheduled_measurements_of_sharded_parameters_are_refused():
    net = nn.Linear(2, 2)
    net.weight.to_local = lambda: net.weight.detach()  # as a DTensor has it
    refuse_unfit(net, 0)
    with pytest.raises(StabilityProbeError, match=r"weight is sharded .* got sensitivity_every=7"):
        refuse_unfit(net, 7)


def test_any_other_model_is_fine():
    refuse_unfit(TheoryUNet(8, 2), 100)
