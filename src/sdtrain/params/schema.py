"""`params.yaml`, typed. Every field is declared, bounded and documented here, and nowhere else.

This file has only fields: `load.py` reads the file, `rules.py` has the checks across fields. There are no defaults in
code: all keys must be present.

A field that says "only" must otherwise be null or as shipped (`NEUTRAL` in `view.py`), so that no given value is
silently ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, StringConstraints

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(min_length=1)]
HubRepo = Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]


class Section(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class BaseParams(Section):
    """The base model: where its frozen parts and the UNet's first weights come from."""

    source: Literal["local", "hub"]
    """`local`: a Diffusers folder at `path`. `hub`: the repository `repo` at `revision`."""
    path: Text
    """Folder of the base model; DVC watches it, so it must exist even where `source` is `hub`."""
    repo: HubRepo | None
    """Hub repository, `owner/name`, in the Diffusers layout, with safetensors."""
    revision: Text | None
    """Branch, tag or commit; null is the newest. The commit is recorded."""
    vae_repo: HubRepo | None
    """Take the VAE from this hub repository instead (its root, or its `vae/`)."""
    vae_revision: Text | None
    """Branch, tag or commit of `vae_repo`."""
    text_encoder_repo: HubRepo | None
    """Take text encoder and tokenizer from this hub repository (`text_encoder/`, `tokenizer/`) instead."""
    text_encoder_revision: Text | None
    """Branch, tag or commit of `text_encoder_repo`."""
    controlnet_repo: HubRepo | None
    """Also take a trained ControlNet from this hub repository (its root, or its `controlnet/`); only for
    `method.start: base`. A local base brings its own in `controlnet/`."""
    controlnet_revision: Text | None
    """Branch, tag or commit of `controlnet_repo`."""
    unet_offset: Text
    """`ic_light` only: a .safetensors file in the layout of the released IC-Light (trained minus base, in Diffusers'
    keys) to start from, and to compare with; or a folder, which is none. DVC watches it, so it must exist."""
    unet_config: dict[str, Any] | None
    """Config of Diffusers' UNet2DConditionModel: train a UNet of this structure from scratch."""


ConditionName = Literal["hint", "foreground", "background", "mask", "light", "light_1", "relit_1", "relit_2"]
"""What a model may see besides the caption. A ControlNet's: `hint`. IC-Light's: `foreground`, the object under another
light (its alpha or the `mask` puts it on grey); `background`; `mask` of the object; `light`, an environment map. And of
a light's part `light_1`: images of the scene under this part and under the rest, `relit_1` and `relit_2`."""


class DatasetParams(Section):
    """Captioned images, what else belongs to them, and which are held out."""

    source: Literal["generated", "hub", "imagefolder", "webdataset", "parquet"]
    """`generated`: scenes of coloured shapes. The others are read with Hugging Face Datasets."""
    path: Text
    """Folder (or one file) of the images; DVC watches it, so it must exist whatever `source` is."""
    repo: HubRepo | None
    """Hub data set, `owner/name`."""
    revision: Text | None
    """Branch, tag or commit of `repo`; null is the newest. The commit is recorded."""
    split: Text
    """`hub` only: the split to read."""
    image_column: Text
    """All but `generated`: column of the image (`jpg`, `png`, … in WebDataset tars; in an image folder `image`, or
    the part before `_file_name` in its metadata's column name)."""
    caption_column: Text
    """All but `generated`: column of the caption (`txt` in WebDataset tars)."""
    condition_columns: dict[ConditionName, Text]
    """Further columns that the method needs, by what they are: e.g. `{hint: conditioning_image}`. In an image folder
    also files beside the images: `{hint: 'hints/*.png'}`, where * is the image's path without its suffix. Of the
    `generated` worlds the shapes have `outline`, and the lit ones the names of IC-Light's conditions."""
    group_column: Text | None
    """All but `generated`: column whose equal values stay in one split, e.g. the object of several photographs."""
    max_train_samples: PositiveInt | None
    """Stop at this many training images, taken in an order drawn from `seed`; null takes all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images held out to decide on, e.g. which checkpoint is the best. Chosen by a hash of their pixels,
    so copies stay in one split; where an image has a group, by a hash of that."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Share of the images held out to report on: `evaluate` measures on them, and nothing is decided on them. Chosen
    likewise; neither fraction takes images from the other, both take from those to train on. 0 is none: `evaluate` then
    reports on the validation images."""
    alpha_background: Annotated[str, StringConstraints(pattern=r"^#[0-9a-fA-F]{6}$")]
    """All but `generated`: colour behind transparent images, `#rrggbb`."""
    num_workers: NonNegativeInt
    """Threads that decode and check images; 0 uses the main thread."""
    world: Literal["shapes", "free_shapes", "lit", "lit_by_map"]
    """`generated` only: `shapes`, whose captions may name size and place; `free_shapes` of any size and at any place,
    of which captions say nothing, for hints to tell; `lit`, shapes as domes under one of eight lights, which captions
    name first; `lit_by_map`, the same with captions that say nothing of the light, for light maps to tell."""
    num_scenes: PositiveInt
    """`generated` only: how many images to draw, one of each scene; of each lit scene two, under two lights."""
    new_fraction: Annotated[float, Field(ge=0, le=1)]
    """`generated` only: share of the scenes that show a concept the built-in base has never seen; 0 for lit scenes."""


