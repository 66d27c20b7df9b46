"""What waits on the device, and what is made of it at the flush."""

import numpy as np
import pytest
import torch

from stability_probe.probes import Key
from stability_probe.probes.quantities import GRADIENT_NORM, NOISE_LEVEL, NORM, quantities
from stability_probe.probes.summaries import summarise
from stability_probe.probes.waiting import GRAD_SCALE, LOSS, beside, waiting

EDGES = torch.tensor([250.0, 500.0, 750.0], dtype=torch.float64)


def norms(samples, generator):
    """Norms of one merge and of one gradient, and what comes with them."""
    sites = (("u", 1), ("ku", 1), ("h", 1), ("merged", 1), ("x", 0))
    taken = {Key(NORM, *s, ""): torch.rand(samples, generator=generator) for s in sites}
    taken[Key(GRADIENT_NORM, "h", 1, "")] = torch.rand(samples, generator=generator)
    taken[NOISE_LEVEL] = torch.randint(1000, (samples,), generator=generator).float()
    return taken


def rows(part):
    frame = part.layout.frame(part.steps, part.values)
    return {(r.step, r.metric, r.site, r.level, r.stat): r.value for r in frame.itertuples()}


@pytest.mark.parametrize("loss", ["per sample", "one number", "none"])
def test_many_steps_at_once_are_each_step_alone(loss):
    generator = torch.Generator().manual_seed(0)
    steps, all_rows, tables = [3, 7, 20], {}, []
    for step in steps:
        taken = norms(5, generator)
        if loss != "none":
            taken[LOSS] = torch.rand(5 if loss == "per sample" else (), generator=generator)
        taken[GRAD_SCALE] = torch.tensor(float(step))
        kind, values = waiting(taken, 4, 1000.0)
        tables.append(values.double().numpy())
        alone = {k: v.double() for k, v in taken.items()}
        found = quantities(alone, alone[GRAD_SCALE])
        if loss != "none":
            found[LOSS] = alone[LOSS].reshape(-1)
        single = {LOSS} if loss == "one number" else ()
        layout, numbers = summarise(found, alone[NOISE_LEVEL], EDGES, single)
        frame = layout.frame([step], numbers[None].numpy())
        for r in frame.itertuples():
            all_rows[step, r.metric, r.site, r.level, r.stat] = r.value
    together = rows(kind.part(steps, np.stack(tables)))
    assert together == pytest.approx(all_rows, rel=1e-13)
    binned = {stat for _, metric, *_, stat in together if metric == "loss"}
    assert ("t0" in binned) is (loss == "per sample")


def test_by_hand():
    """A merge of norms 3 and 4 into 5 has a cross term of 0; half of u passes; scale 8."""
    taken = {
        Key(NORM, "u", 1, ""): torch.tensor([6.0, 6.0]),
        Key(NORM, "ku", 1, ""): torch.tensor([3.0, 3.0]),
        Key(NORM, "h", 1, ""): torch.tensor([4.0, 4.0]),
        Key(NORM, "merged", 1, ""): torch.tensor([5.0, 7.0]),
        Key(GRADIENT_NORM, "h", 1, ""): torch.tensor([8.0, 16.0]),
        GRAD_SCALE: torch.tensor(8.0),
    }
    kind, values = waiting(taken, 4, 1000.0)
    assert len(kind) == len(values) == 11
    found = rows(kind.part([1], values.double().numpy()[None]))
    of = {key[1:4]: value for key, value in found.items() if key[-1] == "max"}
    assert of == {
        ("energy", "u", 1): 36.0, ("energy", "ku", 1): 9.0, ("energy", "h", 1): 16.0,
        ("energy", "z", 1): 16.0, ("energy", "merged", 1): 49.0, ("kappa", "skip", 1): 0.5,
        ("cross", "merge", 1): 24.0, ("feature_grad_energy", "h", 1): 4.0,
    }  # fmt: skip


def test_steps_alike_wait_in_one_place_and_others_apart():
    generator = torch.Generator().manual_seed(0)

    def kind(samples, bins=4):
        return waiting(norms(samples, generator) | {GRAD_SCALE: torch.ones(())}, bins, 1000.0)[0]

    assert kind(5) is kind(5)
    assert len({kind(5), kind(4), kind(5, bins=2)}) == 3


def test_single_numbers_and_one_sample_are_told_apart():
    scale = {GRAD_SCALE: torch.ones(())}
    x = {Key(NORM, "x", 0, ""): torch.ones(1), NOISE_LEVEL: torch.zeros(1)}
    kinds = [waiting(x | {LOSS: torch.ones(shape)} | scale, 4, 1e3) for shape in ((), (1,))]
    found = [rows(kind.part([1], v.double().numpy()[None])) for kind, v in kinds]
    assert [(1, "loss", "loss", 0, "t0") in rows for rows in found] == [False, True]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (0.1, 0.1),
        (torch.tensor(2.0), 2.0),
        (torch.ones(2, 1, requires_grad=True), [1.0, 1.0]),
        (torch.tensor([3]), [3]),
    ],
)
def test_numbers_beside_others(numbers, expected):
    found = beside(torch.ones(3, dtype=torch.float64), numbers)
    assert (found.tolist(), found.requires_grad) == (expected, False)
    assert found.ndim == (1 if isinstance(expected, list) else 0)
