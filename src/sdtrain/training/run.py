"""Starts a run, after all checks: from scratch, from its own saved state, or as a branch of another run."""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LRScheduler

from sdtrain.evaluation.held_out import HeldOut
from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import check_base_files, check_latent_files
from sdtrain.params.machine import SWEEP_TASK, check_trackers
from sdtrain.params.schema import Params
from sdtrain.training.curves import Curves
from sdtrain.training.devices import build_accelerator, device_name
from sdtrain.training.disk import check_disk
from sdtrain.training.files import TrainFiles
from sdtrain.training.identity import SPLIT, describe, git_commit
from sdtrain.training.images import asked_images
from sdtrain.training.optimizer import build_lr_scheduler
from sdtrain.training.preflight import check_base, check_run
from sdtrain.training.selection import Candidate, has_stalled
from sdtrain.training.spec import RunSpec, read_spec
from sdtrain.training.state_files import StateHead, load_state
from sdtrain.training.states import StateStore
from sdtrain.training.step import weights_norm
from sdtrain.training.trackers import Trackers
from sdtrain.training.trainer import Trainer, build_trainer
from sdtrain.training.validation import build_held_out, drawn_prompts


@dataclass
class Run:
    """A training run at the step where it starts or resumes."""

    spec: RunSpec
    trainer: Trainer
    held_out: HeldOut
    store: StateStore
    curves: Curves
    trackers: Trackers
    lr_scheduler: LRScheduler
    first_step: int
    """Optimizer steps made already."""
    best: list[Candidate]
    """The best checkpoints, stored at `store.checkpoint(step)`, by rising loss."""
    name: str
    commit: str | None
    """The git commit at the start; asked for once, because a signal to all processes would end git, too."""
    trained_with: dict
    """All params that the run was last trained with."""

    def has_stalled(self) -> bool:
        """Whether early stopping's patience has run out."""
        validated = [row["step"] for row in self.curves.validation_rows]
        return has_stalled(self.best, validated, self.spec.params.train.early_stopping_patience)

    def images_asked(self) -> dict:
        """What the images of the run's validations show and how, as the params ask now."""
        return asked_images(self.spec.params.validation, drawn_prompts(self.trainer, self.held_out))

    def head_fields(self) -> dict:
        """The run's fields of a `StateHead`, as JSON; every process must call it."""
        scaler, ema = self.trainer.accelerator.scaler, self.trainer.ema
        return {
            "log": self.curves.state(),
            "best": [candidate.model_dump() for candidate in self.best],
            "num_steps": self.spec.num_steps,
            "run_name": self.name,
            "num_updates": self.lr_scheduler.last_epoch,
            "ema_step": ema.optimization_step if ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "params": self.trained_with,
        }

    def config(self, step: int) -> dict:
        """training_config.json of the checkpoint after `step` steps."""
        ema = self.trainer.ema
        return {
            "step": step,
            "validation_loss": self.curves.validation_losses(step),
            "ema_step": ema.optimization_step if ema else None,
            **self.provenance(),
        }

    def provenance(self) -> dict:
        """What the training_config.json of each checkpoint says about the run."""
        return {
            "fingerprint": self.spec.fingerprint,
            "identity": self.spec.identity,
            "num_steps": self.spec.num_steps,
            "num_train": self.spec.num_train,
            "num_validation": self.spec.cache.num_rows("validation"),
            "git_commit": self.commit,
            "device": device_name(self.trainer.accelerator.device),
            "resumed_from": self.spec.branch,
            "params": self.trained_with,
        }


def start_run(params: Params, files: TrainFiles) -> Run:
    """Check everything, lock the run, and restore it to the step that it starts from.

    Raises:
        InputError: a check fails; names what is wrong.
    """
    spec = read_spec(params, files)
    check_trackers(params.train.trackers)
    accelerator = build_accelerator(params.train)
    store = StateStore(files.states, spec.identity)
    if accelerator.is_main_process:
        store.lock()
        check_base_files(files.base)
        check_latent_files(files.latents)
        if spec.origin:
            spec.origin.verify()
    accelerator.wait_for_everyone()
    trainer = build_trainer(params, files, accelerator)
    held_out = build_held_out(trainer, files)
    costs = check_run(spec, trainer)
    if accelerator.is_main_process:
        spare = spec.origin.folder if spec.origin else None
        store.prune(params.train.num_saved_runs, spare, is_swept=SWEEP_TASK in os.environ)
        if params.train.resume == "never":
            store.clear()
    saved = _agreed_state(store, spec.num_steps, accelerator)
    if accelerator.is_main_process:
        best = params.train.num_best_checkpoints
        check_disk(costs, best, files.states, files.checkpoints, store.size_bytes())
    if saved:
        head = _restore(spec, trainer, saved)
        run = _open(spec, trainer, held_out, store, head, head.num_updates)
        run.curves.last_good = f"the last good state is {saved}"
    else:
        base_losses, gaps = check_base(spec, trainer, held_out)
        num_updates = _branch(spec, trainer)
        run = _open(spec, trainer, held_out, store, None, num_updates)
        kinds = ("raw",) if trainer.ema is None else ("raw", "ema")
        row = run.curves.add_validation(0, held_out.timesteps.tolist(), dict.fromkeys(kinds, base_losses), gaps)
        run.trackers.validation_row(row, images=[])
        run.curves.start(run.first_step, weights_norm(trainer).item())
        if accelerator.is_main_process and params.train.resume == "auto" and (why := store.why_none()):
            print(why)
    return run


