"""The training loop, its models and its settings."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from stability_probe import StabilityProbeError, TheoryUNet, UViT, find_skips
from stability_probe.errors import TrainingDiverged
from stability_probe.runs import MODELS, TrainConfig, build_model, train
from stability_probe.runs.data import load_images
from stability_probe.runs.training import (
    NOISE_SCHEDULES,
    input_moments,
    noise_scheduler,
    noised_batch,
    probe_batch,
)

QUICK = {"n_skips": 2, "width": 16, "batch_size": 8}


def config(**options):
    return TrainConfig(**(QUICK | options))


def alpha_squared(levels=1000):
    """α_t² of the linear schedule of Ho et al. (2020): Π(1 − β), β from 1e-4 to 0.02."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, levels))


@pytest.mark.parametrize("model", MODELS)
def test_the_optimizer_over_all_tensors_at_once_gives_the_same_bits(monkeypatch, model):
    def trained():
        settings, images = config(model=model, n_skips=4, steps=4), load_images("digits")
        net = build_model(settings, images.shape[1:])
        for _ in train(net, images, settings):
            pass
        return nn.utils.parameters_to_vector(net.parameters())

    asked, original = [], torch.optim.AdamW

    def one_by_one(parameters, *, foreach, **options):
        asked.append(foreach)
        return original(parameters, foreach=False, **options)

    at_once = trained()
    monkeypatch.setattr(torch.optim, "AdamW", one_by_one)
    assert torch.equal(trained(), at_once) and asked == [True]


