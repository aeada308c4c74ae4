"""The model card: what was trained, the grid, the metrics, how to use the model and how to reproduce it.

What `data/model` holds decides which instructions the card gives; the recorded method only chooses the words.
"""

import json
import shlex
import shutil
from pathlib import Path

from huggingface_hub import ModelCardData

from sdtrain.card.images import images
from sdtrain.card.recorded import Model, read_model
from sdtrain.card.results import eval_results, results
from sdtrain.card.usage import usage
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import new_folder, write_text
from sdtrain.ground.layout import UNET_OFFSET
from sdtrain.ground.markdown import code_block, code_span, one_line
from sdtrain.ground.samples import GRID, Samples
from sdtrain.ground.schedules import scaled_lr
from sdtrain.params.schema import DatasetParams, EvaluateParams, SampleParams, TrainParams

_PNG = b"\x89PNG\r\n\x1a\n"


def write_card(
    sample: SampleParams,
    evaluate: EvaluateParams,
    seed: int,
    base: Path,
    model: Path,
    samples: Path,
    metrics: Path,
    image_sets: Path,
    accuracy_table: Path,
    relighting_table: Path,
    out: Path,
) -> None:
    """Write `out`: README.md, a model card as the Hugging Face hub reads it, and the grid that it shows.

    Args:
        sample: what the grid in `samples` was drawn with.
        evaluate: what `metrics`, `image_sets` and the tables were measured with.

    Raises:
        InputError: an input is missing or broken; names the file, and the stage that writes it.
    """
    found, grid, drawn = read_model(model, base), _find_grid(samples), Samples.read(samples)
    shown = sample if sample.num_held_out is None else sample.model_copy(update={"prompts": drawn.texts})
    sections = [
        f"---\n{_front_matter(found, metrics, image_sets).to_yaml()}\n---",
        _title(found),
        images(found, shown, seed, grid.name, [name for name in drawn.models if name not in ("base", "trained")]),
        results(found, evaluate, metrics, image_sets, accuracy_table, relighting_table),
        _training(found),
        usage(found, shown, seed),
        _reproduction(found, sample, evaluate),
        _license(found),
    ]
    with new_folder(out) as folder:
        write_text(folder / "README.md", "\n\n".join(sections) + "\n")
        shutil.copyfile(grid, folder / grid.name)
    print(f"{out}: the card of {model}")


def _find_grid(samples: Path) -> Path:
    grid, again = samples / GRID, "run `dvc repro sample`"
    try:
        with grid.open("rb") as file:
            is_png = file.read(len(_PNG)) == _PNG
    except OSError as error:
        raise InputError(f"{grid}: can't be read: {error.strerror}; {again}") from None
    if not is_png:
        raise InputError(f"{grid}: not a PNG image; {again}")
    return grid


def _front_matter(model: Model, metrics: Path, image_sets: Path) -> ModelCardData:
    """The card's YAML header, without a licence: that is the user's to choose."""
    source, dataset = model.unet_source, model.config.params.dataset
    relation = "finetune" if model.files.lora is None and model.files.controlnet is None else "adapter"
    # On one line, because PyYAML writes some line breaks (U+0085) so that they are read as spaces.
    base_model = one_line(source.repo) if source and source.repo else None
    task = "text-to-image" if model.ic_light is None else "image-to-image"
    images_of = one_line(dataset.repo) if dataset.repo else dataset.source
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        model_name=model.config.export.name,
        eval_results=eval_results(metrics, image_sets, f"held-out images ({images_of})", images_of, task),
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=[one_line(dataset.repo)] if dataset.repo else None,
        tags=[
            *("stable-diffusion", "sdtrain", one_line(model.config.params.method.name)),
            *([] if model.ic_light is None else ["relighting"]),
        ],
    )


def _title(model: Model) -> str:
    kind = "dora" if model.uses_dora else model.config.params.method.name
    if kind == "finetune" and model.unet_source is not None and model.unet_source.seed is not None:
        kind = "from scratch"
    title, text = {
        "finetune": ("Fine-tuned Stable Diffusion", "All weights of the UNet were fine-tuned."),
        "from scratch": ("Stable Diffusion, its UNet trained from scratch", "A UNet was trained from scratch."),
        "lora": ("LoRA for Stable Diffusion", "A LoRA (low-rank adapter) of the UNet was trained."),
        "controlnet": (
            "ControlNet for Stable Diffusion",
            "A ControlNet was trained, which makes images follow a hint; the UNet stayed as it was.",
        ),
        "dora": (
            "Stable Diffusion with a merged DoRA",
            "A DoRA (weight-decomposed low-rank adapter) of the UNet was trained.",
        ),
        "ic_light": ("IC-Light for Stable Diffusion", _of_ic_light(model)),
    }[kind]
    return f"# {title}: {code_span(model.config.export.name)}\n\n{text} VAE and text encoder are the base's."


def _of_ic_light(model: Model) -> str:
    scene = "a foreground and a background" if "background" in model.sees else "a foreground"
    told = "by an environment map beside the prompt" if "light" in model.sees else "by the prompt's first words"
    start = " The training started from the weights of another IC-Light." if model.has_offset else ""
    return (
        f"An IC-Light was trained: a UNet, with all its weights, that sees {scene} and draws the foreground's object "
        f"under another light, told {told}.{start}"
    )


