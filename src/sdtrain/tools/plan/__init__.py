"""What a params file will do, without doing it: images, steps, memory, disk and, if asked, time.

Nothing has to exist yet. The stages' outputs are counted if they match these params; otherwise the numbers follow from
params and the base's configs. From the hub only configs and a data set's card are read, some kB; if that fails, the
base is assumed to be a Stable Diffusion 1.x. Each number says where it comes from.
"""

import math
import shutil
import time
from pathlib import Path

import torch

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import existing
from sdtrain.methods import build_method
from sdtrain.models.parts import meta_parts, pick_device
from sdtrain.params.machine import count_micro_batches, count_processes
from sdtrain.params.schema import Params
from sdtrain.tools.plan.base import PARTS, Base, find_base, latent_shape
from sdtrain.tools.plan.disk import disk_items, disk_lines
from sdtrain.tools.plan.images import Images, count_images
from sdtrain.tools.plan.made import Made, find_made
from sdtrain.tools.plan.sizes import gib
from sdtrain.training.devices import build_accelerator
from sdtrain.training.files import TrainFiles
from sdtrain.training.memory import Costs, total_memory_bytes, training_costs
from sdtrain.training.optimizer import build_lr_scheduler, check_warmup, count_steps, peak_lr
from sdtrain.training.spec import read_spec
from sdtrain.training.states import StateStore
from sdtrain.training.step import optimizer_step
from sdtrain.training.trainer import build_trainer

Lines = list[tuple[str, str]]


def plan_run(params: Params, files: TrainFiles, dataset: Path, num_timed_steps: int) -> list[str]:
    """The plan, line by line.

    Args:
        files: as for `train`; none of them has to exist.
        dataset: where the stage `dataset` writes.
        num_timed_steps: train that many steps to measure how long one takes; 0 trains none.

    Raises:
        InputError: the params can't be run, a local base isn't there, or steps are to be timed without a cache.
    """
    num_processes = count_processes()
    num_micro_batches = count_micro_batches(params.train, num_processes)
    made = find_made(params, files, dataset)
    if num_timed_steps:
        _check_timing(num_processes, made, files)
    base = find_base(params.base, files.base, made.base)
    shape = latent_shape(base.configs, params.precompute.resolution)
    images = count_images(params.dataset, params.seed, files.latents, dataset, made)
    num_steps = _num_steps(params, images)
    costs = training_costs(base.configs, params.method, params.train, shape)
    lines = [
        *(("out of date", reason) for reason in made.stale),
        *_base_lines(base),
        *_steps_lines(params, images, num_steps),
        *_training_lines(params, costs, num_processes, num_micro_batches),
        *disk_lines(
            disk_items(params, base, images, costs, shape, made), shutil.disk_usage(existing(files.states)).free
        ),
        ("validations", _validations(params, images, num_steps, _conditions(params, base, shape[-1]))),
        ("resume", _saved_state(params, files, made)),
        ("time", _time(params, files, num_timed_steps, num_steps)),
    ]
    return [f"{name:16} {text}" for name, text in lines]


def _num_steps(params: Params, images: Images) -> int | None:
    """None if it depends on images that can't be counted."""
    if params.train.max_steps is None and images.num_train is None:
        return None
    num_steps = count_steps(params.train, images.num_train or 0)
    check_warmup(params.train, num_steps)
    return num_steps


def _base_lines(base: Base) -> Lines:
    """A line for each source of parts."""
    lines = []
    for origin in dict.fromkeys(base.origins.values()):
        parts = [part for part in PARTS if base.origins[part] == origin]
        name = "base" if len(parts) > 1 else f"base {parts[0].removesuffix('_encoder')}"
        lines.append(
            (name, f"{', '.join(f'{part} {base.num_parameters[part]:,}' for part in parts)} parameters ({origin})")
        )
    return lines


def _steps_lines(params: Params, images: Images, num_steps: int | None) -> Lines:
    train, until = params.train, "unknown until the images are counted"
    if images.num_train is None:
        counted, epochs = f"unknown ({images.origin})", f"epochs {until}"
    else:
        test = f" for validation, {images.num_test:,} for test" if images.num_test else ""
        counted = f"{images.num_train:,} to train on, {images.num_validation:,} held out{test} ({images.origin})"
        epochs = f"{num_steps * train.batch_size / max(1, images.num_train):.1f} epochs"
    if num_steps is None:
        steps = f"{train.max_epochs:,} epochs, steps of {train.batch_size} images {until} (train.max_epochs)"
    else:
        key = "max_steps" if train.max_steps else "max_epochs"
        steps = f"{num_steps:,} of {train.batch_size} images, {epochs} (train.{key})"
    return [("images", counted), ("steps", steps)]


