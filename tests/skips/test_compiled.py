"""Scaling under `torch.compile`, whichever of the two comes first."""

import shutil
import warnings

import pytest
import torch

from stability_probe import ConstantScaling, LearnableScaling, Uniform, find_skips, scale_skips
from stability_probe.skips import FreeU, OperandTap, SCTuner, SkipWarning
from tests.oracles.architectures import ZOO, tensors
from tests.oracles.unchecked import nothing_compiled
from tests.oracles.zoo import CASES, randomise

CONDITION = ZOO["unet2d-condition"]
WHOLE = {  # every tap is at a module's boundary
    "theory-concat": CASES["theory-concat"],
    "uvit": CASES["uvit"],
    "unet2d": CASES["unet2d"],
    "unet2d-attention": CASES["unet2d-attention"],
    "unet2d-condition": CONDITION,
    "slices": ZOO["skip-last"],
    "called-thrice": ZOO["shared-both"],
}
BROKEN = {name: ZOO[name] for name in ("additive", "additive-in-place", "recursive-mlp")}
SCHEMES = {
    "cs": lambda: ConstantScaling(0.7),
    "ls": LearnableScaling,
    "sc-tuner": SCTuner,
    "freeu": lambda: FreeU(version=2),
}
broken = pytest.mark.parametrize("entry", BROKEN.values(), ids=BROKEN)
LONG = {"unet2d", "unet2d-attention", "unet2d-condition"}  # to compile
every = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, entry in (WHOLE | BROKEN).items()
    ],
)
pairs = pytest.mark.parametrize(
    ("entry", "scheme"),
    [
        pytest.param(
            entry,
            scheme,
            id=f"{name}-{kind}",
            marks=[pytest.mark.slow] if name in LONG and (name, kind) != ("unet2d", "ls") else [],
        )
        for name, entry in WHOLE.items()
        for kind, scheme in SCHEMES.items()
        if kind == "cs" or (name == "uvit" and kind != "freeu") or name == "unet2d"
    ],
)
scaled_inside = pytest.mark.filterwarnings("ignore::stability_probe.skips.SkipWarning")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    with nothing_compiled(monkeypatch):
        yield


def skips_of(entry, model):
    return find_skips(model, *entry.args, **getattr(entry, "kwargs", {}))


@torch.no_grad()
def run(entry, model):
    return tensors(model(*entry.args, **getattr(entry, "kwargs", {})))[0]


def built(entry):
    return entry.build().eval()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def expected(entry, *schemes):
    """The outputs of an uncompiled model without scaling, and with these schemes."""
    model = built(entry)
    plain, skips = run(entry, model), skips_of(entry, model)
    for scheme in schemes:
        scale_skips(model, skips, scheme)
    scaled = run(entry, model)
    assert not close(plain, scaled)
    return plain, scaled


# ── scale, then compile ──────────────────────────────────────────────────────────────────────────


def graphs_of(entry, model, **options):
    """How many graphs the model is compiled to, and its output."""
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    return run(entry, torch.compile(model, backend=count, **options)), len(graphs)


@pairs
def test_a_scaled_model_is_one_graph(entry, scheme):
    model = built(entry)
    skips = skips_of(entry, model)
    scheme = scheme()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SkipWarning)
        scale_skips(model, skips, scheme)
    randomise(scheme, seed=3)
    plain, scaled = run(entry, built(entry)), run(entry, model)
    assert not close(plain, scaled)
    compiled, graphs = graphs_of(entry, model, fullgraph=True)
    assert graphs == 1
    torch.testing.assert_close(compiled, scaled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["uvit", "slices", "called-thrice"])
def test_gradients_through_the_compiled_model(name):
    entry, gradients = WHOLE[name], []
    for compiled in (False, True):
        model = built(entry)
        scheme = LearnableScaling()
        scale_skips(model, skips_of(entry, model), scheme)
        randomise(scheme, seed=3)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        tensors(call(*entry.args))[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    eager, traced = gradients
    assert any(g.abs().max() > 0 for name, g in eager.items() if name.startswith("se."))
    for name, gradient in eager.items():
        torch.testing.assert_close(traced[name], gradient, rtol=1e-4, atol=1e-6)


@broken
def test_a_merge_inside_a_forward_runs_uncompiled_and_scaled(entry):
    model = built(entry)
    skips = skips_of(entry, model)
    inside = {s.skip.module or "the whole model" for s in skips if isinstance(s.skip, OperandTap)}
    assert inside
    with pytest.warns(SkipWarning, match="under torch.compile .* runs uncompiled") as caught:
        scale_skips(model, skips, Uniform(0.3))
    assert all(name in str(caught[0].message) for name in inside)
    _, scaled = expected_inside(entry)
    torch.testing.assert_close(run(entry, torch.compile(model, backend="eager")), scaled)


def expected_inside(entry):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)
        return expected(entry, Uniform(0.3))


