"""Python that draws with Diffusers: each snippet draws the grid's first trained image."""

from pathlib import Path

from sdtrain.card.recorded import Model
from sdtrain.ground.layout import ADAPTER_FILE, CONTROLNET, UNET_OFFSET
from sdtrain.params.schema import SampleParams


def lora_snippet(model: Model, sample: SampleParams, seed: int) -> str:
    lines = [
        "from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline",
        "",
        f"pipeline = StableDiffusionPipeline.from_pretrained({_base(model)}, dtype=torch.float32)",
        f"pipeline.load_lora_weights({model.files.folder.as_posix()!r}, weight_name={ADAPTER_FILE!r})",
        *_set_scheduler(model),
    ]
    size = model.config.params.precompute.resolution
    return "\n".join(["import torch", *lines, *_call(sample, seed, f"height={size}, width={size},")])


def controlnet_snippet(model: Model, sample: SampleParams, seed: int) -> str:
    lines = [
        "from diffusers import ControlNetModel, DPMSolverMultistepScheduler, StableDiffusionControlNetPipeline",
        "from diffusers.utils import load_image",
        "",
        f"controlnet = ControlNetModel.from_pretrained({model.files.folder.as_posix()!r}, dtype=torch.float32)",
        "pipeline = StableDiffusionControlNetPipeline.from_pretrained(",
        f"    {_base(model)}, controlnet=controlnet, dtype=torch.float32",
        ")",
        *_set_scheduler(model),
    ]
    return "\n".join(["import torch", *lines, *_call(sample, seed, "image=load_image('hint.png'),")])


def relighting_snippet(model: Model, sample: SampleParams, seed: int) -> str:
    """With the class in the folder's own file."""
    size, sees = model.config.params.precompute.resolution, model.sees
    load = f"pipeline = IcLightPipeline.from_pretrained({model.files.folder.as_posix()!r}, dtype=torch.float32)"
    lines = [
        *(["import numpy as np"] if "light" in sees else []),
        "import torch",
        "from ic_light import IcLightPipeline",
        "from PIL import Image, ImageOps",
        "",
        load,
        f"cutout = ImageOps.fit(Image.open('foreground.png').convert('RGBA'), ({size}, {size}))",
        "foreground = Image.new('RGB', cutout.size, (127, 127, 127))",
        "foreground.paste(cutout, mask=cutout.getchannel('A'))",
    ]
    if "background" in sees:
        lines.append(f"background = ImageOps.fit(Image.open('background.png').convert('RGB'), ({size}, {size}))")
    if "light" in sees:
        lines.append("light = np.load('light.npy')")
    given = {"foreground": "[foreground]", "background": "[background]", "light": "light[None]"}
    return "\n".join([*lines, *_call(sample, seed, *(f"{name}={given[name]}," for name in sees))])


def _base(model: Model) -> str:
    """Arguments that load the base: put together from several sources, or from scratch, nobody else has it."""
    trained_further = ([CONTROLNET], [UNET_OFFSET])
    sources = [source for source in model.sources if source.parts not in trained_further]
    if len(sources) == 1 and sources[0].repo is not None:
        return f"{sources[0].repo!r}, revision={sources[0].commit!r}"
    if len(sources) == 1 and sources[0].path is not None:
        return repr(sources[0].path)
    return repr(model.base.as_posix())


def _set_scheduler(model: Model) -> list[str]:
    train = model.config.params.train
    schedule = ["pipeline.scheduler.config", f"prediction_type={train.prediction_type!r}"]
    if train.zero_terminal_snr:  # the base's config doesn't say so, nor that it is sampled from the last step on
        schedule += ["rescale_betas_zero_snr=True", "timestep_spacing='trailing'"]
    return [
        "pipeline.scheduler = DPMSolverMultistepScheduler.from_config(",
        *(f"    {argument}," for argument in schedule),
        ")",
    ]


def pipeline_snippet(folder: Path, sample: SampleParams, seed: int) -> str:
    load = f"pipeline = StableDiffusionPipeline.from_pretrained({folder.as_posix()!r}, dtype=torch.float32)"
    return "\n".join(["import torch", "from diffusers import StableDiffusionPipeline", "", load, *_call(sample, seed)])


def _call(sample: SampleParams, seed: int, *more: str) -> list[str]:
    """Draws the first trained image of the grid."""
    arguments = [
        f"{sample.prompts[0]!r},",
        *([f"negative_prompt={sample.negative_prompt!r},"] if sample.negative_prompt else []),
        *more,
        f"num_inference_steps={sample.num_inference_steps},",
        f"guidance_scale={sample.guidance_scales[0]!r},",
        f'generator=torch.Generator("cpu").manual_seed({seed}),',
    ]
    return ["image = pipeline(", *(f"    {line}" for line in arguments), ").images[0]", 'image.save("image.png")']
