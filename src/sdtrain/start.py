"""How a run starts: afresh, on from its own saved state, or as a branch of another's; checked before step 1."""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import get_args

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DDPMScheduler
from torch.optim.lr_scheduler import LRScheduler

from sdtrain import checks
from sdtrain.checkpoints import is_checkpoint
from sdtrain.diffusion import PredictionType
from sdtrain.errors import InputError
from sdtrain.heldout import HeldOut
from sdtrain.identity import git_commit, training_identity
from sdtrain.manifests import encoders_fingerprint, read_manifest
from sdtrain.optimization import build_lr_scheduler, check_warmup, count_steps
from sdtrain.params import PrecomputeParams, TrainParams, ValidationParams
from sdtrain.resume import Origin, StateStore, find_origin, load_state, read_state
from sdtrain.setup import Setup, build_accelerator, held_out_losses, prepare, weights_norm
from sdtrain.shards import LatentShards
from sdtrain.telemetry import RunLog, build_trackers, check_trackers


@dataclass
class Run:
    """A training run at the step where it starts or goes on."""

    setup: Setup
    held_out: HeldOut
    lr_scheduler: LRScheduler
    num_steps: int
    first_step: int
    """Optimizer steps made already."""
    best: list[dict]
    """`step` and `loss` of the best checkpoints, which lie in `store.checkpoints`, by rising loss."""
    store: StateStore
    log: RunLog
    run_name: str
    facts: dict
    """What every checkpoint's training_config.json says of the run."""

    def state(self) -> dict:
        """What a saved state holds beside tensors; every process must ask."""
        scaler = self.setup.accelerator.scaler
        return {
            "log": self.log.state(),
            "best": self.best,
            "run_name": self.run_name,
            "num_updates": self.lr_scheduler.last_epoch,
            "ema_step": self.setup.ema.optimization_step if self.setup.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
        }


def start_run(
    params: TrainParams,
    validation: ValidationParams,
    precompute: PrecomputeParams,
    seed: int,
    record: dict,
    base: Path,
    latents: Path,
    out: Path,
    runs: Path,
    resume: Path,
) -> Run:
    """Check everything, take the run's lock, and bring it to the step that it goes on from.

    Args:
        out: where the checkpoints will go; only looked at.
        runs: folder of the trackers' files.
        resume: folder of the saved states.

    Raises:
        InputError: something isn't as it must be; names it.
    """
    manifest = read_manifest(latents, "latents")
    checks.check_cache(manifest, precompute, seed, latents)
    num_train = sum(shard["num_rows"] for shard in manifest["splits"]["train"])
    num_steps = count_steps(params, num_train)
    origin = find_origin(params.resume, params.resume_reset, out, num_steps)
    schedule_start = origin.step if origin and "scheduler" in origin.reset else 0
    check_warmup(params, num_steps - schedule_start)
    check_trackers(params.trackers)
    identity = training_identity(params, validation, seed, num_steps, base, latents, origin.facts() if origin else None)
    branch = {**origin.facts(), "differences": origin.check(identity)} if origin else None

    accelerator = build_accelerator(params)
    store = StateStore(resume, identity)
    if accelerator.is_main_process:
        store.lock()
    accelerator.wait_for_everyone()
    s = prepare(params, seed, base, latents, accelerator)
    held_out_shards = LatentShards(latents, "validation", encoders_fingerprint(base))
    held_out = HeldOut(
        held_out_shards,
        s.text_encoder,
        s.vae.config.scaling_factor,
        num_train_timesteps=len(s.alphas_cumprod),
        num_timesteps=validation.num_timesteps,
        max_samples=validation.max_samples,
        batch_size=validation.batch_size,
    )
    checks.check_tokens(manifest, s.text_encoder.config.vocab_size, latents)
    checks.check_memory(s.costs, accelerator.device)
    first_latents = s.batches.make(0, range(min(params.batch_size, 64)), accelerator.device).latents
    std, psnr = checks.check_latents(first_latents), checks.check_vae(s.vae, held_out_shards, latents)

    if accelerator.is_main_process:
        store.prune(params.num_saved_runs, spare=origin.folder if origin else None)
        if params.resume == "never":
            store.clear()
        checks.check_disk(s.costs, params.num_best_checkpoints, resume, out, store.size_bytes())
    saved = _agreed_state(store, num_steps, accelerator)
    state = read_state(saved) if saved else {}
    first_step = state.get("step", origin.step if origin else 0)
    run_name = state.get("run_name") or f"{datetime.now():%Y%m%d-%H%M%S}-{os.environ.get('DVC_EXP_NAME') or 'repro'}"
    accelerator.log_with = build_trackers(params.trackers, runs, run_name, first_step + 1 if saved else 0)
    accelerator.init_trackers(run_name)
    log = RunLog(accelerator, num_steps, params, tuple(manifest["shape"]), len(s.alphas_cumprod), state.get("log"))
    if saved:
        load_state(saved, s.unet, s.ema, s.optimizer)
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        num_updates = state["num_updates"]
        log.last_good = f"the last good state is {saved}"
        accelerator.print(f"goes on from step {first_step} of {num_steps}: {saved}")
    else:
        base_losses = _check_base(s, held_out, base)
        kinds = ("raw",) if s.ema is None else ("raw", "ema")
        log.validation(0, held_out.timesteps.tolist(), dict.fromkeys(kinds, base_losses), images=[])
        num_updates = _branch(s, origin, branch, log) if origin else 0
        log.start(first_step, weights_norm(s).item())
        if accelerator.is_main_process and params.resume == "auto" and (why := store.why_none()):
            print(why)
    if accelerator.is_main_process:
        base_type, own_type = s.base_scheduler.config.prediction_type, params.prediction_type
        if base_type != own_type:
            print(
                f"train.prediction_type = {own_type!r}, the base predicts {base_type!r}: the UNet learns to predict "
                "something else than it does"
            )
        print(
            f"run {store.fingerprint}: latents' std {std:.2f}, VAE round trip {psnr:.1f} dB, "
            f"{s.costs.num_parameters:,} parameters, about {s.costs.memory_bytes / 2**30:.1f} GiB of memory"
        )
    return Run(
        setup=s,
        held_out=held_out,
        lr_scheduler=build_lr_scheduler(s.optimizer, params, num_steps - schedule_start, num_updates),
        num_steps=num_steps,
        first_step=first_step,
        best=state.get("best", []),
        store=store,
        log=log,
        run_name=run_name,
        facts={
            "fingerprint": store.fingerprint,
            "identity": identity,
            "num_steps": num_steps,
            "num_train": num_train,
            "git_commit": git_commit(),
            "resumed_from": branch,
            "params": record,
        },
    )


