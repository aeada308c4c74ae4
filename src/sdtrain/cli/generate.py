"""`sdtrain generate`: images from an exported model or a checkpoint."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.cli.options import positive
from sdtrain.ground.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from sdtrain.models.pipelines import Conditions

_CONDITIONS = {
    "hint": "a ControlNet's image",
    "foreground": "IC-Light's object: an image with transparency, or on grey (127, 127, 127)",
    "background": "IC-Light's background image, of variant fbc",
    "light": "IC-Light's environment map, .npy or .hdr, of a model that takes maps",
}


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("generate", help="draw images from prompts")
    command.add_argument("--model", type=Path, required=True, help="an exported model's folder, or a checkpoint's")
    command.add_argument("--base", type=Path, help="the base of an adapter or a checkpoint (data/base)")
    command.add_argument("--weights", choices=["ema", "raw"], help="a checkpoint's weights (ema if it has them)")
    command.add_argument("--prompt", action="append", required=True, help="may be given several times")
    for condition, help in _CONDITIONS.items():
        command.add_argument(f"--{condition}", type=Path, action="append", help=f"{help}; one, or one per prompt")
    command.add_argument("--negative-prompt", default="", help="what to steer away from")
    command.add_argument("--num-images", type=positive, default=1, help="images per prompt (%(default)s)")
    command.add_argument(
        "--seed", type=int, default=0, help="of a prompt's first image; each further one adds 1 (%(default)s)"
    )
    command.add_argument("--steps", type=positive, default=25, help="DPM-Solver++ steps (%(default)s)")
    command.add_argument("--guidance-scale", type=float, default=7.5, help="classifier-free guidance (%(default)s)")
    command.add_argument("--batch-size", type=positive, default=4, help="images drawn at once (%(default)s)")
    command.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    if not options.model.is_dir():
        raise InputError(f"--model {options.model}: no such folder; `dvc repro export` makes data/model")
    from sdtrain.ground.layout import MERGED
    from sdtrain.methods.checkpoints import is_checkpoint, load_checkpoint
    from sdtrain.models.parts import pick_device
    from sdtrain.models.pipelines import generate
    from sdtrain.models.trained import load_model, needs_base

    base, of_checkpoint = options.base or Path("data/base"), is_checkpoint(options.model)
    if options.weights and not of_checkpoint:
        raise InputError(f"--weights {options.weights}: {options.model} is an exported model, not a checkpoint")
    if of_checkpoint or needs_base(options.model):
        if not (base / "model_index.json").exists():
            raise InputError(f"--base {base}: no base model there; {options.model} needs it")
    elif options.base and any((options.model / name).exists() for name in ("model_index.json", MERGED)):
        raise InputError(f"--base {options.base}: {options.model} is a complete model")
    if of_checkpoint:
        method, scheduler, _ = load_checkpoint(options.model, options.weights, base)
        pipeline = method.pipeline(scheduler).to(pick_device())
    else:
        pipeline = load_model(options.model, base)
    conditions = _conditions(options, pipeline)
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_images)]
    seeds = [options.seed + place for _ in options.prompt for place in range(options.num_images)]
    images = generate(
        pipeline,
        prompts,
        seeds,
        conditions=conditions,
        negative_prompt=options.negative_prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        batch_size=options.batch_size,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, seed, image) in enumerate(zip(prompts, seeds, images, strict=True)):
        path = options.out / f"{number:03}-seed{seed}.png"
        image.save(path)
        print(f"{path}: {prompt}")


def _conditions(options: argparse.Namespace, pipeline: "DiffusionPipeline") -> "Conditions":
    """The conditions of each image, cropped as training crops, to the square that the model draws.

    Raises:
        InputError: one is missing, or isn't one of the model's; there isn't one for each prompt; a file can't be read.
    """
    from sdtrain.data.conditions import read_condition
    from sdtrain.models.pipelines import drawn_px, seen_by

    seen, side, conditions = seen_by(pipeline), drawn_px(pipeline), {}
    for name in _CONDITIONS:
        given = getattr(options, name) or []
        if given and name not in seen:
            sees = f"sees {' and '.join(seen)}" if seen else "sees prompts only"
            raise InputError(f"--{name} {given[0]}: {options.model} {sees}; leave it out")
        if name in seen and len(given) not in (1, len(options.prompt)):
            raise InputError(
                f"{options.model} sees a {name}: give --{name} once, or once for each --prompt; there are {len(given)} "
                f"for {len(options.prompt)}"
            )
        if name in seen:
            files = given if len(given) > 1 else given * len(options.prompt)
            found = {file: read_condition(name, file, side) for file in files}
            if name == "light":
                _check_light_size(found, tuple(pipeline.light_encoder.config.light_size))
            conditions[name] = [found[file] for file in files for _ in range(options.num_images)]
    return conditions


def _check_light_size(maps: "dict[Path, Tensor]", size: tuple[int, int]) -> None:
    for file, light in maps.items():
        if tuple(light.shape[:2]) != size:
            found, wanted = (" x ".join(map(str, shape)) for shape in (light.shape[:2], size))
            raise InputError(f"--light {file}: a map of {found}, and the model was trained with maps of {wanted}")
