"""Training runs and ensembles of random networks, recorded into run folders."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stability_probe.errors import StabilityProbeError, TrainingDiverged
from stability_probe.models import TheoryUNet
from stability_probe.probes import ProbeBatch, ProbeConfig, StabilityProbe
from stability_probe.probes.buffer import RecordBuffer
from stability_probe.probes.features import FeatureProbe
from stability_probe.probes.ranks import RecordWarning
from stability_probe.probes.records import Key
from stability_probe.probes.sample_gradients import MEMORY, sample_gradients
from stability_probe.probes.summaries import per_sample, summarise
from stability_probe.runs.data import load_images
from stability_probe.runs.processes import from_main, is_main, join
from stability_probe.runs.resuming import (
    Start,
    discard_state,
    find_start,
    refuse_unwritable,
    save_state,
    settings_from,
    write_whole,
)
from stability_probe.runs.run import Run
from stability_probe.runs.tracking import Trackers
from stability_probe.runs.training import (
    TrainConfig,
    Training,
    TrainStep,
    build_model,
    input_moments,
    noise_scheduler,
    probe_batch,
    train,
)
from stability_probe.skips import (
    Block,
    Scaling,
    SkipConnection,
    find_skips,
    parameter_blocks,
    parse_scaling,
    scale_skips,
)

WEIGHTS = "the weights cannot be written"


@dataclass(frozen=True)
class RecordConfig:
    """How a training run is probed.

    Attributes:
        every: record each `every`-th step.
        sensitivity_every: steps between the scheduled measurements; 0 for none.
        probe_samples: samples whose energies and gradients are measured then.
        sensitive_samples: how many of them Jacobian norms are taken on.
        paths: whether the norms of paths through the skips are measured with them.
        probe: further settings of the probe; its range of noise levels is that of the training.
        save_every: steps between two savings of the training state, from which a run that was
            stopped goes on; 0 for none.

    Raises:
        StabilityProbeError: if `save_every` is negative or there are no samples.
    """

    every: int = 1
    sensitivity_every: int = 100
    probe_samples: int = 96
    sensitive_samples: int = 8
    probe: ProbeConfig | None = None
    save_every: int = 50
    paths: bool = False

    def __post_init__(self) -> None:
        if self.save_every < 0:
            raise StabilityProbeError(f"save_every must be at least 0, got {self.save_every}")
        for name in ("probe_samples", "sensitive_samples"):
            if getattr(self, name) < 1:
                raise StabilityProbeError(f"{name} must be at least 1, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """The settings, as JSON has them."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def record_training(
    config: TrainConfig,
    path: str | Path,
    probing: RecordConfig | None = None,
    on_step: Callable[[TrainStep], None] | None = None,
    weights: Path | None = None,
    resume: bool = False,
    track: Sequence[str] = (),
) -> Run:
    """Train a network with a probe attached and record it.

    In several processes, all of them call this; the main one writes.

    Args:
        config: the run.
        path: a folder for it that holds no run yet.
        probing: what to record.
        on_step: called after every step, e.g. to move a progress bar.
        weights: a file for the trained weights, those of the scheme under `se` included.
        resume: go on with the run of these settings if the folder holds it, from the last training
            state that was saved. The records will be those of a run that never stopped.
        track: trackers that are told of the records as they are stored, into the run's folder:
            `tensorboard`, `wandb` (`Trackers`). They are no part of the configuration: a run may be
            gone on with under others.

    Returns:
        The finished run.

    Raises:
        StabilityProbeError: if the folder, the configuration or a tracker cannot be used.
        TrainingDiverged: if the loss stops being finite; the run folder says so and stays readable.
    """
    probing = probing or RecordConfig()
    images = load_images(config.data)
    run = Run(path, config.as_dict(), {"probing": probing.as_dict()})
    trackers = Trackers(track, run)
    join()
    start = from_main(lambda: _find_start(run, weights, resume))
    try:
        if not start.finished:
            _record(run, images, (config, probing), trackers, start, on_step, weights)
    except TrainingDiverged:
        from_main(lambda: discard_state(run))
        raise
    from_main(lambda: discard_state(run))
    return run


def recorded_settings(run: Run) -> tuple[TrainConfig, RecordConfig]:
    """What a run was asked to do when `record_training` started it.

    Raises:
        StabilityProbeError: if its `run.json` does not say, as that of an earlier version.
    """
    config = settings_from(TrainConfig, run.config, run)
    return config, settings_from(RecordConfig, run.info.get("probing", {}), run)


