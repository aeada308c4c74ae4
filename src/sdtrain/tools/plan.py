"""What a params file will do, without doing it: pictures, steps, memory, disk and, if asked, time."""

import shutil
import time
from pathlib import Path

import torch

from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import read_manifest
from sdtrain.models.parts import pick_device, read_configs
from sdtrain.params.machine import count_micro_batches, count_processes
from sdtrain.params.schema import Params
from sdtrain.training.devices import build_accelerator
from sdtrain.training.files import TrainFiles
from sdtrain.training.optimizer import build_lr_scheduler, check_warmup, count_steps, peak_lr
from sdtrain.training.preflight import check_cache, estimate_costs, total_memory_bytes
from sdtrain.training.spec import read_spec
from sdtrain.training.states import StateStore
from sdtrain.training.step import optimizer_step
from sdtrain.training.trainer import build_trainer


def plan_run(params: Params, files: TrainFiles, num_timed_steps: int) -> list[str]:
    """The plan, line by line.

    Args:
        files: as for `train`; `base` may be the folder that the base will be taken from.
        num_timed_steps: train that many steps to learn how long one takes; 0 trains none.

    Raises:
        InputError: the base isn't there to be read, the params can't be run, or steps are to be timed without a cache.
    """
    train, device, latents = params.train, pick_device(), files.latents
    if (latents / "manifest.json").exists():
        check_cache(read_manifest(latents, "latents"), params.precompute, params.seed, latents)
    num_train, num_held_out, origin = _count_pictures(params, latents)
    num_steps = count_steps(train, num_train)
    check_warmup(train, num_steps)
    num_processes = count_processes()
    if num_timed_steps and num_processes > 1:
        raise InputError(f"--time-steps: times one process, the environment asks for {num_processes}; unset NPROC")
    num_micro_batches = count_micro_batches(train, num_processes)
    costs = estimate_costs(params, files.base, read_configs(files.base).latent_shape(params.precompute.resolution))
    disk_bytes = 3 * costs.state_bytes + (2 * train.num_best_checkpoints + 3) * costs.checkpoint_bytes
    free_bytes = shutil.disk_usage(next(p for p in files.states.absolute().parents if p.exists())).free
    num_validations = num_steps // params.validation.every_n_steps + bool(num_steps % params.validation.every_n_steps)
    asked = min(num_held_out, params.validation.max_samples) * params.validation.num_timesteps
    kinds = "raw and EMA" if train.use_ema else "raw"
    lines = {
        "pictures": f"{num_train:,} to train on, {num_held_out:,} held out ({origin})",
        "steps": f"{num_steps:,} of {train.batch_size} pictures, {num_steps * train.batch_size / num_train:.1f} epochs",
        "effective batch": (
            f"{train.batch_size} = {num_processes} processes x {num_micro_batches} micro-batches "
            f"x {train.micro_batch_size}"
        ),
        "learning rate": f"{peak_lr(train):g} at its top, {train.lr_scheduler}, {train.lr_warmup_steps} steps warm-up",
        "objective": f"{train.prediction_type}, snr_gamma {train.snr_gamma}, {train.timestep_sampling} timesteps",
        "trained": f"{costs.num_parameters:,} parameters ({params.method.name}), {train.optimizer}, {train.precision}",
        "memory": (
            f"about {_gib(costs.memory_bytes)} per process, of {_gib(total_memory_bytes(device))} on this "
            f"{device.type}: weights {_gib(costs.weights_bytes)}, gradients {_gib(costs.gradients_bytes)}, optimizer "
            f"{_gib(costs.optimizer_bytes)}, EMA {_gib(costs.ema_bytes)}, frozen parts {_gib(costs.frozen_bytes)}, "
            f"activations {_gib(costs.activations_bytes)}"
        ),
        "disk": f"about {_gib(disk_bytes)} for saved states and checkpoints, {_gib(free_bytes)} free",
        "validations": f"{num_validations + 1}, of {asked:,} noised latents each, {kinds} weights",
        "resume": _saved_state(params, files),
        "time": "not measured; --time-steps 5 trains five steps to tell",
    }
    if num_timed_steps:
        step_s = _time_step(params, files, num_timed_steps)
        lines["time"] = (
            f"about {num_steps * step_s / 60:.1f} min of training steps, {1000 * step_s:.0f} ms each here "
            f"({num_timed_steps} timed); validation and saving come on top"
        )
    return [f"{name:16} {text}" for name, text in lines.items()]


def _count_pictures(params: Params, latents: Path) -> tuple[int, int, str]:
    """Pictures to train on and held out, and where the numbers come from."""
    if (latents / "manifest.json").exists():
        splits = read_manifest(latents, "latents")["splits"]
        train, held_out = (sum(shard["num_rows"] for shard in splits[name]) for name in ("train", "validation"))
        return train, held_out, f"counted in {latents}"
    if params.dataset.source != "generated":
        raise InputError(f"{latents} isn't there, so the pictures aren't counted yet; run `dvc repro precompute`")
    held_out = round(params.dataset.num_scenes * params.dataset.validation_fraction)
    train = min(params.dataset.num_scenes - held_out, params.dataset.max_train_samples or params.dataset.num_scenes)
    return train, held_out, "about, as params.yaml says"


def _saved_state(params: Params, files: TrainFiles) -> str:
    if params.train.resume == "never":
        return "never: starts over"
    if not (files.base / "manifest.json").exists() or not (files.latents / "manifest.json").exists():
        return "not known before base and latents are there"
    spec = read_spec(params, files)
    store = StateStore(files.states, spec.identity)
    if saved := store.newest(spec.num_steps):
        return f"run {store.fingerprint} resumes from {saved}"
    if spec.origin:
        return f"run {store.fingerprint} branches from step {spec.origin.step} of {spec.origin.folder}"
    return f"run {store.fingerprint} starts afresh; it has no saved state"


def _time_step(params: Params, files: TrainFiles, num_timed_steps: int) -> float:
    """Seconds per optimizer step, after one that isn't counted."""
    if not (files.latents / "manifest.json").exists():
        raise InputError(f"--time-steps: {files.latents} isn't there to train on; run `dvc repro precompute`")
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


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
