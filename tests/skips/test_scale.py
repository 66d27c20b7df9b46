import copy
import dataclasses
import pickle

import pytest
import torch

from stability_probe import (
    ConstantScaling,
    InverseSqrt2,
    LearnableScaling,
    StabilityProbeError,
    TheoryUNet,
    Uniform,
    Unscaled,
    find_skips,
    scale_skips,
)
from stability_probe.skips import ArgumentTap, SCTuner
from tests.oracles.architectures import ZOO
from tests.oracles.eq4 import eq4_features
from tests.oracles.unet2d import unet2d_forward
from tests.oracles.uvit import uvit_forward
from tests.oracles.zoo import CASES, T, X, hook_count, randomise, unet2d

SCHEMES = {
    "unscaled": Unscaled,
    "inverse-sqrt2": InverseSqrt2,
    "uniform": lambda: Uniform(0.3),
    "cs": lambda: ConstantScaling(0.7),
    "ls": LearnableScaling,
    "ls-non-shared": lambda: LearnableScaling(shared=False),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
learnable = pytest.mark.parametrize("shared", [True, False], ids=["shared", "non-shared"])
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def scaled(case, scheme, seed=3):
    """(model, handle, skips) with a scheme at work; gates have large random weights."""
    model = case.build().eval()
    skips = find_skips(model, *case.args)
    handle = scale_skips(model, skips, scheme)
    randomise(scheme, seed, std=1.0)
    return model, handle, skips


def set_bias(scheme, layer, bias):
    """Give every bias of a layer of every gate one value; a huge one in `layer2` saturates it."""
    with torch.no_grad():
        for name, p in scheme.named_parameters():
            if name.endswith(f"{layer}.bias"):
                p.fill_(bias)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def reference(name, model, kappa):
    """The output of a model whose skip i is multiplied by kappa[i - 1], computed apart."""
    if name.startswith("theory"):
        concat = name.endswith("concat")
        return eq4_features(model.state_dict(), X.flatten(1), kappa, concat=concat)[0].view_as(X)
    if name == "uvit":
        n = len(kappa)
        return uvit_forward(
            model.state_dict(), X, T, heads=2, scale=lambda j, skip: kappa[n - 1 - j] * skip
        )
    return unet2d_forward(model, X, T, kappa)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scheme", ["unscaled", "inverse-sqrt2", "uniform", "cs"])
@torch.no_grad()
def test_each_level_is_multiplied_by_its_own_coefficient(name, scheme):
    case = CASES[name]
    model, handle, skips = scaled(case, SCHEMES[scheme]())
    expected = {
        "unscaled": [1.0] * 6,
        "inverse-sqrt2": [0.5**0.5] * 6,
        "uniform": [0.3] * 6,
        "cs": [1.0, 0.7, 0.49, 0.343],
    }[scheme][: len(skips)]
    assert handle.kappa == pytest.approx(expected)
    assert handle.scheme.name.startswith(scheme)
    actual = case.run(model)
    handle.remove()
    torch.testing.assert_close(actual, reference(name, model, expected), rtol=1e-4, atol=1e-5)


@cases
@pytest.mark.parametrize("level", [1, 2])
@torch.no_grad()
def test_one_level_at_a_time(case, level):
    """Scaling a subset of the skips touches that subset alone."""
    model = case.build().eval()
    name = next(name for name, c in CASES.items() if c is case)
    skips = find_skips(model, *case.args)
    kappa = [0.2 if s.level == level else 1.0 for s in skips]
    with scale_skips(model, [s for s in skips if s.level == level], Uniform(0.2)):
        actual = case.run(model)
    torch.testing.assert_close(actual, reference(name, model, kappa), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, case.run(model), atol=1e-4)


# ── κ = 1 and κ = 0 ──────────────────────────────────────────────────────────────────────────────

ONES = {
    "unscaled": Unscaled,
    "uniform": lambda: Uniform(1.0),
    "cs": lambda: ConstantScaling(1.0),
    "ls": LearnableScaling,
    "ls-non-shared": lambda: LearnableScaling(shared=False),
}


@cases
@training
@pytest.mark.parametrize("scheme", ONES.values(), ids=ONES)
@torch.no_grad()
def test_one_is_bitwise_identity(case, training, scheme):
    model, handle, _ = scaled(case, scheme())
    model.train(training)
    set_bias(handle.scheme, "layer2", 1e4)  # gates of exactly 1, where there are gates
    actual = case.run(model)
    handle.remove()
    assert torch.equal(actual, case.run(model))


ZEROS = {name: ONES[name] for name in ("ls", "ls-non-shared")} | {"uniform": lambda: Uniform(0.0)}


def perturb(model, skips, level):
    """Change u_i on its way into the merge, before anything scales it."""
    noise = torch.Generator().manual_seed(level)
    tap = skips[level - 1].skip
    return tap.attach(
        model, lambda u: u + torch.randn(u.shape, generator=noise, dtype=u.dtype), first=True
    )


@cases
@training
@pytest.mark.parametrize("scheme", ZEROS.values(), ids=ZEROS)
@torch.no_grad()
def test_zero_makes_the_output_independent_of_every_skip(case, training, scheme):
    model, handle, skips = scaled(case, scheme())
    model.train(training)
    set_bias(handle.scheme, "layer2", -1e4)  # gates of exactly 0
    before = case.run(model)
    for skip in skips:
        perturbation = perturb(model, skips, skip.level)
        assert torch.equal(case.run(model), before)
        perturbation.remove()
    assert torch.isfinite(before).all()


@cases
@schemes
@torch.no_grad()
def test_other_coefficients_do_not(case, scheme):
    """The power of the test above: each skip matters under every scheme that keeps it."""
    model, _, skips = scaled(case, scheme())
    before = case.run(model)
    for skip in skips:
        perturbation = perturb(model, skips, skip.level)
        assert not torch.equal(case.run(model), before)
        perturbation.remove()


@cases
@schemes
@torch.no_grad()
def test_training_and_evaluation_are_scaled_alike(case, scheme):
    """None of these models has a layer that the mode changes, but for rounding."""
    model, _, _ = scaled(case, scheme())
    trained, evaluated = case.run(model.train()), case.run(model.eval())
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dropout_draws_are_not_disturbed():
    case = dataclasses.replace(CASES["unet2d"], build=lambda: unet2d(dropout=0.5))
    model, handle, _ = scaled(case, Unscaled())
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(case.run(model.train()))
        handle.remove()
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], case.run(model.eval()))


