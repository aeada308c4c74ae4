"""Train the UNet on cached latents.

One step is algorithm 1 of Ho et al. 2020: draw x₀ (from the VAE's posterior), t and ε; noise;
predict; compare; step. `train_unet` is the loop, `optimizer_step` one turn of it; how a run starts
or goes on is in `start.py`, what it works on in `setup.py`, what it tells in `telemetry.py`.
"""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from shutil import copytree
from signal import Signals

import torch
from PIL import Image
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from sdtrain import randomness
from sdtrain.batches import Batch
from sdtrain.checkpoints import save_checkpoint
from sdtrain.diffusion import add_noise, min_snr_weights, target
from sdtrain.ema import averaged
from sdtrain.files import new_folder, read_json, write_json
from sdtrain.generation import build_pipeline, generate
from sdtrain.interruption import Interruption
from sdtrain.params import PrecomputeParams, TrainParams, ValidationParams
from sdtrain.setup import Setup, attention, held_out_losses, part_of, weights_norm
from sdtrain.start import Run, start_run
from sdtrain.telemetry import NUM_SUMS, StepFacts, batch_sums


def train_unet(
    params: TrainParams,
    validation: ValidationParams,
    precompute: PrecomputeParams,
    seed: int,
    record: dict,
    base: Path,
    latents: Path,
    out: Path,
    metrics: Path,
    train_curve: Path,
    speed_curve: Path,
    validation_curve: Path,
    runs: Path,
    resume: Path,
) -> None:
    """Fine-tune the UNet of `base` on the cached `latents`, on from the last saved state where there is one.

    Writes the best checkpoints and the last to `out`, the summary to `metrics`, the curves as CSV, the
    trackers' files to a folder in `runs`, and saved states to `resume`.

    Args:
        precompute: what the cache must have been made with.
        record: the whole params tree, for the checkpoints' training_config.json.

    Raises:
        InputError: a check before the first step fails, a state can't be resumed, or a loss stops being finite.
        SystemExit: 128 + the signal's number, on SIGINT or SIGTERM, once the state is saved.
    """
    run = start_run(params, validation, precompute, seed, record, base, latents, out, runs, resume)
    s, log = run.setup, run.log
    interruption = Interruption(s.accelerator.num_processes)
    with interruption.watching():
        for step in range(run.first_step, run.num_steps + 1):  # `step`: optimizer steps made so far
            if step % validation.every_n_steps == 0 and not log.has_validated(step):
                validate_and_keep(run, validation, step)
                stop_if_asked(run, interruption, step)
            if step == run.num_steps or has_stalled(run):
                break
            log.step(optimizer_step(s, run.lr_scheduler, step))
            if (step + 1) % params.log_every_n_steps == 0:
                log.flush()
            if (step + 1) % params.save_every_n_steps == 0:
                save(run, step + 1)
            stop_if_asked(run, interruption, step + 1)
        # Saved first: a longer run that goes on from here has neither this row nor, perhaps, this validation.
        save(run, step)
        log.flush()
        if not log.has_validated(step):
            validate_and_keep(run, validation, step)
        stop_if_asked(run, interruption, step)
    s.accelerator.end_training()
    if s.accelerator.is_main_process:
        write_checkpoints(run, step, out)
        log.write_curves(train_curve, speed_curve, validation_curve)
        write_json(metrics, summary(run, step))
        run.store.unlock()


def optimizer_step(s: Setup, lr_scheduler: LRScheduler, step: int) -> StepFacts:
    """Make the step that follows `step` steps: micro-batches, clipping, AdamW, schedule, EMA."""
    accelerator, device = s.accelerator, s.accelerator.device
    sums, data_wait_s = torch.zeros(NUM_SUMS, device=device), 0.0
    for micro in range(s.num_micro_batches):
        positions = positions_of(s, micro)
        started = time.perf_counter()
        batch = s.batches.make(step, positions, device)
        data_wait_s += time.perf_counter() - started
        torch.manual_seed(randomness.integer(s.seed, "dropout", step, positions.start))  # where the UNet has dropout
        with torch.no_grad():
            encoder_hidden_states = s.text_encoder(batch.input_ids).last_hidden_state
        synced = nullcontext() if micro == s.num_micro_batches - 1 else accelerator.no_sync(s.model)
        with synced, attention(s.params.attention_backend):
            losses = diffusion_losses(s, batch, encoder_hidden_states)
            accelerator.backward(losses.mean() / s.num_micro_batches)
        sums += batch_sums(batch, losses.detach(), len(s.alphas_cumprod))
    grad_norm = accelerator.clip_grad_norm_(s.unet.parameters(), s.params.max_grad_norm or float("inf"))
    lr = lr_scheduler.get_last_lr()[0]
    s.optimizer.step()
    skipped = s.optimizer.step_was_skipped  # by fp16's loss scaling, which then tries a smaller scale
    if not skipped:
        lr_scheduler.step()
        if s.ema is not None:
            s.ema.step(s.unet.parameters())
    s.optimizer.zero_grad(set_to_none=True)
    return StepFacts(sums, grad_norm, weights_norm(s), lr, skipped, data_wait_s)


def positions_of(s: Setup, micro: int) -> range:
    """The rows of the effective batch that this process takes in its `micro`-th pass."""
    index, num_processes = part_of(s)
    first = (micro * num_processes + index) * s.params.micro_batch_size
    return range(first, first + s.params.micro_batch_size)


