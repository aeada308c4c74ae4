"""The card's grid of images, and what it shows."""

from collections.abc import Sequence

from sdtrain.card.recorded import Model
from sdtrain.ground.markdown import code_span
from sdtrain.params.schema import SampleParams

_WORDS = {
    "prompt": "the prompt",
    "foreground": "the foreground",
    "background": "the background",
    "light": "a light map",
}


def images(model: Model, sample: SampleParams, seed: int, grid: str, checkpoints: list[str]) -> str:
    """The grid, how it was drawn and its rows.

    Args:
        sample: its `prompts` are the rows'.
        grid: the file's name.
        checkpoints: those that it shows beside base and trained model.
    """
    if model.is_lit:
        shown, text = _lit(model, seed, checkpoints)
    else:
        is_held_out = sample.num_held_out is not None
        shown, text = _held_out(model, checkpoints) if is_held_out else _models(checkpoints)
        text += f", with the same prompts and seeds: {_seeds(sample.images_per_prompt, seed)}"
    negative = f", negative prompt {code_span(sample.negative_prompt)}" if sample.negative_prompt else ""
    rows = "\n".join(f"{row}. {code_span(prompt)}" for row, prompt in enumerate(sample.prompts, start=1))
    return (
        f"![Grid of images: {shown}]({grid})\n\n"
        f"{text}; "
        f"DPM-Solver++, {sample.num_inference_steps} steps, guidance scale {sample.guidance_scales[0]:g}{negative}. "
        f"The rows, from the top:\n\n{rows}"
    )


def _seeds(num: int, seed: int) -> str:
    return f"one image per prompt, seed {seed}" if num == 1 else f"{num} per prompt, seeds {seed} to {seed + num - 1}"


def _models(checkpoints: list[str]) -> tuple[str, str]:
    """What the columns show, in short and in a sentence without its end."""
    if not checkpoints:
        return "base left, trained right", "Left the base, right the trained model"
    return ", ".join(["base", "trained", *checkpoints]), f"From left to right: the base, {_trained(checkpoints)}"


def _trained(checkpoints: list[str]) -> str:
    return _joined(["the trained model", *(f"the checkpoint {code_span(name)}" for name in checkpoints)])


def _lit(model: Model, seed: int, checkpoints: list[str]) -> tuple[str, str]:
    """Of the lit world: what the columns show, in short and in sentences."""
    background = ", and the background under the light to draw, which isn't shown" if "background" in model.sees else ""
    told = (
        "The light is told by a map"
        if "light" in model.sees
        else "The light is told by a prompt's first words, such as `left light`, which the rows leave out"
    )
    beside = _joined(["trained", *checkpoints])
    return f"foreground, base, then truth beside {beside} under four lights", (
        f"Scenes that are in no data set. The trained model sees the foreground, under another light{background}. "
        f"{_of_base(model)} {told}. From left to right: the foreground; the base under light from the left; then for "
        f"light from the left, right, top and bottom the truth beside {_trained(checkpoints)}. One image each, "
        f"seed {seed} in the first row and one more in each row below"
    )


def _held_out(model: Model, checkpoints: list[str]) -> tuple[str, str]:
    """Likewise, of held-out images."""
    if model.ic_light is None:
        shown, text = _models(checkpoints)
        return shown, f"Held-out captions and conditions, of which the base sees the captions alone. {text}"
    return ", ".join(["conditions, held-out image, base, trained", *checkpoints]), (
        f"Held-out captions and conditions. The trained model sees {in_words(model.sees)}. "
        f"{_of_base(model)} From left to right: the conditions, the held-out image itself, the base, "
        f"{'' if checkpoints else 'and '}{_trained(checkpoints)}"
    )


def _of_base(model: Model) -> str:
    """What the base sees of the conditions."""
    if not model.has_offset:
        return "The base sees the prompts alone."
    seen = in_words([name for name in model.sees if name != "light"])
    no_map = ", but no light map" if "light" in model.sees else ""
    return f"The base is the IC-Light that the training started from: it sees {seen}{no_map}."


def in_words(names: Sequence[str]) -> str:
    """A list of what a model sees."""
    return _joined([_WORDS[name] for name in names])


def _joined(words: list[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