class Stub(nn.Module):
    """Predicts w·x_t and keeps what it was given."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x.clone(), t.clone()))
        return self.w * x


def constant_images(n, value=0.5, size=16):
    return torch.full((n, 1, size, size), value, dtype=torch.float64)


class TestNoise:
    """x_t = α_t x_0 + σ_t ε, recovered from outside."""

    def steps(self, x0=0.5, w=0.3, **options):
        model = Stub(w)
        c = config(steps=20, learning_rate=1e-9, warmup=0, **options)
        steps = list(train(model, constant_images(8, x0), c))
        return model, steps

    @pytest.mark.parametrize("levels", [1000, 50])
    def test_the_input_is_the_noised_image_and_the_target_its_noise(self, levels):
        model, steps = self.steps(noise_levels=levels)
        table = torch.from_numpy(alpha_squared(levels))
        for (x, t), step in zip(model.seen, steps, strict=True):
            assert torch.equal(t, step.noise_level)
            a2 = table[t].view(-1, 1, 1, 1)
            noise = (x - a2.sqrt() * 0.5) / (1 - a2).sqrt()
            loss = (0.3 * x - noise).square().flatten(1).mean(1)
            # single precision of the schedule is the limit
            torch.testing.assert_close(step.loss, loss, rtol=1e-3, atol=0)

    def test_the_noise_is_standard_normal_and_new_every_time(self):
        model, _ = self.steps()
        table = torch.from_numpy(alpha_squared())
        x, t = (torch.cat(parts) for parts in zip(*model.seen, strict=True))
        a2 = table[t].view(-1, 1, 1, 1)
        noise = ((x - a2.sqrt() * 0.5) / (1 - a2).sqrt()).flatten(1)
        n = noise.numel()
        assert n == 160 * 256
        assert abs(noise.mean()) < 4 / n**0.5
        assert abs(noise.square().mean() - 1) < 4 * (2 / n) ** 0.5
        correlation = torch.corrcoef(noise) - torch.eye(160, dtype=torch.float64)
        assert correlation.abs().max() < 6 / 256**0.5

    def test_noise_levels_are_uniform(self):
        model, _ = self.steps(noise_levels=4)
        counts = torch.cat([t for _, t in model.seen]).bincount(minlength=4)
        assert len(counts) == 4
        assert ((counts - 40).abs() < 4 * (160 * 3 / 16) ** 0.5).all()

    def test_the_schedule_preserves_variance(self):
        alphas = noise_scheduler(config()).alphas_cumprod
        torch.testing.assert_close(alphas, torch.from_numpy(alpha_squared()).float())
        assert (alphas.diff() < 0).all()

    def test_other_schedules_are_those_of_diffusers(self):
        cosine = noise_scheduler(config(noise_schedule="squaredcos_cap_v2")).alphas_cumprod
        s = (torch.arange(1001) / 1000 + 0.008) / 1.008 * torch.pi / 2
        expected = (s.cos() ** 2)[1:-1] / s[0].cos() ** 2
        torch.testing.assert_close(cosine[:-1], expected, rtol=1e-3, atol=1e-6)


class TestLoop:
    @pytest.mark.parametrize("steps", [1, 7])
    def test_yields_exactly_as_many_steps_with_gradients_present(self, steps):
        model = build_model(config(model="theory-unet"), (1, 8, 8))
        images = load_images("digits")[:64]
        count = 0
        for step in train(model, images, config(steps=steps)):
            count += 1
            assert step.step == count
            assert step.loss.shape == step.noise_level.shape == (8,)
            assert not step.loss.requires_grad
            assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        assert count == steps

    def test_gradients_are_those_of_the_mean_loss_of_the_step_alone(self):
        model = Stub(0.3)
        for step in train(model, constant_images(8), config(steps=3, warmup=0)):
            x, t = model.seen[-1]
            a2 = torch.from_numpy(alpha_squared())[t].view(-1, 1, 1, 1)
            noise = (x - a2.sqrt() * 0.5) / (1 - a2).sqrt()
            before = self.w_before(model, step)
            expected = 2 * ((before * x - noise) * x).mean()
            assert model.w.grad.item() == pytest.approx(expected.item(), rel=1e-3)

    @staticmethod
    def w_before(model, step):
        """W as it was in the forward pass: AdamW's first steps move it by the learning rate."""
        x, t = model.seen[-1]
        a2 = torch.from_numpy(alpha_squared())[t].view(-1, 1, 1, 1)
        noise = (x - a2.sqrt() * 0.5) / (1 - a2).sqrt()
        candidates = model.w.item() + torch.linspace(-3e-3, 3e-3, 6001, dtype=torch.float64)
        losses = (candidates.view(-1, 1) * x[0].flatten() - noise[0].flatten()).square().mean(1)
        return candidates[(losses - step.loss[0]).abs().argmin()]

    def test_the_learning_rate_warms_up(self):
        options = {"steps": 7, "learning_rate": 0.2}
        images = constant_images(8)
        rates = [s.learning_rate for s in train(Stub(), images, config(warmup=4, **options))]
        assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
        rates = [s.learning_rate for s in train(Stub(), images, config(warmup=0, **options))]
        assert rates == [0.2] * 7

    def test_the_learning_rate_is_what_the_step_is_taken_with(self):
        """AdamW's first step has the length of the learning rate; at rate 0 nothing moves."""
        model = Stub(0.0)
        options = config(steps=3, warmup=2, learning_rate=0.1, weight_decay=0.0)
        moved = [0.0] + [model.w.item() for _ in train(model, constant_images(8), options)]
        lengths = np.abs(np.diff(moved))
        assert lengths[0] == 0
        assert 0.01 < lengths[1] <= 0.0501
        assert 0.05 < lengths[2] <= 0.1001

    def test_weight_decay_is_used(self):
        ends = []
        for decay in (0.0, 5.0):
            model = Stub(1.0)
            options = config(steps=5, warmup=0, learning_rate=1e-3, weight_decay=decay)
            ends.append([model.w.item() for _ in train(model, constant_images(8), options)][-1])
        assert ends[0] - ends[1] == pytest.approx(5 * 5e-3, rel=0.1)

    def test_images_of_a_last_partial_batch_wait_for_the_next_epoch(self):
        """Every step has a whole batch; an epoch shows no image twice; epochs differ."""
        images = torch.linspace(-1, 1, 10).view(10, 1, 1, 1).expand(10, 1, 4, 4).contiguous()
        model = Stub().float()
        options = config(steps=40, batch_size=4, noise_levels=1, learning_rate=1e-9)
        steps = list(train(model, images, options))
        assert {len(s.loss) for s in steps} == {4}
        # one noise level of α² = 0.9999 leaves the image plain to see
        shown = [((x.mean((1, 2, 3)) + 1) * 4.5).round().int().tolist() for x, _ in model.seen]
        epochs = [a + b for a, b in zip(shown[::2], shown[1::2], strict=True)]
        assert all(len(set(epoch)) == 8 for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 20
        assert set(itertools.chain(*epochs)) == set(range(10))

    @pytest.mark.parametrize("n", [1, 5])
    def test_fewer_images_than_a_batch_are_one_batch(self, n):
        steps = list(train(Stub(), constant_images(n), config(steps=3, batch_size=64)))
        assert [len(s.loss) for s in steps] == [n] * 3

    def test_no_images_are_refused(self):
        with pytest.raises(StabilityProbeError, match="at least one image is needed, got 0"):
            next(train(Stub(), torch.empty(0, 1, 8, 8), config()))

    def test_puts_the_model_into_training_mode_and_leaves_the_global_random_state(self):
        model = build_model(config(), (1, 8, 8)).eval()
        state = torch.get_rng_state()
        for _ in train(model, load_images("digits")[:16], config(steps=2)):
            assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_loss_that_is_not_finite_is_yielded_and_then_ends_it(self):
        class Breaks(Stub):
            def forward(self, x, t):
                out = super().forward(x, t)
                return out * float("nan") if len(self.seen) == 3 else out

        seen = []
        with pytest.raises(TrainingDiverged, match="the loss was not finite at step 3 of 9"):
            for step in train(Breaks(), constant_images(8), config(steps=9)):
                seen.append(step.loss.isfinite().all().item())
        assert seen == [True, True, False]

    def test_one_sample_that_is_not_finite_is_enough(self):
        images = constant_images(8)
        images[5] = float("inf")
        with pytest.raises(TrainingDiverged, match="at step 1 of 9"):
            list(train(Stub(), images, config(steps=9)))


def test_under_bf16_the_layers_compute_in_it_and_the_loss_does_not():
    linear = nn.Linear(8, 8)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(_[-1].dtype))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x, t):
            return self.linear(x)

    images = constant_images(8, size=8).float()
    losses = [step.loss.dtype for step in train(Network(), images, config(steps=2))]
    losses += [
        step.loss.dtype for step in train(Network(), images, config(steps=1, precision="bf16"))
    ]
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert losses == [torch.float32] * 3
    assert linear.weight.dtype == torch.float32