def _validations(params: Params, images: Images, num_steps: int | None, conditions: tuple[str, ...]) -> str:
    every, most = params.validation.every_n_steps, params.validation.max_samples
    times = f"one every {every:,} steps" if num_steps is None else f"{math.ceil(num_steps / every) + 1:,}"
    at_most, num_images = ("up to ", most) if images.num_validation is None else ("", images.num_validation)
    num_latents = min(most, num_images) * params.validation.num_timesteps
    kinds = "raw and EMA" if params.train.use_ema else "raw"
    swapped = " and ".join(f"another image's {name}" for name in ["caption", *conditions])
    return f"{times}, of {at_most}{num_latents:,} noised latents each, {kinds} weights, and again with {swapped}"


def _conditions(params: Params, base: Base, latent_size: int) -> tuple[str, ...]:
    """Those whose use the run will measure."""
    with torch.device("meta"):
        return build_method(params.method, meta_parts(base.configs, latent_size)).conditions


def _training_lines(params: Params, costs: Costs, num_processes: int, num_micro_batches: int) -> Lines:
    train, device = params.train, pick_device()
    split = f"{num_processes} processes x {num_micro_batches} micro-batches x {train.micro_batch_size}"
    lr = f"{peak_lr(train):g} peak, {train.lr_scheduler}, {train.lr_warmup_steps} steps warm-up"
    objective = f"{train.prediction_type}, snr_gamma {train.snr_gamma}, {train.timestep_sampling} timesteps"
    trained = f"{costs.num_parameters:,} parameters ({params.method.name}), {train.optimizer}, {train.precision}"
    memory = (
        f"about {gib(costs.memory_bytes)} per process, of {gib(total_memory_bytes(device))} on this "
        f"{device.type}: weights {gib(costs.weights_bytes)}, gradients {gib(costs.gradients_bytes)}, optimizer "
        f"{gib(costs.optimizer_bytes)}, EMA {gib(costs.ema_bytes)}, frozen parts {gib(costs.frozen_bytes)}, "
        f"activations {gib(costs.activations_bytes)}"
    )
    return [
        ("effective batch", f"{train.batch_size} = {split}"),
        ("learning rate", lr),
        ("objective", objective),
        ("trained", trained),
        ("memory", memory),
    ]


def _saved_state(params: Params, files: TrainFiles, made: Made) -> str:
    if params.train.resume == "never":
        return "never: starts over"
    if not made.latents or not made.base or not (files.base / "manifest.json").exists():
        return "unknown until base and latents are there"
    spec = read_spec(params, files)
    store = StateStore(files.states, spec.identity)
    if saved := store.newest(spec.num_steps):
        return f"run {store.fingerprint} resumes from {saved}"
    if spec.origin:
        return f"run {store.fingerprint} branches from step {spec.origin.step} of {spec.origin.folder}"
    return f"run {store.fingerprint} starts from scratch: it has no saved state"


def _check_timing(num_processes: int, made: Made, files: TrainFiles) -> None:
    """Check that steps can be timed now.

    Raises:
        InputError: there would be several processes, or something to train on is missing.
    """
    if num_processes > 1:
        raise InputError(f"--time-steps: times one process, but the environment asks for {num_processes}; unset NPROC")
    lacks = [
        made.why_not(folder) for folder, fits in ((files.base, made.base), (files.latents, made.latents)) if not fits
    ]
    if lacks:
        raise InputError(f"--time-steps: {'; '.join(lacks)}; run `dvc repro precompute`, or plan without --time-steps")


def _time(params: Params, files: TrainFiles, num_timed_steps: int, num_steps: int | None) -> str:
    if not num_timed_steps:
        return "not measured; --time-steps 5 trains five steps to measure it, once base and latents are there"
    step_s = _time_step(params, files, num_timed_steps)
    return (
        f"about {num_steps * step_s / 60:.1f} min of training steps, {1000 * step_s:.0f} ms each here "
        f"({num_timed_steps} timed); validation and saving not included"
    )


def _time_step(params: Params, files: TrainFiles, num_timed_steps: int) -> float:
    """Seconds per optimizer step, after one untimed step."""
    trainer = build_trainer(params, files, build_accelerator(params.train))
    lr_scheduler = build_lr_scheduler(trainer.optimizer, params.train, num_timed_steps + 1, num_done=0)
    optimizer_step(trainer, lr_scheduler, 0)
    _wait_for(trainer.accelerator.device)
    started = time.perf_counter()
    for step in range(num_timed_steps):
        optimizer_step(trainer, lr_scheduler, step + 1)
    _wait_for(trainer.accelerator.device)
    return (time.perf_counter() - started) / num_timed_steps


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