class PrecomputeParams(Section):
    """The cache of VAE posteriors and CLIP token ids."""

    resolution: PositiveInt
    """Images are resized (shorter side) and cropped to this square, in px; a multiple of the VAE's factor."""
    center_crop: bool
    """true crops the center; false crops at a position drawn from (`seed`, image), the same in all epochs.
    `generated` images are squares already: true only."""
    random_flip: bool
    """Also cache the flipped image's own encoding; `train` draws one of the two each time."""
    derived_conditions: dict[Literal["hint", "foreground", "mask"], Literal["canny", "degraded", "alpha"]]
    """Conditions computed instead of read. `{hint: canny}`: edges of the cropped image (Canny 1986, by OpenCV), with
    thresholds drawn for each image, so that the model doesn't bind to one setting. `{foreground: degraded}`: the
    image's own object, by its `mask`, under an approximation of other lights, which makes a pair of a plain photograph.
    `{mask: alpha}`: the foreground's alpha channel."""
    batch_size: PositiveInt
    """Images per VAE call. Changes speed and memory only."""


class FinetuneParams(Section):
    """Plain fine-tuning: all of the UNet's weights."""

    name: Literal["finetune"]
    """The training method; each has keys of its own."""


class LoraParams(Section):
    """A low-rank adapter of the UNet (Hu et al. 2021), which stays as it is: W + s·B·A, B zero at the start."""

    name: Literal["lora"]
    """The training method; each has keys of its own."""
    rank: PositiveInt
    """Rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)]
    """s = alpha / rank. At the same alpha a learning rate holds for other ranks, about (Hu et al. 2021, 4.1)."""
    target_modules: Literal["attention", "linear", "conv"] | Annotated[list[Text], Field(min_length=1)]
    """Layers that get an adapter. `attention`: queries, keys, values and outputs (Diffusers' default). `linear`: all of
    the transformer blocks (kohya's default). `conv`: the residual blocks, down- and upsamplers as well (kohya's LoCon).
    Or a list of the ends of modules' names, e.g. `[attn2.to_k, attn2.to_v]`."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of the adapter's inputs that are zeroed in training; drawn by micro-batch, so with it another
    `train.micro_batch_size` is another run."""
    use_rslora: bool
    """s = alpha / √rank instead (Kalajdzievski 2023)."""
    use_dora: bool
    """Also train each weight's magnitude (Liu et al. 2024); exported merged only."""
    init: Literal["kaiming", "gaussian"]
    """A at the start: uniform with a standard deviation of 1/√(3·inputs), as PEFT and kohya have it; or normal with
    1/rank, as Diffusers has it."""


class ControlNetParams(Section):
    """A ControlNet (Zhang et al. 2023): a trained copy of the UNet's encoder that sees a hint; the UNet stays as it is.

    Needs the condition `hint`. `train.caption_dropout: 0.5` is the paper's.
    """

    name: Literal["controlnet"]
    """The training method; each has keys of its own."""
    start: Literal["unet", "base"]
    """`unet`: a copy of the UNet's encoder, with zero convolutions. `base`: the trained ControlNet that the base
    brings, or of `base.controlnet_repo`."""


class IcLightParams(Section):
    """Relighting as in IC-Light (Zhang et al. 2025): the UNet with a wider first convolution also sees the object.

    Needs the condition `foreground`; see the fields for others.
    """

    name: Literal["ic_light"]
    """The training method; each has keys of its own."""
    variant: Literal["fc", "fbc"]
    """What the UNet sees besides the noisy latents: the foreground, or foreground and `background`."""
    light: Literal["words", "map"]
    """How the light is told: in the caption, where its words must stand first to be heard; or as an environment map,
    the condition `light`, through a small network to cross-attention tokens."""
    light_size: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None
    """`map` only: height and width of the light maps: [32, 32], to which larger ones are reduced; [1, 5] in the lit
    world."""
    num_light_tokens: PositiveInt | None
    """`map` only: tokens that the map becomes; the paper's readers report 3."""
    consistency_weight: Annotated[float, Field(ge=0)]
    """Weight of the light-transport consistency loss: the light's random split L = L1 + L2 must add up in what the
    model predicts. Needs `map`, captions that don't tell the light, `fc`, and the condition `mask`; a step then takes
    three times as long. 0 is none."""
    phi: Literal["fixed", "mlp", "pixel"] | None
    """Consistency only: how predictions under L1 and L2 become the one under L. `fixed`: the closed form
    ε₁ + ε₂ - (z_t - √ᾱ z_black)/σ. `mlp`: a learned network per latent pixel, symmetric in 1 and 2, which also sees z_t
    and log SNR. `pixel`: no network; the three predicted images are decoded and added in linear light."""
    consistency_latents: Literal["shared", "own"] | None
    """Consistency only: `shared`: one noisy latent z_t for all three lights. `own`: as the paper's loss is read, each
    light has its own image (`light_1`, `relit_1`, `relit_2`) with the same noise; `mlp` only, which then sees the
    predictions alone."""


MethodParams = Annotated[FinetuneParams | LoraParams | ControlNetParams | IcLightParams, Field(discriminator="name")]
"""The section `method`: one of these, by `name`."""


class TrainParams(Section):
    """The run: steps, optimizer, objective, saving."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Of training's own draws: order, noise, timesteps, dropped captions, new weights. Runs that differ in it alone are
    replicates of one recipe: they share data, cache and held-out set. Only replicates can tell recipes apart."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW, at the batch size that `lr_scaling` refers to."""
    lr_scaling: Literal["none", "sqrt", "linear"]
    """How `lr` scales with the effective batch: not at all, with its square root, or linearly."""
    lr_reference_batch_size: PositiveInt | None
    """`lr_scaling` only: the effective batch at which `lr` is used unscaled."""
    max_steps: PositiveInt | None
    """Optimizer steps; give this or `max_epochs`."""
    max_epochs: PositiveInt | None
    """Passes over the training images; give this or `max_steps`."""
    batch_size: PositiveInt
    """Effective batch: images per optimizer step, whatever the number of processes."""
    micro_batch_size: PositiveInt
    """Images per forward pass and process; gradient accumulation follows from it and `batch_size`."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Forward and backward pass; weights, optimizer and EMA stay in fp32."""
    optimizer: Literal["adamw", "adamw_8bit"]
    """AdamW, fused where the device has it (except under fp16); or bitsandbytes' with 8-bit moments, on a CUDA GPU."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    """AdamW's β₁."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    """AdamW's β₂."""
    adam_epsilon: Annotated[float, Field(gt=0)]
    """AdamW's ε."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    """Clip the gradient's global L2 norm to this; null doesn't clip."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "piecewise_constant",
        "linear", "cosine", "cosine_with_restarts", "polynomial",
    ]  # fmt: skip
    """Diffusers' schedule of the learning rate; those from `linear` on decay over the full run and fix its length."""
    lr_num_cycles: PositiveInt
    """`cosine_with_restarts` only: number of cosine cycles; 1 never restarts."""
    lr_power: Annotated[float, Field(gt=0)]
    """`polynomial` only: its exponent; 1 is linear."""
    lr_step_rules: Text | None
    """`piecewise_constant` only: `1:500,0.1:800,0.01` is `lr` up to step 500, a tenth up to 800, then a hundredth."""
    lr_warmup_steps: NonNegativeInt
    """Optimizer steps of linear warm-up; `constant` and `piecewise_constant` have none."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third slower."""
    attention_backend: Literal["auto", "flash", "efficient", "cudnn", "math"]
    """PyTorch's scaled-dot-product attention in the training passes: the kernel it picks, or only this one."""
    compile: bool
    """Compile the UNet with torch.compile; needs a C++ compiler, and takes minutes at the start."""
    deterministic: bool
    """Ask PyTorch for deterministic kernels, which a resumed run on a GPU needs to be bit-exact."""
    prediction_type: Literal["epsilon", "v_prediction"]
    """What the UNet predicts: the noise, or the velocity (Salimans & Ho 2022)."""
    snr_gamma: Annotated[float, Field(gt=0)] | None
    """Min-SNR weighting with this γ (Hang et al. 2023; 5 is theirs); null weighs all timesteps equally."""
    zero_terminal_snr: bool
    """Rescale the noise schedule so that it ends in pure noise (Lin et al. 2024); needs `v_prediction`."""
    noise_offset: Annotated[float, Field(ge=0)]
    """Add noise that is constant over a channel, of this strength, to ε, target included; 0.05 to 0.1 is usual."""
    input_perturbation: Annotated[float, Field(ge=0)]
    """Add noise of this strength to the UNet's input but not to the target (Ning et al. 2023; 0.1 is theirs)."""
    timestep_sampling: Literal["uniform", "stratified"]
    """Each row's timestep on its own, or one of as many equal strata as the effective batch has rows (2 or more)."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of rows that train with the empty caption, which classifier-free guidance needs."""
    use_ema: bool
    """Also keep an exponential moving average of the weights."""
    ema_schedule: Literal["ramp", "warmup", "power_function"]
    """How its decay grows with n steps: (1+n)/(10+n), or 1-(1+n/ema_inv_gamma)^-ema_power, both up to `ema_decay`;
    or without limit as (1-1/n)^(γ+1), where γ follows from `ema_sigma_rel` (Karras et al. 2024). This and the
    next four only with `use_ema`."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    """`ramp` and `warmup` only: the maximum decay."""
    ema_inv_gamma: Annotated[float, Field(gt=0)] | None
    """`warmup` only: stretches the warm-up; 1 is usual."""
    ema_power: Annotated[float, Field(gt=0)] | None
    """`warmup` only: 2/3 for runs of a million steps, 3/4 for shorter ones."""
    ema_sigma_rel: Annotated[float, Field(gt=0, lt=0.28)] | None
    """`power_function` only: the averaging profile's width as a share of the run; 0.05 to 0.1 is usual."""
    resume: Literal["auto", "never", "branch"]
    """`auto` resumes this same run from its saved state where there is one, `never` starts over, `branch` starts from
    `branch_from`."""
    branch_from: Text
    """`branch` only: a saved state, a run's folder of them, or a checkpoint. DVC watches it, so it must exist."""
    resume_reset: list[Literal["lr", "scheduler", "optimizer"]]
    """`branch` only: what isn't taken over from there, but starts from this file's values."""
    save_every_n_steps: PositiveInt
    """Optimizer steps between saved states; one is also saved at the end and on SIGINT and SIGTERM."""
    num_saved_runs: PositiveInt
    """Runs whose newest saved states are kept, this one included; when a run starts, others are deleted, finished
    ones first. Of unfinished others, up to this many are kept."""
    num_best_checkpoints: PositiveInt
    """Checkpoints kept by held-out loss: `best`, `best-2`, …; the `last` is kept as well."""
    early_stopping_patience: PositiveInt | None
    """Stop after this many validations in a row without a new best; null trains to the end. Refused
    where `max_steps` is too small for it to take effect."""
    log_every_n_steps: PositiveInt
    """Optimizer steps between rows of the training curve."""
    trackers: list[Literal["tensorboard", "wandb"]]
    """Where the curves go beside the CSV files; Weights & Biases needs `pip install '.[wandb]'`."""