def _training(model: Model) -> str:
    config, params, export = model.config, model.config.params, model.config.export
    train, settings = params.train, params.method.model_dump(exclude={"name"})
    method = [code_span(params.method.name)]
    method += [f"{code_span(key)} {code_span(json.dumps(settings[key], ensure_ascii=False))}" for key in settings]
    lr = scaled_lr(train.lr, train.lr_scaling, train.batch_size, train.lr_reference_batch_size)
    warmup = f" after {train.lr_warmup_steps:,} steps of warm-up" if train.lr_warmup_steps else ""
    chosen = {"best": "the best by held-out loss, ", "last": "the last, "}.get(export.checkpoint, "")
    weights = "moving average (EMA)" if export.weights == "ema" else code_span(export.weights)
    lines = [
        f"method: {', '.join(method)}",
        f"steps: {config.step:,} of {config.num_steps:,}, {chosen}{_num_passes(config.step, train, config.num_train)}",
        f"weights: {weights}, exported as {code_span(export.dtype)}",
        f"images: {config.num_train:,} {_images_of(params.dataset, model.is_lit)}, {params.precompute.resolution} px",
        f"effective batch: {train.batch_size}",
        f"learning rate: {lr:g}, {code_span(train.lr_scheduler)}{warmup}; {code_span(train.optimizer)}, "
        f"{code_span(train.precision)}",
        f"objective: {_objective(train)}",
        f"seed: {train.seed}, of the data {params.seed}",
    ]
    if origin := config.resumed_from:
        lines.append(f"branched from step {origin.step:,} of run {code_span(origin.run)}, whose steps count above")
    return "## Training\n\n" + "\n".join(f"- {line}" for line in lines)


def _num_passes(step: int, train: TrainParams, num_train: int) -> str:
    return f"{step * train.batch_size / max(1, num_train):.1f} passes over the images"


def _images_of(dataset: DatasetParams, is_lit: bool) -> str:
    if is_lit:
        return "generated images of coloured domes, each dome under two of eight lights"
    if dataset.source == "generated":
        return "generated scenes of coloured shapes"
    if dataset.repo is None:
        return f"captioned images (source {code_span(dataset.source)})"
    revision = f", revision {code_span(dataset.revision)}" if dataset.revision else ""
    return f"captioned images of {code_span(dataset.repo)}{revision}"


def _objective(train: TrainParams) -> str:
    parts = [f"prediction type {code_span(train.prediction_type)}"]
    if train.zero_terminal_snr:
        parts.append("zero terminal SNR")
    if train.snr_gamma is not None:
        parts.append(f"min-SNR γ {train.snr_gamma:g}")
    if train.noise_offset:
        parts.append(f"noise offset {train.noise_offset:g}")
    if train.input_perturbation:
        parts.append(f"input perturbation {train.input_perturbation:g}")
    if train.caption_dropout:
        parts.append(f"{100 * train.caption_dropout:g} % of the captions dropped")
    return ", ".join(parts)


def _reproduction(model: Model, sample: SampleParams, evaluate: EvaluateParams) -> str:
    """Commands that restore the recorded params, with the base's commits, and run them."""
    pins = []
    for place, source in enumerate(model.sources):
        part = "" if place == 0 else "text_encoder_" if "text_encoder" in source.parts else "vae_"
        if source.commit is not None:
            pins.append(f" -S {shlex.quote(f'base.{part}revision={source.commit}')}")
    path = (model.files.folder / "training_config.json").as_posix()
    program = 'import json, sys; c = json.load(sys.stdin); print(json.dumps({**c["params"], "export": c["export"]}))'
    commands = f"python -c {shlex.quote(program)} < {shlex.quote(path)} > params.yaml\ndvc exp run{''.join(pins)}"
    config = model.config
    needs = "the same images" + (" and what it branched from" if config.resumed_from else "")
    needs += " and the file of `base.unet_offset`" if model.has_offset else ""
    used = (("grid", config.params.sample, sample), ("metrics", config.params.evaluate, evaluate))
    later = " and ".join(name for name, recorded, now in used if recorded != now)
    note = f"\n\nThe {later} above were made with params that were changed after the training." if later else ""
    return (
        f"## Reproduce\n\nThis is run {code_span(config.fingerprint)} of sdtrain. At the commit that its `dvc.lock` "
        f"belongs to, `dvc repro` makes it again. Elsewhere, in the project's folder and with {needs}:\n\n"
        f"{code_block('sh', commands)}{note}"
    )


def _license(model: Model) -> str:
    lines = []
    for source in model.sources:
        if source.repo is not None:
            origin = f"{code_span(source.repo)} at commit {code_span(source.commit or '')}"
        elif source.path is not None:
            origin = f"local {'file' if source.parts == [UNET_OFFSET] else 'folder'} {code_span(source.path)}"
        else:
            origin = f"random weights, seed {source.seed}"
        lines.append(f"- {', '.join(map(code_span, source.parts))}: {origin}")
    return (
        "## Base and licence\n\n" + "\n".join(lines) + "\n\n"
        "This card sets no licence. The base's terms hold for what is made from it, and the images may have terms of "
        "their own: check both, then add `license` to the head of this file."
    )
