"""Train the UNet on cached latents.

One step is algorithm 1 of Ho et al. 2020: draw x₀ (from the VAE's posterior), t and ε; noise;
predict; compare; step. `train_unet` prepares, and its last part is the loop.
"""

import math
import os
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import CLIPTextModel

from sdtrain.batches import Batch, BatchMaker
from sdtrain.checkpoints import save_checkpoint
from sdtrain.diffusion import PredictionType, add_noise, target
from sdtrain.ema import averaged
from sdtrain.errors import InputError
from sdtrain.files import new_folder, write_json
from sdtrain.generation import build_pipeline, generate
from sdtrain.heldout import HeldOut
from sdtrain.manifests import encoders_fingerprint
from sdtrain.models import load_scheduler, load_text_encoder, load_tokenizer, load_unet, load_vae, tokenize
from sdtrain.params import TrainParams, ValidationParams
from sdtrain.shards import LatentShards
from sdtrain.telemetry import RunLog


def train_unet(
    params: TrainParams,
    validation: ValidationParams,
    seed: int,
    base: Path,
    latents: Path,
    out: Path,
    metrics: Path,
    train_curve: Path,
    validation_curve: Path,
    runs: Path,
) -> None:
    """Fine-tune the UNet of `base` on the cached `latents`.

    Writes the best and the last checkpoint to `out`, the summary to `metrics`, the curves as CSV, and
    TensorBoard's events to a new folder in `runs`.

    Raises:
        InputError: the cache doesn't fit the base, fp16 is asked for without a GPU, the batch can't be split
            among the processes, or the loss stops being finite.
    """
    accelerator = _accelerator(params.precision, runs)
    device, main = accelerator.device, accelerator.is_main_process
    fingerprint = encoders_fingerprint(base)
    shards = LatentShards(latents, "train", fingerprint)
    num_steps = _num_steps(params, len(shards))
    accumulation = _accumulation(params, accelerator.num_processes)

    unet, text_encoder, vae = load_unet(base / "unet"), load_text_encoder(base).to(device), load_vae(base).to(device)
    tokenizer, scheduler = load_tokenizer(base), load_scheduler(base)
    alphas_cumprod, scaling_factor = scheduler.alphas_cumprod.to(device), vae.config.scaling_factor
    # So that the UNet draws pictures of the training's size; pipelines reset that of UNets before Diffusers 0.9.
    unet.register_to_config(sample_size=shards.manifest["shape"][-1], _diffusers_version=diffusers.__version__)
    unet.requires_grad_(True).train()
    if params.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=params.lr,
        betas=(params.adam_beta1, params.adam_beta2),
        eps=params.adam_epsilon,
        weight_decay=params.weight_decay,
        fused=device.type == "cuda",
    )
    lr_scheduler = get_scheduler(
        params.lr_scheduler,
        optimizer,
        num_warmup_steps=params.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=params.lr_num_cycles,
        power=params.lr_power,
    )
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = EMAModel(unet.parameters(), decay=params.ema_decay, foreach=True) if params.use_ema else None

    batches = BatchMaker(
        shards,
        seed,
        params.batch_size,
        len(alphas_cumprod),
        scaling_factor,
        params.caption_dropout,
        null_ids=tokenize(tokenizer, [""])[0],
    )
    held_out = HeldOut(
        LatentShards(latents, "validation", fingerprint),
        text_encoder,
        alphas_cumprod,
        scaling_factor,
        num_timesteps=validation.num_timesteps,
        max_samples=validation.max_samples,
        batch_size=validation.batch_size,
    )
    pipeline = build_pipeline(base, unet, params.prediction_type, vae, text_encoder, tokenizer)
    log = RunLog(accelerator, num_steps, params.batch_size)
    facts = {
        "params": params.model_dump(),
        "seed": seed,
        "num_steps": num_steps,
        "num_train": len(shards),
        "latents_fingerprint": shards.manifest["fingerprint"],
    }

    base_prediction_type = scheduler.config.prediction_type
    if base_prediction_type != params.prediction_type:
        print(
            f"train.prediction_type = {params.prediction_type!r}, the base predicts {base_prediction_type!r}: "
            "the UNet learns to predict something else than it does"
        )
    base_loss = held_out.losses(unet, base_prediction_type).mean().item()
    log.validation(0, {kind: base_loss for kind in (["raw", "ema"] if ema else ["raw"])}, images=[])
    best_step, best_loss = 0, math.inf
    with new_folder(out) if main else nullcontext() as folder:
        for step in range(1, num_steps + 1):
            loss = torch.zeros((), device=device)
            for micro in range(accumulation):
                batch = batches.make(step - 1, _positions(micro, params.micro_batch_size, accelerator), device)
                with accelerator.no_sync(model) if micro < accumulation - 1 else nullcontext():
                    part = diffusion_loss(
                        accelerator, model, text_encoder, batch, alphas_cumprod, params.prediction_type
                    )
                    accelerator.backward(part / accumulation)
                loss += part.detach() / accumulation
            grad_norm = accelerator.clip_grad_norm_(unet.parameters(), params.max_grad_norm or math.inf)
            lr = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            skipped = optimizer.step_was_skipped  # by fp16's loss scaling, which then tries a smaller scale
            if not skipped:
                lr_scheduler.step()
                if ema is not None:
                    ema.step(unet.parameters())
            optimizer.zero_grad(set_to_none=True)

            last = step == num_steps
            validates = last or step % validation.every_n_steps == 0
            log.step(step, loss, grad_norm, lr, skipped, flush=validates or step % params.log_every_n_steps == 0)
            if validates:
                losses, images = validate(unet, ema, held_out, pipeline, validation, params.prediction_type)
                log.validation(step, losses, images)
                validation_loss = losses["ema" if ema else "raw"]
                config = {**facts, "step": step, "validation_loss": validation_loss}
                if validation_loss < best_loss:
                    best_step, best_loss = step, validation_loss
                    if main:
                        save_checkpoint(folder / "best", unet, ema, config)
                if last and main:
                    save_checkpoint(folder / "last", unet, ema, config)
    accelerator.end_training()
    if main:
        log.write_curves(train_curve, validation_curve)
        write_json(
            metrics,
            {
                "num_steps": num_steps,
                "num_skipped_steps": log.num_skipped_steps,
                "num_parameters": sum(p.numel() for p in unet.parameters()),
                "train_loss": log.train_rows[-1]["loss"],
                "base_validation_loss": base_loss,
                "best_validation_loss": best_loss,
                "best_step": best_step,
            },
        )