class ValidationParams(Section):
    """The held-out loss and the images during training."""

    every_n_steps: PositiveInt
    """Optimizer steps between validations; the last step always validates, and step 0 gives the base's loss."""
    num_timesteps: PositiveInt
    """Timesteps at which each held-out image is noised, in the middle of as many equal bins."""
    max_samples: PositiveInt
    """Validation images used each time."""
    batch_size: PositiveInt
    """Noised latents per UNet call. Changes speed and memory only."""
    prompts: list[Text]
    """Prompts whose images are drawn at each validation after step 0, with the same noise each time, for
    `plots/validation` and the trackers; may be empty."""
    num_held_out: PositiveInt | None
    """Instead of prompts, for methods with conditions only: draw this many validation images' captions and
    conditions."""
    num_inference_steps: PositiveInt
    """With images only: DPM-Solver++ steps of these images."""
    guidance_scale: Annotated[float, Field(ge=0)]
    """With images only: classifier-free guidance of these images; 1 or less is none."""


class ExportParams(Section):
    """Which weights are exported, and in which forms."""

    checkpoint: Literal["best", "last"]
    """`best` by held-out loss (the EMA's where there is one), or the `last`."""
    weights: Literal["ema", "raw"]
    """The moving average, or the weights the optimizer worked on."""
    dtype: Literal["fp32", "fp16"]
    """Number format of the exported safetensors."""
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)]
    """Title of the model, and stem of the files for ComfyUI and A1111, which show it: `name`.safetensors, and
    `name`-merged.safetensors with `merged` and `single_file`."""
    merged: bool
    """`lora` only: also export the UNet with the adapter added to its weights, as a full model."""
    single_file: bool
    """Also export the full model as one file in the original Stable Diffusion layout, for ComfyUI and A1111."""


