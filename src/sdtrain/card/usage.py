"""How to use what was exported: with Diffusers, ComfyUI, A1111 and sdtrain itself.

What was checked in their code: ComfyUI recognises Stable Diffusion 1.x by the UNet's channels and the text's width, and
sets v and zero terminal SNR by its node ModelSamplingDiscrete; A1111 assumes the same sizes, reads the prediction type
from a .yaml file with the checkpoint's name, and has zero terminal SNR among its settings.
"""

import shlex
from pathlib import Path

from sdtrain.card.recorded import Model
from sdtrain.ground.layout import ADAPTER_FILE, CONTROLNET, CONTROLNET_FILE, MERGED
from sdtrain.ground.markdown import code_block, code_span, one_line
from sdtrain.params.schema import SampleParams

_SD1_CHANNELS, _SD1_TEXT_WIDTH = 320, 768


def usage(model: Model, sample: SampleParams, seed: int) -> str:
    """Instructions for each of the files that are there."""
    files = model.files
    blocks = [
        "## Use",
        f"Paths are the project's. Elsewhere, give this model's own folder or repository in place of "
        f"{code_span(files.folder.as_posix())}.",
    ]
    if files.lora is not None:
        blocks += [
            f"With Diffusers, the LoRA ({code_span(ADAPTER_FILE)}, {files.lora:.1f} MiB) on its base:",
            code_block("python", _lora_snippet(model, sample, seed)),
        ]
    if files.controlnet is not None:
        blocks += [
            f"With Diffusers, the ControlNet ({code_span(CONTROLNET_FILE)}, {files.controlnet:.1f} MiB) with its base; "
            f"the hint {code_span('hint.png')} is as large as the image to draw:",
            code_block("python", _controlnet_snippet(model, sample, seed)),
        ]
    if files.pipeline is not None:
        blocks += [
            f"With Diffusers, the whole model ({files.pipeline:.1f} MiB):",
            code_block("python", _pipeline_snippet(files.folder, sample, seed)),
        ]
    if files.merged is not None:
        blocks += [
            f"With Diffusers, the whole model with the adapter merged into it ({files.merged:.1f} MiB):",
            code_block("python", _pipeline_snippet(files.folder / MERGED, sample, seed)),
        ]
    if files.single:
        lines = [f"- {code_span(name)} ({size:.1f} MiB){_place(model, name)}" for name, size in files.single.items()]
        blocks += ["In one file:", "\n".join(lines)]
        blocks += _size_warning(model) or _v_prediction(model)
    hint = " --hint hint.png" if files.controlnet is not None else ""
    blocks += ["With sdtrain, in the project's folder:", code_block("sh", _generate(files.folder, sample) + hint)]
    return "\n\n".join(blocks)


def _lora_snippet(model: Model, sample: SampleParams, seed: int) -> str:
    lines = [
        "from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline",
        "",
        f"pipeline = StableDiffusionPipeline.from_pretrained({_base(model)}, dtype=torch.float32)",
        f"pipeline.load_lora_weights({model.files.folder.as_posix()!r}, weight_name={ADAPTER_FILE!r})",
        *_set_scheduler(model),
    ]
    size = model.config.params.precompute.resolution
    return "\n".join(["import torch", *lines, *_call(sample, seed, f"height={size}, width={size},")])


def _controlnet_snippet(model: Model, sample: SampleParams, seed: int) -> str:
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


def _base(model: Model) -> str:
    """Arguments that load the base: put together from several sources, or from scratch, nobody else has it."""
    sources = [source for source in model.sources if source.parts != [CONTROLNET]]  # which is trained further
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


def _pipeline_snippet(folder: Path, sample: SampleParams, seed: int) -> str:
    load = f"pipeline = StableDiffusionPipeline.from_pretrained({folder.as_posix()!r}, dtype=torch.float32)"
    return "\n".join(["import torch", "from diffusers import StableDiffusionPipeline", "", load, *_call(sample, seed)])