def _find_start(run: Run, weights: Path | None, resume: bool) -> Start:
    """Where to start, once everything that is to be written is known to be writable."""
    start = find_start(run, resume)
    if weights is not None and not start.finished:
        refuse_unwritable(weights, WEIGHTS)
    return start


def _record(
    run: Run,
    images: Tensor,
    settings: tuple[TrainConfig, RecordConfig],
    trackers: Trackers,
    start: Start,
    on_step: Callable[[TrainStep], None] | None,
    weights: Path | None,
) -> None:
    """Train from the start that was found to the last step."""
    config, probing = settings
    with ExitStack() as stack:
        model, training, probe = _set_up(run, images, settings, trackers, stack)
        if start.again:
            text = f"{run.path}: holds no training state; it starts again from the first step"
            warnings.warn(text, RecordWarning, stacklevel=2)
            from_main(run.clear)
        if start.state is not None:
            training.load_state_dict(start.state["training"])
            probe.load_state_dict(start.state["probe"])
            start.state.clear()  # it is as large as the model and its optimizer
        stack.enter_context(trackers.go_on(training.step))
        stack.enter_context(probe)
        try:
            for step in training:
                trackers.note(step.step, learning_rate=step.learning_rate)
                probe.step(loss=step.loss)
                if on_step is not None:
                    on_step(step)
                due = probing.save_every and step.step % probing.save_every == 0
                if due and step.step < config.steps and training.finite:
                    _save(run, training, probe)
        except TrainingDiverged:  # in all processes at once, so that they can still store together
            probe.flush()
            raise
        if weights is not None:
            state = model.state_dict()
            from_main(lambda: write_whole(weights, partial(torch.save, state), WEIGHTS))


def _set_up(
    run: Run,
    images: Tensor,
    settings: tuple[TrainConfig, RecordConfig],
    trackers: Trackers,
    stack: ExitStack,
) -> tuple[nn.Module, Training, StabilityProbe]:
    """The scaled model, its training, and a probe that is still to be entered."""
    config, probing = settings
    model = build_model(config, images.shape[1:])
    batch = probe_batch(config, images, probing.probe_samples, probing.sensitive_samples)
    skips = find_skips(model, *batch.head(1).args)
    scheme = seeded_scaling(config.scheme, config.seed)
    scaled = stack.enter_context(scale_skips(model, skips, scheme))
    run.about |= {
        "kind": "training",
        "seed": config.seed,
        "scheme": config.scheme,
        "kappa": scaled.kappa,
        "unmet": scheme.unmet,
        "parameters": sum(p.numel() for p in model.parameters()),
        "input": input_moments(images, noise_scheduler(config)),
    }
    training = train(model, images, config)
    probe_config = probing.probe or ProbeConfig()
    if probing.paths:
        sensitivity = replace(probe_config.sensitivity, paths=True)
        probe_config = replace(probe_config, sensitivity=sensitivity)
    probe = StabilityProbe(
        model,
        skips,
        every=probing.every,
        sensitivity_every=probing.sensitivity_every,
        run=run,
        on_records=trackers,
        batch=batch,
        config=replace(probe_config, noise_levels=float(config.noise_levels)),
    )
    return model, training, probe


def _save(run: Run, training: Training, probe: StabilityProbe) -> None:
    """Store the records, and the training state that goes with them; a full disk ends nothing.

    Where records could not be stored, the state of an earlier step stays, after which they can be
    taken again.
    """
    probe.flush()
    probed = probe.state_dict()
    probed.pop("batch", None)  # it follows from the settings
    state = {"training": training.state_dict(), "probe": probed}
    if probe.missing or not is_main():
        return
    try:
        save_state(run, state)
    except StabilityProbeError as error:
        warnings.warn(f"{error}; training goes on", RecordWarning, stacklevel=2)


def seeded_scaling(name: str, seed: int) -> Scaling:
    """A scaling scheme by name, its weights (if it has any) drawn from a seed.

    >>> seeded_scaling("cs:0.7", 0).coefficients(2)
    [1.0, 0.7]
    """
    return parse_scaling(name, torch.Generator().manual_seed(seed + 1))