def diffusion_losses(s: Setup, batch: Batch, encoder_hidden_states: Tensor) -> Tensor:
    """Each row's (weighted) squared error of the UNet's prediction, float32 [B] (Ho et al. 2020, eq. 14).

    Args:
        encoder_hidden_states: of the captions, [B, L, D].
    """
    prediction_type = s.params.prediction_type
    noisy_latents = add_noise(batch.latents, batch.input_noise, batch.timesteps, s.alphas_cumprod)
    with s.accelerator.autocast():
        model_pred = s.model(noisy_latents, batch.timesteps, encoder_hidden_states).sample
    wanted = target(batch.latents, batch.noise, batch.timesteps, s.alphas_cumprod, prediction_type)
    losses = (model_pred.float() - wanted).square().mean(dim=(1, 2, 3))
    if s.params.snr_gamma is not None:
        losses = losses * min_snr_weights(batch.timesteps, s.alphas_cumprod, s.params.snr_gamma, prediction_type)
    return losses


def validate_and_keep(run: Run, validation: ValidationParams, step: int) -> None:
    """Validate after `step` steps, and keep the checkpoint if it is one of the best."""
    s = run.setup
    losses, images = validate(run, validation)
    run.log.validation(step, run.held_out.timesteps.tolist(), losses, images)
    loss = run.log.validation_losses(step)["raw" if s.ema is None else "ema"]
    if len(run.best) < s.params.num_best_checkpoints or loss < run.best[-1]["loss"]:
        entries = sorted([*run.best, {"step": step, "loss": loss}], key=lambda best: best["loss"])
        run.best = entries[: s.params.num_best_checkpoints]
        if s.accelerator.is_main_process:
            save_checkpoint(run.store.checkpoint(step), s.unet, s.ema, training_config(run, step))
            run.store.tidy(run.best)
    s.accelerator.wait_for_everyone()
    run.log.restart_clock()


def validate(run: Run, validation: ValidationParams) -> tuple[dict[str, list[float]], list[Image.Image]]:
    """Held-out loss at each timestep of the `raw` weights and, where kept, the `ema`; pictures of the latter."""
    s, images = run.setup, []
    losses = {"raw": held_out_losses(s, run.held_out, s.scheduler)}
    with averaged(s.unet, s.ema):
        if s.ema is not None:
            losses["ema"] = held_out_losses(s, run.held_out, s.scheduler)
        if s.accelerator.is_main_process and s.accelerator.trackers:
            s.unet.eval()
            images = generate(
                build_pipeline(s.base, s.unet, s.scheduler, s.vae, s.text_encoder, s.tokenizer),
                validation.prompts,
                list(range(len(validation.prompts))),
                batch_size=validation.batch_size,
                num_inference_steps=validation.num_inference_steps,
                guidance_scale=validation.guidance_scale,
            )
            s.unet.train()
    return losses, images


def has_stalled(run: Run) -> bool:
    """Whether early stopping's patience is at its end."""
    patience = run.setup.params.early_stopping_patience
    if patience is None or not run.best:
        return False
    return sum(row["step"] > run.best[0]["step"] for row in run.log.validation_rows) >= patience


def save(run: Run, step: int) -> None:
    """Save the state after `step` steps."""
    s, state = run.setup, run.state()
    if s.accelerator.is_main_process:
        path = run.store.save(step, s.unet, s.ema, s.optimizer, state)
        run.log.last_good = f"the last good state is {path}"
    s.accelerator.wait_for_everyone()
    run.log.restart_clock()


def stop_if_asked(run: Run, interruption: Interruption, step: int) -> None:
    """After `step` steps, save and end the process if a signal asked for it."""
    signal = interruption.asked()
    if not signal:
        return
    save(run, step)
    run.setup.accelerator.end_training()
    if run.setup.accelerator.is_main_process:
        run.store.unlock()
        again = "with train.resume: auto" if run.setup.params.resume == "never" else "the same command"
        print(
            f"\nstopped by {Signals(signal).name} after step {step} of {run.num_steps}; {again} goes on from "
            f"{run.store.state(step)}",
            file=sys.stderr,
        )
    sys.exit(128 + signal)


def training_config(run: Run, step: int) -> dict:
    """training_config.json of the checkpoint after `step` steps."""
    ema = run.setup.ema
    own = {
        "step": step,
        "validation_loss": run.log.validation_losses(step),
        "ema_step": ema.optimization_step if ema else None,
    }
    return {**own, **run.facts}


def write_checkpoints(run: Run, step: int, out: Path) -> None:
    """The best checkpoints, from where they were kept, and the last."""
    with new_folder(out) as folder:
        for rank, best in enumerate(run.best, start=1):
            place = folder / ("best" if rank == 1 else f"best-{rank}")
            copytree(run.store.checkpoint(best["step"]), place)
            own = read_json(place / "training_config.json")
            write_json(place / "training_config.json", {**own, **run.facts})  # the run may have been extended since
        save_checkpoint(folder / "last", run.setup.unet, run.setup.ema, training_config(run, step))


def summary(run: Run, step: int) -> dict:
    """metrics/train.json."""
    return {
        "num_steps": step,
        "num_skipped_steps": run.log.num_skipped_steps,
        "num_parameters": run.setup.costs.num_parameters,
        "train_loss": run.log.train_rows[-1]["loss"] if run.log.train_rows else None,
        "base_validation_loss": run.log.validation_rows[0]["loss_raw"],
        "best_validation_loss": run.best[0]["loss"],
        "best_step": run.best[0]["step"],
    }