def _call(sample: SampleParams, seed: int, *more: str) -> list[str]:
    """Draws the first trained image of the grid."""
    arguments = [
        f"{sample.prompts[0]!r},",
        *([f"negative_prompt={sample.negative_prompt!r},"] if sample.negative_prompt else []),
        *more,
        f"num_inference_steps={sample.num_inference_steps},",
        f"guidance_scale={sample.guidance_scale!r},",
        f'generator=torch.Generator("cpu").manual_seed({seed}),',
    ]
    return ["image = pipeline(", *(f"    {line}" for line in arguments), ").images[0]", 'image.save("image.png")']


def _place(model: Model, name: str) -> str:
    """Where ComfyUI and A1111 look for a single file."""
    if model.files.controlnet is not None:
        return (
            ", the ControlNet, to be used with its base: for ComfyUI in `models/controlnet/`, for A1111's extension "
            "sd-webui-controlnet in `models/ControlNet/`, without a preprocessor where the image is a hint already"
        )
    if _is_adapter(model, name):
        in_prompt = code_span(f"<lora:{model.config.export.name}:1>")
        return (
            ", the LoRA, to be used with its base: for ComfyUI in `models/loras/`, for A1111 in `models/Lora/`, with "
            f"{in_prompt} in the prompt"
        )
    return ", the whole model: for ComfyUI in `models/checkpoints/`, for A1111 in `models/Stable-diffusion/`"


def _is_adapter(model: Model, name: str) -> bool:
    return model.files.lora is not None and name == f"{model.config.export.name}.safetensors"


def _size_warning(model: Model) -> list[str]:
    channels, width = model.unet.block_out_channels[0], model.unet.cross_attention_dim
    if (channels, width) == (_SD1_CHANNELS, _SD1_TEXT_WIDTH):
        return []
    return [
        f"ComfyUI and A1111 expect the sizes of Stable Diffusion 1.x ({_SD1_CHANNELS} channels, text width "
        f"{_SD1_TEXT_WIDTH}). This UNet has {channels} and {width}: don't expect them to load it."
    ]


def _v_prediction(model: Model) -> list[str]:
    """What to set where no scheduler's config is read."""
    train = model.config.params.train
    if train.prediction_type != "v_prediction":
        return []
    zero = train.zero_terminal_snr
    beside = [
        "the base's checkpoint (with its name)" if _is_adapter(model, name)
        else f"the model, as {code_span(f'{Path(name).stem}.yaml')}"
        for name in model.files.single
    ]  # fmt: skip
    setting = "; in its settings, set “Noise schedule for sampling” to “Zero Terminal SNR”" if zero else ""
    return [
        f"The UNet predicts v{', on a schedule with zero terminal SNR' if zero else ''}. Neither program sees this in "
        "the file:",
        "- ComfyUI: put the node ModelSamplingDiscrete before the sampler, with sampling `v_prediction` and zsnr "
        f"`{'true' if zero else 'false'}`.\n"
        '- A1111: copy its `configs/v1-inference.yaml`, add `parameterization: "v"` under `params` of `model`, and put '
        f"it beside {' and beside '.join(beside)}{setting}.",
    ]


def _generate(folder: Path, sample: SampleParams) -> str:
    def option(name: str, value: str) -> str:
        joint = "=" if value.startswith("-") else " "  # else the value would be read as an option
        return f"--{name}{joint}{shlex.quote(value)}"

    options = [
        option("model", folder.as_posix()),
        option("prompt", one_line(sample.prompts[0])),  # line breaks are mere white space to CLIP's tokenizer
        *([option("negative-prompt", one_line(sample.negative_prompt))] if sample.negative_prompt else []),
        f"--steps {sample.num_inference_steps} --guidance-scale {sample.guidance_scale!r} --out outputs",
    ]
    return f"sdtrain generate {' '.join(options)}"