def _agreed_state(store: StateStore, num_steps: int, accelerator: Accelerator) -> Path | None:
    """The saved state that the main process found, once every process sees it."""
    accelerator.wait_for_everyone()
    found = store.newest(num_steps) if accelerator.is_main_process else None
    (name,) = broadcast_object_list([found and found.name])
    path = store.folder / name if name else None
    if path is None:
        return None
    if not (path / "state.json").exists():
        raise InputError(f"{path}: the main process sees this state, this one doesn't; share the project's folder")
    for best in read_state(path)["best"]:
        if not is_checkpoint(store.checkpoint(best["step"])):
            raise InputError(f"{store.checkpoint(best['step'])} is gone; to start over, delete {store.folder}")
    return path


def _check_base(s: Setup, held_out: HeldOut, base: Path) -> list[float]:
    """The base's held-out loss at each timestep, once it is what a trained UNet's is."""
    losses = {}
    for prediction_type in get_args(PredictionType):
        scheduler = DDPMScheduler.from_config(s.base_scheduler.config, prediction_type=prediction_type)
        losses[prediction_type] = held_out_losses(s, held_out, scheduler)
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    from_scratch = any("unet_config" in source for source in read_manifest(base, "base")["sources"])
    checks.check_base_loss(means, s.base_scheduler.config.prediction_type, from_scratch)
    return losses[s.base_scheduler.config.prediction_type]


def _branch(s: Setup, origin: Origin, branch: dict, log: RunLog) -> int:
    """Take over what the origin keeps and isn't reset; the schedule's steps that lie behind."""
    num_updates = origin.load(s.unet, s.ema, s.optimizer)
    reset = f", {', '.join(origin.reset)} reset" if origin.reset else ""
    differs = branch["differences"]
    s.accelerator.print(f"branches from step {origin.step} of {origin.folder}{reset}; differs in {differs}")
    log.last_good = f"the last good state is {origin.folder}"
    return 0 if "scheduler" in origin.reset else num_updates
