"""What the measured prompts ask of a model."""

from types import SimpleNamespace

import pytest
from PIL import Image, ImageChops

from sdtrain.data import scenes
from sdtrain.data.conditions import CONDITIONS
from sdtrain.data.edges import canny_edges
from sdtrain.data.images import draw_crop, square_pixels
from sdtrain.evaluation import prompt_accuracy as module
from sdtrain.evaluation.drawn_images import DrawnImages
from sdtrain.evaluation.prompt_accuracy import World, prompt_accuracy
from sdtrain.ground.values import Values


@pytest.mark.parametrize("kind", ["outline", "canny"])
@pytest.mark.parametrize("side", [64, 128])
def test_hints_are_as_large_as_the_images_that_the_model_draws(kind, side, make_params, monkeypatch):
    """A ControlNet's pipeline draws at the hint's size: a smaller hint would ask for smaller images."""
    asked = []

    def draw(pipeline, prompts, seeds, *, conditions, **settings):
        asked.extend(conditions["hint"])
        return [Image.new("RGB", (side, side))] * len(prompts)

    monkeypatch.setattr(module, "generate", draw)
    pipeline = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(sample_size=side // 8)), vae_scale_factor=8)
    params, world = make_params().evaluate, World(free=True, has_new=False, hint=kind)
    prompt_accuracy(params, 0, {"trained": pipeline}, world, Values(), DrawnImages())
    question = module._questions(params, 0, "known", world)[0]
    image = scenes.render(question.scene, question.placement)
    if kind == "outline":
        crop = draw_crop(image.size, side, center_crop=True, seed=0, sample_id="")
        file = scenes.png_bytes(scenes.outline(question.scene, question.placement))
        cached = CONDITIONS["hint"].crop(file, crop, 1)
    else:
        cached = canny_edges(square_pixels(image, side, True, 0, ""), question.seed, question.prompt)
    assert {hint.size for hint in asked} == {(side, side)}
    assert ImageChops.difference(asked[0], Image.fromarray(cached[0]).convert("RGB")).getbbox() is None