class TestLearning:
    def run(self, steps=60, **options):
        c = config(steps=steps, batch_size=32, learning_rate=2e-3, **options)
        images = load_images("digits")
        model = build_model(c, images.shape[1:])
        losses = torch.stack([step.loss for step in train(model, images, c)])
        return losses, [p.detach().clone() for p in model.parameters()]

    @pytest.mark.parametrize(
        "options",
        [{"model": "uvit"}, {"model": "theory-unet"}, {"model": "unet2d", "n_skips": 4}],
        ids=str,
    )
    def test_losses_fall_on_digits(self, options):
        losses, _ = self.run(**options, width=8 if options["model"] == "unet2d" else 16)
        first, last = losses[:10].mean(), losses[-10:].mean()
        assert last < 0.75 * first

    @pytest.mark.parametrize("model", MODELS)
    def test_a_seed_decides_everything_and_nothing_else_does(self, model):
        options = {"model": model, "steps": 3, "n_skips": 4, "width": 8}
        torch.manual_seed(1)
        first, weights = self.run(seed=5, **options)
        torch.manual_seed(2)
        again, same_weights = self.run(seed=5, **options)
        other, other_weights = self.run(seed=6, **options)
        assert torch.equal(first, again)
        assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))
        assert not torch.equal(first, other)
        different = [not torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True)]
        assert all(different)


