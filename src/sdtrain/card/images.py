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
_BOTH = "base left, trained right"


def images(model: Model, sample: SampleParams, seed: int, grid: str) -> str:
    """The grid, how it was drawn and its rows.

    Args:
        sample: its `prompts` are the rows'.
        grid: the file's name.
    """
    if model.is_lit:
        shown, text = _lit(model, seed)
    else:
        shown, text = _held_out(model) if sample.num_held_out is not None else (_BOTH, "Left the base, right")
        text += f" the trained model, with the same prompts and seeds: {_seeds(sample.images_per_prompt, seed)}"
    negative = f", negative prompt {code_span(sample.negative_prompt)}" if sample.negative_prompt else ""
    rows = "\n".join(f"{row}. {code_span(prompt)}" for row, prompt in enumerate(sample.prompts, start=1))
    return (
        f"![Grid of images: {shown}]({grid})\n\n"
        f"{text}; "
        f"DPM-Solver++, {sample.num_inference_steps} steps, guidance scale {sample.guidance_scale:g}{negative}. "
        f"The rows, from the top:\n\n{rows}"
    )


def _seeds(num: int, seed: int) -> str:
    return f"one image per prompt, seed {seed}" if num == 1 else f"{num} per prompt, seeds {seed} to {seed + num - 1}"


def _lit(model: Model, seed: int) -> tuple[str, str]:
    """Of the lit world: what the columns show, in short and in sentences."""
    background = ", and the background under the light to draw, which isn't shown" if "background" in model.sees else ""
    told = (
        "The light is told by a map"
        if "light" in model.sees
        else "The light is told by a prompt's first words, such as `left light`, which the rows leave out"
    )
    return "foreground, base, then truth beside trained under four lights", (
        f"Scenes that are in no data set. The trained model sees the foreground, under another light{background}. "
        f"{_of_base(model)} {told}. From left to right: the foreground; the base under light from the left; then for "
        "light from the left, right, top and bottom the truth beside the trained model. One image each, "
        f"seed {seed} in the first row and one more in each row below"
    )


def _held_out(model: Model) -> tuple[str, str]:
    """Likewise, of held-out images, up to the base."""
    if model.ic_light is None:
        return (
            _BOTH,
            "Held-out captions and conditions, of which the base sees the captions alone. Left the base, right",
        )
    return "conditions, held-out image, base, trained", (
        f"Held-out captions and conditions. The trained model sees {in_words(model.sees)}. "
        f"{_of_base(model)} From left to right: the conditions, the held-out image itself, the base, and"
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
    *first, last = (_WORDS[name] for name in names)
    return f"{', '.join(first)} and {last}" if first else last