@scaled_inside
def test_one_graph_is_refused_where_a_module_runs_uncompiled():
    entry = BROKEN["additive"]
    model = built(entry)
    scale_skips(model, skips_of(entry, model), Uniform(0.3))
    with pytest.raises(Exception, match="fullgraph=True"):
        run(entry, torch.compile(model, backend="eager", fullgraph=True))


def test_a_boost_inside_a_forward_is_named_too():
    """FreeU changes the main operand as well, and that tap alone may need the function call."""
    entry = WHOLE["slices"]
    model = built(entry)
    first, *rest = skips_of(entry, model)
    main = OperandTap("dec1", "concat", line=0, ordinal=0, operand=0)
    moved = [type(first)(**{**vars(first), "main": main}), *rest]
    with pytest.warns(SkipWarning, match="under torch.compile dec1 runs uncompiled"):
        scale_skips(model, moved, FreeU())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SkipWarning)
        scale_skips(built(entry), moved, Uniform(0.3))  # leaves the main operand alone


# ── compile, then scale ──────────────────────────────────────────────────────────────────────────


def by_function(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def its_children(model):
    for child in model.children():
        child.compile(backend="eager")
    return model


orders = pytest.mark.parametrize("compile_", [by_function, in_place, its_children])


@every
@orders
@scaled_inside
@pytest.mark.slow
def test_scaling_reaches_code_that_was_compiled_before(entry, compile_):
    """Compiled code does not look at hooks again: it must not go on unscaled, nor scaled."""
    plain, scaled = expected(entry, Uniform(0.3))
    model = built(entry)
    skips = skips_of(entry, model)
    compiled = compile_(model)
    assert close(run(entry, compiled), plain)
    handle = scale_skips(model, skips, Uniform(0.3))
    assert close(run(entry, compiled), scaled)
    handle.remove()
    assert close(run(entry, compiled), plain)


@scaled_inside
@pytest.mark.parametrize("name", ["theory-concat", "additive"])
def test_code_that_was_compiled_around_the_model(name):
    entry = (WHOLE | BROKEN)[name]
    plain, scaled = expected(entry, Uniform(0.3))
    model = built(entry)

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, *args):
            return tensors(self.inner(*args))[0]

    compiled = torch.compile(Around(), backend="eager")
    assert close(run(entry, compiled), plain)
    with scale_skips(model, skips_of(entry, model), Uniform(0.3)):
        assert close(run(entry, compiled), scaled)
    assert close(run(entry, compiled), plain)


@every
@scaled_inside
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran"])
@pytest.mark.slow
def test_what_torch_compile_returned_stands_for_the_model(entry, ran):
    scheme = LearnableScaling()
    plain, scaled = expected(entry, scheme)
    model = built(entry)
    compiled = torch.compile(model, backend="eager")
    if ran:
        run(entry, compiled)
    skips = skips_of(entry, compiled)
    assert skips == skips_of(entry, model)
    with scale_skips(compiled, skips, LearnableScaling()) as handle:
        handle.scheme.load_state_dict(scheme.state_dict())
        assert close(run(entry, compiled), scaled)
        assert model.se is handle.scheme
    assert close(run(entry, compiled), plain)
    assert not hasattr(model, "se")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["uvit", "unet2d", "unet2d-condition"])
@pytest.mark.parametrize("first", ["scale", "compile"])
def test_the_default_backend(name, first):
    entry = WHOLE[name]
    plain, scaled = expected(entry, ConstantScaling(0.5))
    model = built(entry)
    skips = skips_of(entry, model)
    compiled = torch.compile(model, fullgraph=True)
    if first == "compile":
        assert close(run(entry, compiled), plain)
    with scale_skips(model, skips, ConstantScaling(0.5)):
        assert close(run(entry, compiled), scaled)
    assert close(run(entry, compiled), plain)