class TestModels:
    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (1, 28, 28)])
    def test_take_the_images_and_have_as_many_skips_as_asked_for(self, model, shape):
        n_skips = 4
        c = config(model=model, n_skips=n_skips, width=8)
        if model == "theory-unet" and shape[-1] > 16:
            shape = (1, 24, 24)  # 576 numbers wide is enough
        net = build_model(c, shape)
        x, t = torch.zeros(2, *shape), torch.tensor([0, 999])
        out = net(x, t)
        assert (out if torch.is_tensor(out) else out.sample).shape == x.shape
        assert len(find_skips(net, x, t)) == n_skips

    def test_widths_and_depths_are_those_of_the_settings(self):
        uvit = build_model(config(model="uvit", n_skips=3, width=8), (1, 8, 8))
        assert isinstance(uvit, UViT)
        assert (uvit.config.embed_dim, uvit.config.depth) == (8, 7)
        theory = build_model(config(model="theory-unet", n_skips=3), (1, 8, 8))
        assert isinstance(theory, TheoryUNet)
        assert (theory.m, theory.n_skips) == (64, 3)
        unet = build_model(config(model="unet2d", n_skips=6, width=12), (1, 8, 8))
        assert unet.conv_in.out_channels == 12
        assert len(find_skips(unet, torch.zeros(1, 1, 8, 8), 0)) == 6

    @pytest.mark.parametrize("model", MODELS)
    def test_weights_come_from_the_seed_and_not_from_the_global_state(self, model):
        def weights(seed):
            c = config(model=model, n_skips=4, width=8, seed=seed)
            return torch.cat([p.flatten() for p in build_model(c, (1, 8, 8)).parameters()])

        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = weights(1)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        assert torch.equal(weights(1), first)
        assert not torch.equal(weights(2), first)

    @pytest.mark.parametrize(("options", "tokens"), [({}, 16), ({"patch_size": 4}, 4)])
    def test_the_patch_size_can_be_chosen(self, options, tokens):
        model = build_model(config(model="uvit", **options), (1, 8, 8))
        assert model.pos_embed.shape[1] == tokens + 1  # one for t

    def test_a_width_that_does_not_fit_is_refused(self):
        with pytest.raises(StabilityProbeError, match="embed_dim must be a multiple of num_heads"):
            build_model(config(model="uvit", width=6), (1, 8, 8))


