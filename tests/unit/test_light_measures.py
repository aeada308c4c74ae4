"""Measures of relighting: right on exact pictures, and each tells its own fault."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.lit_scenes import NAMED, LitScene, albedo, direction, draw_lit, light_map, render, transport, wall
from sdtrain.data.scenes import COLORS, Placement, Scene, coverage, iou
from sdtrain.evaluation import light_measures
from sdtrain.evaluation.light_measures import (
    albedo_error,
    foreground_iou,
    light_angle_error,
    linearity_error,
    named_color,
    sensitivity,
)

EXAMPLES = [draw_lit(0, index) for index in range(100)]
CIRCLE = LitScene(Scene("red", "circle", "large", "in the center", "blue"), Placement((32.0, 32.0), 16.0))
BLACK = Image.new("RGB", (64, 64))


def moved(lit: LitScene, pixels: float, angle: float) -> LitScene:
    x, y = lit.placement.center
    center = (x + pixels * math.cos(angle), y + pixels * math.sin(angle))
    return LitScene(lit.scene, Placement(center, lit.placement.radius))


def recolored(lit: LitScene, color: str) -> LitScene:
    return LitScene(replace(lit.scene, color=color), lit.placement)


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """With the built-in VAE's error, 12 of 255 a channel, but nowhere the same."""
    values = np.asarray(image) + rng.normal(0, 12, (64, 64, 3))
    return Image.fromarray(np.round(np.clip(values, 0, 255)).astype(np.uint8))


# ---------------------------------------------------------------- direction


def test_the_light_of_exact_pictures_is_read_to_a_fraction_of_a_degree():
    errors = [light_angle_error(render(e.lit, e.light), e.lit, e.light_name) for e in EXAMPLES]
    assert max(errors) < 0.3
    assert np.mean(errors) < 0.05


def test_the_light_of_noisy_pictures_is_read_to_a_few_degrees():
    rng = np.random.default_rng(0)
    errors = [light_angle_error(noisy(render(e.lit, e.light), rng), e.lit, e.light_name) for e in EXAMPLES]
    assert max(errors) < 10
    assert np.mean(errors) < 2


def test_the_fitted_light_is_the_best_that_is_not_negative():
    rng = np.random.default_rng(0)
    where = coverage(CIRCLE.scene, CIRCLE.placement) > 0.95
    transports = transport(CIRCLE)[:, where]
    off = 0
    for _ in range(20):
        pixels = np.einsum("khw,k->hw", transport(CIRCLE), rng.normal(0, 1, 5))[:, :, None].repeat(3, axis=2)
        strengths = light_measures._fitted_light(pixels, CIRCLE, where)
        slope = transports @ (transports.T @ strengths - pixels[where].mean(axis=1))
        assert strengths.min() >= 0
        assert np.abs(slope[strengths > 0]).max(initial=0) < 1e-9  # Karush-Kuhn-Tucker: no step down is allowed
        assert slope.min() > -1e-9
        off += (strengths == 0).sum()
    assert 0 < off < 100


@pytest.mark.parametrize("asked", NAMED)
def test_light_from_another_side_is_wrong_by_the_angle_between_them(asked):
    for name in NAMED:
        between = math.degrees(math.acos(np.clip(direction(asked) @ direction(name), -1, 1)))
        assert light_angle_error(render(CIRCLE, light_map(name)), CIRCLE, asked) == pytest.approx(between, abs=0.5)


def test_light_without_a_direction_is_as_wrong_as_can_be():
    front = light_map("left") * 0
    front[:, 4] = 0.5
    both = (light_map("left") + light_map("right")) / 2
    for image in (render(CIRCLE, front), render(CIRCLE, both), BLACK):
        assert light_angle_error(image, CIRCLE, "left") == 180


# ---------------------------------------------------------------- colour


def test_albedo_of_exact_pictures_is_exact():
    errors = np.array([albedo_error(render(e.lit, e.light), e.lit, e.light) for e in EXAMPLES])
    assert errors.max() < 0.002
    assert [named_color(render(e.lit, e.light), e.lit, e.light) for e in EXAMPLES] == [
        e.lit.scene.color for e in EXAMPLES
    ]


def test_a_wrong_exposure_is_an_error_but_none_of_chroma():
    error, chroma = albedo_error(render(CIRCLE, light_map("left") / 2), CIRCLE, light_map("left"))
    assert error == pytest.approx(0.5, abs=0.005)
    assert chroma < 0.005


@pytest.mark.parametrize("color", [color for color in COLORS if color != "red"])
def test_a_wrong_hue_is_an_error_of_chroma_too(color):
    light = light_map("top right")
    image = render(recolored(CIRCLE, color), light)
    assert named_color(image, CIRCLE, light) == color
    drawn, wanted = albedo(color), albedo("red")
    cosine = drawn @ wanted / np.linalg.norm(drawn) / np.linalg.norm(wanted)
    expected = np.linalg.norm(drawn - wanted) / np.linalg.norm(wanted), math.sqrt(1 - cosine**2)
    assert albedo_error(image, CIRCLE, light) == pytest.approx(expected, rel=0.01)