# ── gradients ────────────────────────────────────────────────────────────────────────────────────


@cases
@learnable
def test_gate_gradients_against_finite_differences(case, shared):
    model = case.build().double()
    scheme = LearnableScaling(shared=shared)
    args = tuple(a.double() if a.is_floating_point() else a for a in case.args)
    scale_skips(model, find_skips(model, *args), scheme)
    randomise(scheme, seed=3)
    set_bias(scheme, "layer1", 3.0)  # hidden units are alive, and away from their corner
    parameters = list(scheme.parameters())
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(X.shape, generator=generator, dtype=torch.float64)

    def loss():
        return (case.run(model, *args) * weight).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    assert all(g.abs().max() > 0 for g in gradients)
    eps = 1e-6
    for p, g in zip(parameters, gradients, strict=True):
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        sides = []
        with torch.no_grad():
            for sign in (1, -1):
                p.add_(sign * eps * direction)
                sides.append(loss())
                p.sub_(sign * eps * direction)
        difference = (sides[0] - sides[1]) / (2 * eps)
        torch.testing.assert_close((g * direction).sum(), difference, rtol=1e-5, atol=1e-7)


@cases
@schemes
def test_gradients_reach_every_parameter_that_they_reached_before(case, scheme):
    model, handle, _ = scaled(case, scheme())

    def reached():
        model.zero_grad()
        case.run(model).square().mean().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    with_scaling = reached()
    assert {f"se.{name}" for name, _ in handle.scheme.named_parameters()} <= with_scaling
    handle.remove()
    assert {name for name in with_scaling if not name.startswith("se.")} == reached()