class TestConfig:
    @pytest.mark.parametrize(
        "name", ["steps", "n_skips", "width", "batch_size", "noise_levels", "patch_size"]
    )
    @pytest.mark.parametrize("value", [0, -3])
    def test_a_number_below_one_is_refused(self, name, value):
        with pytest.raises(StabilityProbeError, match=f"{name} must be at least 1, got {value}"):
            TrainConfig(**{name: value})

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_learning_rate_that_is_not_positive_is_refused(self, value):
        with pytest.raises(StabilityProbeError, match=f"must be positive, got {value}"):
            TrainConfig(learning_rate=value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model": "vgg"}, "unknown model 'vgg'; choose from uvit, unet2d, theory-unet"),
            ({"data": "cifar"}, "unknown data 'cifar'; choose from digits"),
            ({"noise_schedule": "foo"}, "unknown noise_schedule 'foo'; choose from linear, "),
            ({"precision": "fp8"}, "unknown precision 'fp8'; choose from fp32, bf16"),
            ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
            ({"weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
            ({"warmup": -5}, "warmup must be at least 0, got -5"),
            ({"seed": -1}, "seed must be at least 0, got -1"),
            ({"scheme": "half"}, "unknown scheme 'half'"),
            ({"scheme": "cs:2"}, "must lie in"),
            ({"scheme": "cs:x"}, "a number must follow 'cs'"),
            ({"model": "unet2d", "n_skips": 5}, "must be 4, 6, 8, ... .two resolutions., got 5"),
            ({"model": "unet2d", "n_skips": 2}, "must be 4, 6, 8, ... .two resolutions., got 2"),
        ],
        ids=str,
    )
    def test_a_name_or_choice_that_does_not_exist_is_refused(self, options, message):
        with pytest.raises(StabilityProbeError, match=message):
            TrainConfig(**options)

    @pytest.mark.parametrize("name", NOISE_SCHEDULES)
    def test_every_schedule_that_is_taken_can_be_made(self, name):
        alphas = noise_scheduler(config(noise_schedule=name)).alphas_cumprod
        assert len(alphas) == 1000
        assert ((alphas >= 0) & (alphas < 1)).all()

    def test_as_a_dict_and_back(self):
        c = config(scheme="cs:0.7", seed=4)
        assert TrainConfig(**c.as_dict()) == c
        assert c.as_dict()["scheme"] == "cs:0.7"


class TestProbeBatch:
    IMAGES = load_images("digits")

    def test_noises_images_of_the_data_at_levels_from_first_to_last(self):
        batch = probe_batch(config(), self.IMAGES, 20, 3)
        x, t = batch.args
        assert x.shape == (20, 1, 8, 8)
        assert sorted(t.tolist())[0] == 0
        assert sorted(t.tolist())[-1] == 999
        assert len(set(t.tolist())) == 20
        assert batch.sensitive == 3
        a2 = torch.from_numpy(alpha_squared())[t].view(-1, 1, 1, 1)
        x0 = (x - (1 - a2).sqrt() * batch.target) / a2.sqrt()
        clear = t < 500  # where rounding is not blown up by 1/α
        distance = torch.cdist(x0[clear].flatten(1), self.IMAGES.double().flatten(1))
        assert distance.amin(1).max() < 1e-3
        assert len(set(distance.argmin(1).tolist())) == int(clear.sum())

    def test_leading_samples_are_at_several_levels(self):
        t = probe_batch(config(), self.IMAGES, 96, 8).head(8).args[1]
        assert len(set((t // 250).tolist())) >= 3

    def test_at_one_noise_level_the_images_and_their_noise_stay(self):
        mixed = probe_batch(config(), self.IMAGES, 8, 2)
        x, t = probe_batch(config(), self.IMAGES, 8, 2, noise_level=0).args
        assert t.tolist() == [0] * 8
        first = int((mixed.args[1] == 0).nonzero())
        torch.testing.assert_close(x[first], mixed.x[first])

    def test_does_not_depend_on_the_seed_and_draws_nothing(self):
        state = torch.get_rng_state()
        batches = [probe_batch(config(seed=s), self.IMAGES, 8, 2) for s in (0, 1)]
        for a, b in zip(*(b.tensors() for b in batches), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(torch.get_rng_state(), state)

    def test_has_no_more_samples_than_there_are_images(self):
        assert len(probe_batch(config(), self.IMAGES[:3], 20, 3).x) == 3

    def test_of_any_scheduler_it_is_spread_over_its_levels(self):
        scheduler = noise_scheduler(config(noise_levels=10))
        batch = noised_batch(self.IMAGES, scheduler, size=20)
        x, t = batch.args
        assert sorted(t.tolist()) == torch.linspace(0, 9, 20).long().tolist()
        a2 = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x0 = (x - (1 - a2).sqrt() * batch.target) / a2.sqrt()
        distance = torch.cdist(x0.flatten(1), self.IMAGES.flatten(1))
        assert distance.amin(1).max() < 1e-3

    def test_moments_are_those_of_the_data_and_the_schedule(self):
        scheduler = noise_scheduler(config(noise_levels=10))
        found = input_moments(self.IMAGES, scheduler)
        expected = scheduler.alphas_cumprod.mean().item()
        assert found["m"] == 64
        assert found["second_moment"] == pytest.approx((self.IMAGES**2).mean().item())
        assert found["mean_alpha_squared"] == pytest.approx(expected)
