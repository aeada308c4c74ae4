"""Train on cached latents: the loop.

`train` is the loop; one iteration is `optimizer_step` in `training/step.py`. `training/run.py` starts or resumes a
run, `training/trainer.py` builds what it works on, `training/curves.py` records it.
"""

import sys
from functools import partial
from signal import Signals

from sdtrain.evaluation.faults import dropped_captions
from sdtrain.ground.files import disk_errors_explained, is_sealed, new_folder, write_json
from sdtrain.methods.checkpoints import copy_checkpoint, save_checkpoint
from sdtrain.params.schema import Params
from sdtrain.training.files import TrainFiles
from sdtrain.training.images import has_images, keep_images, write_images
from sdtrain.training.interruption import Interruption
from sdtrain.training.run import Run, start_run
from sdtrain.training.selection import Candidate, ranked
from sdtrain.training.step import optimizer_step
from sdtrain.training.validation import draw_images, validate

_ADVICE = (
    "Look at its images before you use it. Usual causes: train.lr is too low or far too high, the run is too short, or "
    "the data's captions or conditions don't belong to their images."
)


def train(params: Params, files: TrainFiles) -> None:
    """Train the method on the cached latents, resuming from the run's last saved state where there is one.

    Raises:
        InputError: a check before the first step fails, a state can't be resumed, or a loss is no longer finite.
        SystemExit: 128 + the signal's number, on SIGINT or SIGTERM, once the state is saved.
    """
    run = start_run(params, files)
    trainer, curves, trackers, num_steps = run.trainer, run.curves, run.trackers, run.spec.num_steps
    interruption = Interruption(trainer.accelerator.num_processes)
    safe = partial(disk_errors_explained, safe=lambda: curves.last_good)
    with safe(), interruption.watching():
        for step in range(run.first_step, num_steps + 1):  # `step`: optimizer steps made so far
            if step % params.validation.every_n_steps == 0 and not curves.has_validated(step):
                validate_and_keep(run, step)
                stop_if_asked(run, interruption, step)
            if step == num_steps or run.has_stalled():
                break
            curves.add_step(optimizer_step(trainer, run.lr_scheduler, step))
            trackers.step()
            if (step + 1) % params.train.log_every_n_steps == 0:
                trackers.train_row(curves.flush())
            if (step + 1) % params.train.save_every_n_steps == 0:
                save(run, step + 1)
            stop_if_asked(run, interruption, step + 1)
        # Saved first: a longer run that resumes from here doesn't have this row, and may not have this validation.
        save(run, step)
        trackers.train_row(curves.flush())
        if not curves.has_validated(step):
            validate_and_keep(run, step)
        stop_if_asked(run, interruption, step)
    with safe():
        trackers.close()
        if trainer.accelerator.is_main_process:
            write_outs(run, step)
            run.store.finish(step)
            run.store.unlock()


def validate_and_keep(run: Run, step: int) -> None:
    """Validate after `step` steps, and keep the checkpoint if it is one of the best."""
    trainer = run.trainer
    found = validate(trainer, run.held_out)
    row = run.curves.add_validation(step, run.held_out.timesteps.tolist(), found.losses, found.gaps)
    run.trackers.validation_row(row, found.images)
    if found.images:
        keep_images(run.store.images(step), found.images, run.images_asked())
    for sentence in run.curves.unused_conditions():
        trainer.accelerator.print(f"step {step}: {sentence}")
    loss = run.curves.validation_losses(step)["raw" if trainer.ema is None else "ema"]
    best = ranked(run.best, Candidate(step=step, loss=loss), run.spec.params.train.num_best_checkpoints)
    if best != run.best:
        run.best = best
        if trainer.accelerator.is_main_process:
            place = run.store.checkpoint(step)
            if not is_sealed(place):  # else a state beyond this run's end may refer to it
                save_checkpoint(place, trainer.method, trainer.ema, run.config(step))
            run.store.tidy([candidate.step for candidate in best])
    trainer.accelerator.wait_for_everyone()
    run.curves.restart_clock()


def save(run: Run, step: int) -> None:
    """Save the state after `step` steps."""
    trainer, fields = run.trainer, run.head_fields()
    if trainer.accelerator.is_main_process:
        path = run.store.save(step, trainer.weights, trainer.ema, trainer.optimizer, fields)
        run.curves.last_good = f"the last good state is {path}"
    trainer.accelerator.wait_for_everyone()
    run.curves.restart_clock()


def stop_if_asked(run: Run, interruption: Interruption, step: int) -> None:
    """After `step` steps, save and end the process if a signal asked for it."""
    signal = interruption.asked()
    if not signal:
        return
    save(run, step)
    run.trackers.close()
    if run.trainer.accelerator.is_main_process:
        run.store.unlock()
        again = "with train.resume: auto" if run.spec.params.train.resume == "never" else "the same command"
        print(
            f"\nstopped by {Signals(signal).name} after step {step} of {run.spec.num_steps}; {again} resumes from "
            f"{run.store.state(step)}",
            file=sys.stderr,
        )
    sys.exit(128 + signal)


def write_outs(run: Run, step: int) -> None:
    """Write the checkpoints (the best ones copied from the run's folder, and the last), curves, images and summary."""
    files = run.spec.files
    with new_folder(files.checkpoints) as folder:
        for rank, best in enumerate(run.best, start=1):
            place = folder / ("best" if rank == 1 else f"best-{rank}")
            # With the run's current provenance: it may have been extended since the checkpoint was saved.
            copy_checkpoint(run.store.checkpoint(best.step), place, run.provenance())
        save_checkpoint(folder / "last", run.trainer.method, run.trainer.ema, run.config(step))
    run.curves.write(files.train_curve, files.speed_curve, files.validation_curve)
    write_validation_images(run, step)
    write_json(files.metrics, summary(run, step))
    if run.spec.origin is None and (fault := run.curves.learning_fault()):  # a branch has learned before
        print(f"WARNING: {fault}", file=sys.stderr)
    if fault := dropped_captions(run.spec.params.train.caption_dropout):
        print(f"WARNING: {fault}", file=sys.stderr)
    if sentences := run.curves.unused_conditions():
        print("\n".join(["WARNING: the model ignores what it is told:", *sentences, _ADVICE]), file=sys.stderr)


def write_validation_images(run: Run, step: int) -> None:
    """Write the images of the run's validations, and draw the last ones if others were asked for when it ended."""
    asked, last = run.images_asked(), run.store.images(step)
    if asked["prompts"] and not has_images(last, asked):
        keep_images(last, draw_images(run.trainer, run.held_out), asked)
    steps = [row["step"] for row in run.curves.validation_rows if row["step"]]
    write_images(run.spec.files.validation_images, {step: run.store.images(step) for step in steps}, asked)


def summary(run: Run, step: int) -> dict:
    """metrics/train.json."""
    curves = run.curves
    return {
        "num_steps": step,
        "num_skipped_steps": curves.num_skipped_steps,
        "num_parameters": sum(p.numel() for p in run.trainer.weights.values()),
        "train_loss": curves.train_rows[-1]["loss"] if curves.train_rows else None,
        "base_validation_loss": curves.validation_rows[0]["loss_raw"],
        "best_validation_loss": run.best[0].loss,
        "best_step": run.best[0].step,
    }