def test_gates_train_with_the_model():
    case = CASES["uvit"]
    model, handle, _ = scaled(case, LearnableScaling())
    set_bias(handle.scheme, "layer1", 10.0)
    before = [p.detach().clone() for p in handle.scheme.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    case.run(model).square().mean().backward()
    optimizer.step()
    assert all(
        not torch.equal(a, b) for a, b in zip(before, handle.scheme.parameters(), strict=True)
    )


# ── taking it out ────────────────────────────────────────────────────────────────────────────────


@cases
@schemes
@torch.no_grad()
def test_removal_restores_the_model(case, scheme):
    model = case.build().eval()
    before, keys = case.run(model), list(model.state_dict())
    skips = find_skips(model, *case.args)
    with scale_skips(model, skips, scheme()) as handle:
        if scheme is not Unscaled:
            assert not torch.equal(case.run(model), before)
        assert hook_count(model) == len(skips)
    assert torch.equal(case.run(model), before)
    assert hook_count(model) == 0
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "se")
    handle.remove()  # a second time does nothing


@schemes
@torch.no_grad()
def test_an_exception_in_the_forward_leaves_the_scaling_removable(scheme):
    case = CASES["theory-add"]
    model = case.build()
    before, skips = case.run(model), find_skips(model, *case.args)

    def fail(*_):
        raise RuntimeError("in the middle of a pass")

    failing = model.decoder[1].register_forward_hook(fail)
    with (
        pytest.raises(RuntimeError, match="in the middle of a pass"),
        scale_skips(model, skips, scheme()),
    ):
        case.run(model)
    failing.remove()
    assert hook_count(model) == 0
    assert torch.equal(case.run(model), before)
    with scale_skips(model, skips, scheme()):  # and it can be put in again
        case.run(model)


@torch.no_grad()
def test_two_scalings_multiply_and_come_out_in_any_order():
    case = CASES["theory-add"]
    model = case.build()
    skips, plain = find_skips(model, *case.args), case.run(model)
    outer = scale_skips(model, skips, Uniform(0.5))
    inner = scale_skips(model, skips, ConstantScaling(0.7))
    expected = reference("theory-add", model, [0.5, 0.35, 0.245])
    torch.testing.assert_close(case.run(model), expected)
    outer.remove()
    expected = reference("theory-add", model, [1.0, 0.7, 0.49])
    torch.testing.assert_close(case.run(model), expected)
    inner.remove()
    assert torch.equal(case.run(model), plain)


@learnable
@torch.no_grad()
def test_a_scheme_that_was_taken_out_keeps_what_it_learned(shared):
    case = CASES["uvit"]
    model, handle, skips = scaled(case, LearnableScaling(shared=shared))
    before = case.run(model)
    handle.remove()
    with scale_skips(model, skips, handle.scheme):
        assert torch.equal(case.run(model), before)


def test_gates_take_the_type_of_the_model():
    case = CASES["uvit"]
    model = case.build().double()
    args = (X.double(), T)
    handle = scale_skips(model, find_skips(model, *args), LearnableScaling())
    assert {p.dtype for p in handle.scheme.parameters()} == {torch.float64}
    assert case.run(model, *args).dtype == torch.float64


# ── any network: taps at function calls, slices, and modules that are called several times ───────

ANY = {
    name: ZOO[name] for name in ("additive-in-place", "recursive-mlp", "skip-last", "shared-both")
}
any_network = pytest.mark.parametrize("entry", ANY.values(), ids=ANY)
anywhere = pytest.mark.filterwarnings("ignore::stability_probe.skips.SkipWarning")


def entry_with_skips(entry):
    model = entry.build().eval()
    return model, find_skips(model, *entry.args, **entry.kwargs)


