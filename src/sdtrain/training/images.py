"""Validation images: kept beside a run's saved states as they are drawn, written as `<prompt>/<step>.png` at its end.

They are no part of a state: a run that resumes before a validation draws its images again, to the same bytes.
"""

import re
import shutil
import unicodedata
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdtrain.ground.files import is_sealed, new_folder, read_json, seal_folder, write_json
from sdtrain.params.schema import ValidationParams

_ASKED = "asked.json"
_MAX_NAME = 60


def asked_images(params: ValidationParams, prompts: list[str]) -> dict:
    """What decides, beside the weights, how a validation's images look, as JSON.

    Args:
        prompts: one for each image; held-out captions with `num_held_out`.
    """
    return {"prompts": prompts, **params.model_dump(include={"num_held_out", "num_inference_steps", "guidance_scale"})}


def keep_images(folder: Path, images: list[Image.Image], asked: dict) -> None:
    """Write one validation's images to a sealed folder, each with its prompt as the PNG file's text `prompt`."""
    with new_folder(folder, durable=True) as partial:
        for number, (image, prompt) in enumerate(zip(images, asked["prompts"], strict=True)):
            text = PngInfo()
            text.add_text("prompt", prompt)
            image.save(partial / f"{number}.png", pnginfo=text)
        write_json(partial / _ASKED, asked)
        seal_folder(partial)


def has_images(folder: Path, asked: dict) -> bool:
    """Whether the folder has what is asked for, undamaged."""
    return is_sealed(folder) and read_json(folder / _ASKED) == asked


def write_images(out: Path, kept: dict[int, Path], asked: dict) -> None:
    """Write `out`: a folder for each prompt, with an image for each step, `<step>.png`; without prompts it is empty.

    Leaves out, and prints, the steps whose images were drawn for other prompts or with other settings.

    Args:
        kept: `keep_images`'s folders by step.
    """
    found = {step: folder for step, folder in kept.items() if has_images(folder, asked)}
    with new_folder(out) as partial:
        for number, name in enumerate(folder_names(asked["prompts"])):
            (partial / name).mkdir()
            for step, folder in found.items():
                shutil.copyfile(folder / f"{number}.png", partial / name / f"{step}.png")
    missing = [str(step) for step in kept if step not in found]
    if asked["prompts"] and missing:
        print(f"{out} has no images of step {', '.join(missing)}: other prompts or settings were drawn there")


def folder_names(prompts: list[str]) -> list[str]:
    """A folder's name for each prompt: its number, and its words as far as ASCII has them, e.g. `0-a-red-circle`."""
    names = []
    for number, prompt in enumerate(prompts):
        plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
        words = "-".join(re.findall("[a-z0-9]+", plain))
        names.append(f"{number}-{words}"[:_MAX_NAME].rstrip("-"))
    return names