def diffusion_loss(
    accelerator: Accelerator,
    model: torch.nn.Module,
    text_encoder: CLIPTextModel,
    batch: Batch,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Mean squared error of the UNet's prediction on one micro-batch, a float32 scalar (Ho et al. 2020, eq. 14)."""
    with torch.no_grad():
        encoder_hidden_states = text_encoder(batch.input_ids).last_hidden_state
    noisy_latents = add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
    with accelerator.autocast():
        model_pred = model(noisy_latents, batch.timesteps, encoder_hidden_states).sample
    return F.mse_loss(
        model_pred.float(), target(batch.latents, batch.noise, batch.timesteps, alphas_cumprod, prediction_type)
    )


def validate(
    unet: UNet2DConditionModel,
    ema: EMAModel | None,
    held_out: HeldOut,
    pipeline: StableDiffusionPipeline,
    params: ValidationParams,
    prediction_type: PredictionType,
) -> tuple[dict[str, float], list]:
    """Held-out loss of the `raw` weights and, where kept, of the `ema`; and pictures of the latter."""
    losses = {"raw": held_out.losses(unet, prediction_type).mean().item()}
    with averaged(unet, ema):
        if ema is not None:
            losses["ema"] = held_out.losses(unet, prediction_type).mean().item()
        unet.eval()
        images = generate(
            pipeline,
            params.prompts,
            list(range(len(params.prompts))),
            batch_size=params.batch_size,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
        )
        unet.train()
    return losses, images


def _accelerator(precision: str, runs: Path) -> Accelerator:
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.precision = 'fp16': needs a CUDA GPU, and there is none; use 'bf16' or 'fp32'")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(logging_dir=str(runs)),
    )
    accelerator.init_trackers(f"{datetime.now():%Y%m%d-%H%M%S}-{os.environ.get('DVC_EXP_NAME') or 'repro'}")
    return accelerator


def _num_steps(params: TrainParams, num_train: int) -> int:
    num_steps = params.max_steps or math.ceil(params.max_epochs * num_train / params.batch_size)
    if params.lr_warmup_steps >= num_steps:
        raise InputError(
            f"train.lr_warmup_steps = {params.lr_warmup_steps}: must be below the run's {num_steps} steps "
            f"({params.max_epochs} epochs of {num_train} pictures)"
        )
    return num_steps


def _accumulation(params: TrainParams, num_processes: int) -> int:
    """Micro-batches per process and step."""
    per_pass = params.micro_batch_size * num_processes
    if params.batch_size % per_pass:
        raise InputError(
            f"train.batch_size = {params.batch_size}: can't be split into micro-batches of "
            f"{params.micro_batch_size} on {num_processes} processes; take a multiple of {per_pass}"
        )
    return params.batch_size // per_pass


def _positions(micro: int, micro_batch_size: int, accelerator: Accelerator) -> range:
    """The rows of the effective batch that this process takes in its `micro`-th pass."""
    first = (micro * accelerator.num_processes + accelerator.process_index) * micro_batch_size
    return range(first, first + micro_batch_size)