@dataclass(frozen=True)
class EnsembleConfig:
    """Random networks of Eq. 4, on which Theorems 3.1 and 3.3 have explicit laws.

    Attributes:
        networks: how many.
        m: width.
        n_skips: N.
        merge: `add` or `concat`.
        unit_gain: blocks of mean-square gain 1 instead of 2.
        final_relu: end blocks with a ReLU, which breaks a premise of the law.
        samples: Gaussian inputs, and Gaussian targets, a network.
        seed: the first network's seed; the others follow it.
        gradients: also record per-sample gradients, for the law of Theorem 3.3; it takes as long
            again.

    Raises:
        StabilityProbeError: if a number is below 1.
    """

    networks: int = 200
    m: int = 256
    n_skips: int = 5
    merge: str = "add"
    unit_gain: bool = True
    final_relu: bool = False
    samples: int = 8
    seed: int = 0
    gradients: bool = True

    def __post_init__(self) -> None:
        for name in ("networks", "m", "n_skips", "samples"):
            if getattr(self, name) < 1:
                raise StabilityProbeError(f"{name} must be at least 1, got {getattr(self, name)}")


def record_ensemble(
    config: EnsembleConfig,
    schemes: Sequence[str],
    folder: str | Path,
    on_network: Callable[[], None] | None = None,
) -> list[Run]:
    r"""Record the feature and gradient energies of random networks, under several schemes each.

    Features over the samples, gradients and what their law depends on sample by sample: the losses
    $\ell_s$, and the energies of $x_t$ and of the targets, $y \sim \mathcal{N}(0, I_m)$.

    Args:
        config: the networks.
        schemes: names of scaling schemes; every network is run under each of them.
        folder: where the runs go, one folder a scheme; in their records a step is a network.
        on_network: called after every network.

    Returns:
        One run a scheme.
    """
    runs = {name: Run(Path(folder) / name.replace(":", "-"), asdict(config)) for name in schemes}
    buffers = {name: RecordBuffer() for name in schemes}
    blocks: dict[str, dict[str, Block]] = {}  # by scheme; those of all networks are the same
    for name, run in runs.items():
        kappa = parse_scaling(name).coefficients(config.n_skips)
        gain = 1.0 if config.unit_gain else 2.0
        about = {"scheme": name, "kappa": kappa, "unmet": parse_scaling(name).unmet}
        run.begin({"kind": "ensemble", **about, "block_gain": gain})
    state, reason = "complete", None
    try:
        for index in range(config.networks):
            seed = config.seed + index
            net, batch = _random_network(config, seed)
            skips = find_skips(net, batch.x[:1])
            for name, buffer in buffers.items():
                with scale_skips(net, skips, seeded_scaling(name, seed)):
                    energies = _feature_energies(net, batch.x, skips)
                    buffer.add(index + 1, *summarise(energies, None, torch.empty(0)))
                    if config.gradients:
                        if name not in blocks:
                            blocks[name] = parameter_blocks(net, skips, batch.x[:1])
                        singly = _gradient_energies(net, batch, blocks[name])
                        buffer.add(index + 1, *per_sample(singly))
            if on_network is not None:
                on_network()
    except BaseException as error:
        state, reason = "failed", f"{type(error).__name__}: {error}"
        raise
    finally:
        for name, run in runs.items():
            run.append(buffers[name].frame())
            run.end(state, reason, {})
    return list(runs.values())


def _random_network(config: EnsembleConfig, seed: int) -> tuple[TheoryUNet, ProbeBatch]:
    """A network, and Gaussian inputs and targets (samples, m) for it."""
    generator = torch.Generator().manual_seed(seed)
    net = TheoryUNet(
        config.m,
        config.n_skips,
        merge=config.merge,
        unit_gain=config.unit_gain,
        final_relu=config.final_relu,
        generator=generator,
    )
    x, y = (torch.randn(config.samples, config.m, generator=generator) for _ in range(2))
    return net, ProbeBatch((x,), target=y)


def _feature_energies(
    net: TheoryUNet, x: Tensor, skips: Sequence[SkipConnection]
) -> dict[Key, Tensor]:
    """What a feature probe sees of one pass."""
    with ExitStack() as stack, torch.enable_grad():
        features = FeatureProbe(skips)
        features.attach(net, stack)
        features.active = True
        net(x)
    return features.samples(grad_scale=1.0)


def _gradient_energies(
    net: TheoryUNet, batch: ProbeBatch, blocks: Mapping[str, Block]
) -> dict[Key, Tensor]:
    """ℓ_s and the gradient energies of a_i, b_i, with ‖x_t‖² and ‖y‖², sample by sample."""
    assert batch.target is not None
    return {
        Key("sample_energy", "x", 0, ""): batch.x.square().sum(1),
        Key("sample_energy", "target", 0, ""): batch.target.square().sum(1),
        **sample_gradients(net, blocks, batch, MEMORY),
    }