def _agreed_state(store: StateStore, num_steps: int, accelerator: Accelerator) -> Path | None:
    """The undamaged state that the main process found; checks that every process sees it."""
    accelerator.wait_for_everyone()
    found = store.newest_sound(num_steps) if accelerator.is_main_process else None
    (name,) = broadcast_object_list([found and found.name])
    path = store.folder / name if name else None
    if path is None:
        return None
    if not (path / "state.json").exists():
        raise InputError(
            f"{path}: the main process sees this state, this one doesn't; put the project in a shared folder"
        )
    return path


def _restore(spec: RunSpec, trainer: Trainer, saved: Path) -> StateHead:
    """Load the run's own saved state."""
    head = load_state(saved, trainer.weights, trainer.ema, trainer.optimizer)
    if trainer.accelerator.scaler and head.scaler:
        trainer.accelerator.scaler.load_state_dict(head.scaler)
    trainer.accelerator.print(f"resumes from step {head.step} of {spec.num_steps}: {saved}")
    return head


def _branch(spec: RunSpec, trainer: Trainer) -> int:
    """Load what the origin, if any, has and isn't reset; returns the schedule's steps that are done."""
    origin = spec.origin
    if origin is None:
        return 0
    num_updates = origin.load(trainer.method, trainer.weights, trainer.ema, trainer.optimizer)
    reset = f", {', '.join(origin.reset)} reset" if origin.reset else ""
    differs = spec.branch["differences"]
    trainer.accelerator.print(f"branches from step {origin.step} of {origin.folder}{reset}; differs in {differs}")
    return 0 if "scheduler" in origin.reset else num_updates


def _open(
    spec: RunSpec, trainer: Trainer, held_out: HeldOut, store: StateStore, head: StateHead | None, num_updates: int
) -> Run:
    """The run around a trainer whose weights are in place.

    Args:
        head: of the run's own saved state, if it resumes.
    """
    train, accelerator = spec.params.train, trainer.accelerator
    first_step = head.step if head else spec.origin.step if spec.origin else 0
    name = head.run_name if head else f"{datetime.now():%Y%m%d-%H%M%S}-{os.environ.get('DVC_EXP_NAME') or 'repro'}"
    shape, num_train_timesteps = spec.cache.shape, len(trainer.objective.alphas_cumprod)
    restored = head.log if head else None
    progress = {"first_step": first_step, "num_steps": spec.num_steps, "resumed": head is not None}
    run = Run(
        spec=spec,
        trainer=trainer,
        held_out=held_out,
        store=store,
        curves=Curves(accelerator, train, trainer.method.logged, shape, num_train_timesteps, restored),
        trackers=Trackers(accelerator, train.trackers, spec.files.runs, name, **progress),
        lr_scheduler=build_lr_scheduler(trainer.optimizer, train, spec.num_steps - spec.schedule_start, num_updates),
        first_step=first_step,
        best=head.best if head else [],
        name=name,
        commit=git_commit(),
        trained_with=spec.params.model_dump(),
    )
    if spec.origin:
        run.curves.last_good = f"the last good state is {spec.origin.folder}"
    if head and (first_step >= spec.num_steps or run.has_stalled()):
        _take_over(run, head.params)
    return run


def _take_over(run: Run, earlier: dict) -> None:
    """Nothing is left to train: record the split that was run, and say that another one has no effect."""
    now, split = run.trained_with["train"], {key: earlier["train"][key] for key in sorted(SPLIT)}
    unused = {f"train.{key}": (value, now[key]) for key, value in split.items() if value != now[key]}
    without_effect = f" ({describe(unused)}: no effect)" if unused else ""
    run.trainer.accelerator.print(
        f"run {run.spec.fingerprint} was already trained to its end ({run.first_step} steps): that result is used and "
        f"nothing is trained{without_effect}; to train it again, set train.resume: never"
    )
    run.trained_with = {**run.trained_with, "train": {**now, **split}}
