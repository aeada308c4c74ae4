"""How to use what was exported: with Diffusers, ComfyUI, A1111 and sdtrain itself.

What was checked in their code: ComfyUI recognises Stable Diffusion 1.x by the UNet's channels and the text's width, and
sets v and zero terminal SNR by its node ModelSamplingDiscrete; A1111 assumes the same sizes, reads the prediction type
from a .yaml file with the checkpoint's name, and has zero terminal SNR among its settings. IC-Light's public demos and
kijai's ComfyUI-IC-Light, which refuses all but Stable Diffusion 1.5, add a file in Diffusers' keys to the base's UNet.
ComfyUI-IC-Light-Native asks for the original keys in its README, since ComfyUI itself reads the file.
"""

import json
import shlex
from pathlib import Path

from sdtrain.card.images import in_words
from sdtrain.card.recorded import Model
from sdtrain.card.snippets import controlnet_snippet, lora_snippet, pipeline_snippet, relighting_snippet
from sdtrain.ground.errors import InputError
from sdtrain.ground.layout import ADAPTER_FILE, CONTROLNET_FILE, MERGED, PIPELINE_FILE
from sdtrain.ground.light import MAP_PX
from sdtrain.ground.markdown import code_block, code_span, one_line
from sdtrain.params.schema import SampleParams

_SD1_CHANNELS, _SD1_TEXT_WIDTH = 320, 768
_CONDITION_FILES = {
    "hint": "hint.png",
    "foreground": "foreground.png",
    "background": "background.png",
    "light": "light.npy",
}


def usage(model: Model, sample: SampleParams, seed: int) -> str:
    """Instructions for each of the files that are there."""
    files, sample = model.files, _as_asked(model, sample)
    blocks = [
        "## Use",
        f"Paths are the project's. Elsewhere, give this model's own folder or repository in place of "
        f"{code_span(files.folder.as_posix())}.",
    ]
    if files.lora is not None:
        blocks += [
            f"With Diffusers, the LoRA ({code_span(ADAPTER_FILE)}, {files.lora:.1f} MiB) on its base:",
            code_block("python", lora_snippet(model, sample, seed)),
        ]
    if files.controlnet is not None:
        blocks += [
            f"With Diffusers, the ControlNet ({code_span(CONTROLNET_FILE)}, {files.controlnet:.1f} MiB) with its base; "
            f"the hint {code_span('hint.png')} is as large as the image to draw:",
            code_block("python", controlnet_snippet(model, sample, seed)),
        ]
    if files.pipeline is not None and model.ic_light is not None:
        blocks += _relighting(model, sample, seed)
    elif files.pipeline is not None:
        blocks += [
            f"With Diffusers, the whole model ({files.pipeline:.1f} MiB):",
            code_block("python", pipeline_snippet(files.folder, sample, seed)),
        ]
    if files.merged is not None:
        blocks += [
            f"With Diffusers, the whole model with the adapter merged into it ({files.merged:.1f} MiB):",
            code_block("python", pipeline_snippet(files.folder / MERGED, sample, seed)),
        ]
    if files.single:
        lines = [f"- {code_span(name)} ({size:.1f} MiB){_place(model, name)}" for name, size in files.single.items()]
        blocks += ["In one file:" if model.ic_light is None else "For other programs:", "\n".join(lines)]
        blocks += _offset_notes(model)
        blocks += _size_warning(model) or _v_prediction(model)
    conditions = "".join(f" --{name} {_CONDITION_FILES[name]}" for name in model.sees)
    blocks += ["With sdtrain, in the project's folder:", code_block("sh", _generate(files.folder, sample) + conditions)]
    return "\n\n".join(blocks)


def _as_asked(model: Model, sample: SampleParams) -> SampleParams:
    """With the words that the grid's rows leave out."""
    if not model.is_lit or "light" in model.sees:
        return sample
    return sample.model_copy(update={"prompts": [f"left light {prompt}" for prompt in sample.prompts]})