@any_network
@anywhere
@pytest.mark.parametrize("first", [0, 1], ids=["outer-first", "inner-first"])
@torch.no_grad()
def test_two_scalings_of_any_network_come_out_in_any_order(entry, first):
    model, skips = entry_with_skips(entry)
    plain = entry.run(model)[0]

    def alone(c):
        with scale_skips(model, skips, Uniform(c)):
            return entry.run(model)[0]

    expected = {c: alone(c) for c in (0.5, 0.25, 0.125)}
    handles = [scale_skips(model, skips, Uniform(c)) for c in (0.5, 0.25)]
    assert torch.allclose(entry.run(model)[0], expected[0.125])
    handles[first].remove()
    assert torch.allclose(entry.run(model)[0], expected[0.25 if first == 0 else 0.5])
    handles[1 - first].remove()
    assert torch.equal(entry.run(model)[0], plain)
    assert hook_count(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


@any_network
@anywhere
@torch.no_grad()
def test_a_model_that_a_hook_of_its_own_calls_is_scaled_in_both_passes(entry):
    model, skips = entry_with_skips(entry)
    found, sink = [], model.get_submodule(skips[-1].sink)
    with scale_skips(model, skips, Uniform(0.3)):
        expected = entry.run(model)[0]

        def call_again(*_):
            if not found:
                found.append(None)
                found.append(entry.run(model)[0])

        hook = sink.register_forward_pre_hook(call_again)
        outer = entry.run(model)[0]
        hook.remove()
    assert torch.equal(found[1], expected)
    assert torch.equal(outer, expected)
    assert not torch.allclose(entry.run(model)[0], expected)


@any_network
@anywhere
@torch.no_grad()
def test_an_exception_in_any_network_leaves_it_scaled_and_removable(entry):
    model, skips = entry_with_skips(entry)
    plain = entry.run(model)[0]

    def fail(*_):
        raise RuntimeError("in the middle of a pass")

    with scale_skips(model, skips, Uniform(0.3)):
        expected = entry.run(model)[0]
        hook = model.get_submodule(skips[0].sink).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle of a pass"):
            entry.run(model)
        hook.remove()
        assert torch.equal(entry.run(model)[0], expected)
    assert torch.equal(entry.run(model)[0], plain)
    assert hook_count(model) == 0


@any_network
@anywhere
@pytest.mark.parametrize("make", [LearnableScaling, SCTuner])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies_of_any_scaled_network_have_parameters_of_their_own(entry, make, copied):
    model, skips = entry_with_skips(entry)
    handle = scale_skips(model, skips, make())
    randomise(handle.scheme, seed=3)
    before = entry.run(model)[0]
    twin = copied(model)
    handle.remove()
    assert torch.equal(entry.run(twin)[0], before)
    assert not torch.allclose(entry.run(model)[0], before)
    for p in twin.se.parameters():
        p.add_(1.0)
    assert not torch.allclose(entry.run(twin)[0], before)


@any_network
@anywhere
@pytest.mark.parametrize("make", [LearnableScaling, SCTuner])
@torch.no_grad()
def test_parameters_of_any_scaled_network_are_saved_with_it(entry, make, tmp_path):
    outputs = []
    for seed in (3, 5):
        model, skips = entry_with_skips(entry)
        handle = scale_skips(model, skips, make())
        randomise(handle.scheme, seed=seed)
        if seed == 3:
            torch.save(model.state_dict(), tmp_path / "model.pt")
        outputs.append(entry.run(model)[0])
    assert not torch.allclose(*outputs)
    model.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    assert torch.equal(entry.run(model)[0], outputs[0])


def test_tuners_train_with_the_model():
    model, handle, _ = scaled(CASES["uvit"], SCTuner())
    before = [p.detach().clone() for p in handle.scheme.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CASES["uvit"].run(model).square().mean().backward()
    optimizer.step()
    pairs = zip(before, handle.scheme.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


def test_a_taken_name_is_refused():
    model = CASES["theory-add"].build()
    skips = find_skips(model, X)
    scale_skips(model, skips, LearnableScaling())
    message = "TheoryUNet already has '{}', where the scheme's parameters would go; remove"
    with pytest.raises(StabilityProbeError, match=message.format("se")):
        scale_skips(model, skips, LearnableScaling())
    with pytest.raises(StabilityProbeError, match=message.format("middle")):
        scale_skips(model, skips, LearnableScaling(), name="middle")
    assert hook_count(model) == len(skips)
    scale_skips(model, skips, LearnableScaling(), name="second")
    scale_skips(model, skips, Uniform(0.5))  # it has no parameters, so it takes no name
    assert hook_count(model) == 3 * len(skips)


@pytest.mark.parametrize("name", ["", "a.b", "1"])
def test_a_name_that_is_none_is_refused(name):
    model = TheoryUNet(m=64, n_skips=1)
    with pytest.raises(StabilityProbeError, match=f"name must be an identifier, got '{name}'"):
        scale_skips(model, find_skips(model, X), LearnableScaling(), name=name)


@schemes
def test_no_skips_are_refused(scheme):
    model = TheoryUNet(m=4, n_skips=1)
    with pytest.raises(
        StabilityProbeError, match=r"TheoryUNet has no long skips to scale \(N = 0\)"
    ):
        scale_skips(model, [], scheme())
    assert not hasattr(model, "se")


@schemes
def test_skips_of_another_model_are_refused_and_nothing_stays(scheme):
    model = TheoryUNet(m=64, n_skips=1)
    skips = find_skips(TheoryUNet(m=64, n_skips=3), X)
    with pytest.raises(StabilityProbeError, match=r"tap on 'decoder\.1': .* no such module"):
        scale_skips(model, skips, scheme())
    assert hook_count(model) == 0
    assert not hasattr(model, "se")


def test_an_argument_of_another_model_is_refused_and_nothing_stays():
    model = TheoryUNet(m=64, n_skips=2)
    first, second = find_skips(model, X)
    wrong = dataclasses.replace(second, skip=ArgumentTap("decoder.1", "skip"))
    with pytest.raises(StabilityProbeError, match="its forward has no parameter 'skip'"):
        scale_skips(model, [first, wrong], LearnableScaling())
    assert hook_count(model) == 0
    assert not hasattr(model, "se")


# ── copies and checkpoints ───────────────────────────────────────────────────────────────────────


@cases
@learnable
@torch.no_grad()
def test_a_deep_copy_has_gates_of_its_own(case, shared):
    model, _, _ = scaled(case, LearnableScaling(shared=shared))
    before = case.run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(case.run(twin), before)
    for p in twin.se.parameters():
        p.add_(1.0)
    assert torch.equal(case.run(model), before)
    changed = case.run(twin)
    assert not torch.equal(changed, before)
    for p in model.se.parameters():
        p.sub_(1.0)
    assert torch.equal(case.run(twin), changed)
    assert not torch.equal(case.run(model), before)


@schemes
@torch.no_grad()
def test_a_deep_copy_outlives_the_removal_of_the_original(scheme):
    case = CASES["uvit"]
    model, handle, _ = scaled(case, scheme())
    before = case.run(model)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(case.run(twin), before)


@cases
@schemes
@torch.no_grad()
def test_a_scaled_model_can_be_pickled(case, scheme):
    model, _, _ = scaled(case, scheme())
    loaded = pickle.loads(pickle.dumps(model))
    assert hook_count(loaded) == hook_count(model) == case.n_skips
    assert torch.equal(case.run(loaded), case.run(model))


@cases
@learnable
@torch.no_grad()
def test_gates_are_saved_with_the_model(case, shared, tmp_path):
    model, _, _ = scaled(case, LearnableScaling(shared=shared))
    randomise(model, seed=9, std=0.1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other, _, _ = scaled(case, LearnableScaling(shared=shared), seed=5)
    assert not torch.equal(case.run(other), case.run(model))
    other.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    assert torch.equal(case.run(other), case.run(model))