CheckpointName = Annotated[str, StringConstraints(pattern=r"^(last|best|best-([2-9]|[1-9][0-9]+))$")]


class SampleParams(Section):
    """Images to compare: base beside trained, and further checkpoints."""

    prompts: list[Text]
    """One row of the grids each; empty with `num_held_out`."""
    num_held_out: PositiveInt | None
    """Instead of prompts, for methods with conditions only: one row for each of this many validation images, with its
    caption and conditions."""
    negative_prompt: str
    """What guidance steers away from; usually empty, and must be empty without guidance."""
    images_per_prompt: PositiveInt
    """Images per prompt and model."""
    num_inference_steps: PositiveInt
    """DPM-Solver++ steps."""
    guidance_scales: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]
    """Classifier-free guidance; 1 or less is none. The first one's images are `grid.png`, which the card shows, each
    further one's a grid of their own."""
    checkpoints: list[CheckpointName]
    """Kept checkpoints to draw beside the exported model, with EMA weights where they have them: `last`, `best`,
    `best-2`, …; may be empty. One that is the exported model is left out."""
    batch_size: PositiveInt
    """Images drawn at once. Changes speed and memory only."""


BUILTIN_CLIP = "data/builtin_clip"
"""Knows the generated worlds; of other images it says nothing, so by it they aren't compared."""