def _relighting(model: Model, sample: SampleParams, seed: int) -> list[str]:
    assert model.ic_light is not None
    needed = ["`foreground.png`, the object under any light, elsewhere transparent"]
    if "background" in model.sees:
        needed.append("`background.png`, what stands behind it, under the light to draw")
    if "light" in model.sees:
        size = model.ic_light.light_size
        reduced = ", to which a larger map must be reduced by means over areas" if size == [MAP_PX, MAP_PX] else ""
        columns = ", whose columns light from the left, right, top, bottom and front" if model.is_lit else ""
        needed.append(
            f"`light.npy`, the light as an environment map{columns}: linear, not negative, an array of "
            f"{code_span(json.dumps([*size, 3]))}, height, width and RGB{reduced}"
        )
    words = " The prompt's first words tell the light." if model.ic_light.light == "words" else ""
    return [
        f"With Diffusers, the whole model ({model.files.pipeline:.1f} MiB). Its pipeline isn't one of Diffusers' own, "
        f"but in the folder's own file {code_span(PIPELINE_FILE)}, whose text stands below. The model needs:",
        "\n".join(f"- {line}" for line in needed),
        f"Images are cropped to squares around their centers.{words}",
        code_block("python", relighting_snippet(model, sample, seed)),
        f"{code_span(PIPELINE_FILE)}, a file of sdtrain under the Apache License 2.0, to be put where Python finds it:",
        code_block("python", _pipeline_code(model)),
    ]


def _pipeline_code(model: Model) -> str:
    path = model.files.folder / PIPELINE_FILE
    try:
        return path.read_text(encoding="utf-8").rstrip()
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}; run `dvc repro export`") from None


def _offset_notes(model: Model) -> list[str]:
    """On an IC-Light's single files."""
    if model.ic_light is None:
        return []
    seen = in_words(["prompt", *(name for name in model.sees if name != "light")])
    lacking = (
        f" They lack the light encoder: there the model sees {seen} only, and no light map."
        if "light" in model.sees
        else ""
    )
    return [
        "Both hold what training added to the UNet of this model's base and nothing else: these programs add it to a "
        f"Stable Diffusion 1.5, best to that base.{lacking}"
    ]


def _place(model: Model, name: str) -> str:
    """Where other programs look for a single file."""
    if model.ic_light is not None:
        if name == f"{model.config.export.name}-original.safetensors":
            return (
                ", the same in the original keys: for ComfyUI-IC-Light-Native in `models/unet/` or "
                "`models/diffusion_models/`"
            )
        demo = "gradio_demo_bg.py" if "background" in model.sees else "gradio_demo.py"
        return (
            f", the UNet's offset in Diffusers' keys: for the public IC-Light's demo `{demo}` in place of "
            f"`models/iclight_sd15_{model.ic_light.variant}.safetensors`, for ComfyUI-IC-Light (kijai's) in "
            "`models/unet/`"
        )
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
    programs = "ComfyUI and A1111" if model.ic_light is None else "These programs"
    return [
        f"{programs} expect the sizes of Stable Diffusion 1.x ({_SD1_CHANNELS} channels, text width "
        f"{_SD1_TEXT_WIDTH}). This UNet has {channels} and {width}: don't expect them to load it."
    ]


def _v_prediction(model: Model) -> list[str]:
    """What to set where no scheduler's config is read."""
    train = model.config.params.train
    if train.prediction_type != "v_prediction":
        return []
    zero = train.zero_terminal_snr
    comfyui = (
        "- ComfyUI: put the node ModelSamplingDiscrete before the sampler, with sampling `v_prediction` and zsnr "
        f"`{'true' if zero else 'false'}`."
    )
    said = f"The UNet predicts v{', on a schedule with zero terminal SNR' if zero else ''}."
    if model.ic_light is not None:
        return [
            f"{said} These programs don't see this in the files:",
            f"{comfyui}\n- The demo: let it load its scheduler from this model's folder `scheduler/`.",
        ]
    beside = [
        "the base's checkpoint (with its name)" if _is_adapter(model, name)
        else f"the model, as {code_span(f'{Path(name).stem}.yaml')}"
        for name in model.files.single
    ]  # fmt: skip
    setting = "; in its settings, set “Noise schedule for sampling” to “Zero Terminal SNR”" if zero else ""
    return [
        f"{said} Neither program sees this in the file:",
        f"{comfyui}\n"
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
        f"--steps {sample.num_inference_steps} --guidance-scale {sample.guidance_scales[0]!r} --out outputs",
    ]
    return f"sdtrain generate {' '.join(options)}"