def test_black_has_no_albedo():
    assert albedo_error(BLACK, CIRCLE, light_map("left")) == (1, 1)


# ---------------------------------------------------------------- the object


def test_the_object_of_exact_pictures_lies_where_it_should():
    overlaps = [foreground_iou(render(e.lit, e.light), e.lit) for e in EXAMPLES]
    assert min(overlaps) > 0.98
    assert np.mean(overlaps) > 0.999


def test_white_before_gray_is_told_apart_under_every_light():
    lit = recolored(LitScene(replace(CIRCLE.scene, background="gray"), CIRCLE.placement), "white")
    for name in NAMED:
        image = render(lit, light_map(name))
        inside = coverage(lit.scene, lit.placement) > 0.95
        off = np.abs(np.asarray(image).astype(int) - np.asarray(wall(lit, light_map(name)))).max(axis=2)
        assert (off[inside] < 20).sum() > 10  # its shaded side looks like the wall
        assert foreground_iou(image, lit) > 0.98


def test_noise_is_no_object():
    rng = np.random.default_rng(0)
    assert np.mean([foreground_iou(noisy(render(e.lit, e.light), rng), e.lit) for e in EXAMPLES[:50]]) > 0.9
    assert max(foreground_iou(noisy(wall(e.lit, e.light), rng), e.lit) for e in EXAMPLES[:50]) < 0.2


@pytest.mark.parametrize(("distance", "most"), [(8, 0.75), (20, 0.4)])
def test_a_moved_object_overlaps_less(distance, most):
    rng = np.random.default_rng(0)
    found, true = [], []
    for example in EXAMPLES:
        elsewhere = moved(example.lit, distance, rng.uniform(0, 2 * math.pi))
        found.append(foreground_iou(render(elsewhere, example.light), example.lit))
        shown, wanted = (coverage(lit.scene, lit.placement) for lit in (elsewhere, example.lit))
        on_outline = (wanted > 0) & (wanted <= 0.95)
        true.append(iou((shown > 0.5)[~on_outline].astype(float), (wanted > 0)[~on_outline].astype(float)))
    assert max(found) < most
    assert np.abs(np.subtract(found, true)).mean() < 0.02


def test_the_object_may_have_another_light_or_colour_but_not_be_absent():
    for example in EXAMPLES[:40]:
        lit = example.lit
        assert foreground_iou(render(lit, light_map(example.foreground_light_name)), lit) > 0.98
        assert foreground_iou(wall(lit, example.light), lit) == 0
    assert foreground_iou(render(recolored(CIRCLE, "green"), light_map("left")), CIRCLE) > 0.98
    assert foreground_iou(BLACK, CIRCLE) == 0


def test_another_shape_overlaps_less():
    diamond = LitScene(replace(CIRCLE.scene, shape="diamond"), CIRCLE.placement)
    assert 0.4 < foreground_iou(render(diamond, light_map("left")), CIRCLE) < 0.7


# ---------------------------------------------------------------- linearity


def test_exact_pictures_are_linear_and_sensitive():
    errors, differences = [], []
    for example in EXAMPLES[:50]:
        images = [render(example.lit, light_map(name)) for name in ("bottom", "right", "bottom right")]
        errors.append(linearity_error(*images, example.lit))
        differences.append(sensitivity(*images, example.lit))
    assert 0 < np.mean(errors) < 0.008  # 8 bit
    assert np.mean(differences) == pytest.approx(0.31, abs=0.02)


def test_a_model_that_ignores_the_light_is_neither():
    same = render(CIRCLE, light_map("left"))
    assert linearity_error(same, same, same, CIRCLE) == pytest.approx(1)
    assert sensitivity(same, same, same, CIRCLE) == 0
    assert linearity_error(BLACK, BLACK, BLACK, CIRCLE) == 1
    assert sensitivity(BLACK, BLACK, BLACK, CIRCLE) == 0


def test_only_the_object_counts():
    first, second, both = (render(CIRCLE, light_map(name)) for name in ("top", "left", "top left"))
    expected = linearity_error(first, second, both, CIRCLE), sensitivity(first, second, both, CIRCLE)
    other = LitScene(replace(CIRCLE.scene, background="yellow"), CIRCLE.placement)
    first = render(other, light_map("top"))
    found = linearity_error(first, second, both, CIRCLE), sensitivity(first, second, both, CIRCLE)
    assert found == pytest.approx(expected, abs=0.01)  # rims of up to 5 %


def test_larger_pictures_are_scaled():
    lit, light = CIRCLE, light_map("top left")
    large = render(lit, light).resize((256, 256), Image.Resampling.NEAREST)
    assert light_angle_error(large, lit, "top left") < 0.3
    assert albedo_error(large, lit, light)[0] < 0.002
    assert foreground_iou(large, lit) > 0.98