class EvaluateParams(Section):
    """Metrics on held-out data."""

    num_timesteps: PositiveInt
    """Timesteps at which each held-out image is noised, in the middle of as many equal bins."""
    max_samples: PositiveInt
    """Held-out images used for the loss: of the test split, or without `dataset.test_fraction` of validation."""
    features: Literal["none", "local", "hub"]
    """Where the image encoder comes from by which drawn images are compared with real ones: a DINOv2, or a CLIP that
    isn't the base's own, which also scores images against captions. `none` leaves these metrics out, and of data that
    isn't `generated` draws no images; so does `local` with the shipped data/builtin_clip, which knows no other data."""
    features_path: Text
    """`features: local` only: folder of the encoder; DVC watches it, so it must exist whatever `features` is."""
    features_repo: HubRepo | None
    """`features: hub` only: repository, `owner/name`, e.g. `facebook/dinov2-small`."""
    features_revision: Text | None
    """Branch, tag or commit of `features_repo`; null is the newest. The commit is recorded."""
    nearest_neighbors: bool
    """Compare drawn images with every training image, to find copies; needs `features`."""
    num_prompts: PositiveInt
    """Images that each model draws and that are measured: of `generated` data one for each prompt of each kind (new
    and known concepts), or for each lit scene; of other data one for each of so many held-out captions."""
    num_inference_steps: PositiveInt
    """DPM-Solver++ steps of these images."""
    guidance_scale: Annotated[float, Field(ge=0)]
    """Classifier-free guidance of these images; 1 or less is none."""
    batch_size: PositiveInt
    """Latents per UNet call. Changes speed and memory only."""
    num_bootstrap: Annotated[int, Field(ge=100)]
    """Bootstrap resamples behind the 95 % confidence intervals."""


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Of the data, of `base.unet_config`'s weights and of the images drawn to look at and to measure; training has its
    own, `train.seed`. Every draw is a function of its seed, purpose and place; all seeds share the held-out noise."""
    base: BaseParams
    dataset: DatasetParams
    precompute: PrecomputeParams
    method: SerializeAsAny[MethodParams]
    """The training method."""
    train: TrainParams
    validation: ValidationParams
    export: ExportParams
    sample: SampleParams
    evaluate: EvaluateParams
