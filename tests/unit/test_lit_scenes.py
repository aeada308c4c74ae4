"""The lit world: light adds up exactly, and an example is a function of the seed and its number."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.images import decode_rgb
from sdtrain.data.lit_scenes import (
    COLUMNS,
    LIGHTS,
    NAMED,
    LitScene,
    Stripes,
    albedo,
    caption,
    cutout,
    direction,
    draw_lit,
    foreground,
    light_map,
    mask,
    render,
    render_linear,
    to_linear,
    transport,
    wall,
    wall_transport,
)
from sdtrain.data.scenes import COLORS, KNOWN, Placement, Scene, coverage
from sdtrain.ground.light import linear_to_srgb

CIRCLE = LitScene(Scene("red", "circle", "large", "in the center", "blue"), Placement((32.0, 32.0), 16.0))
MIRRORED = {"left": "right", "right": "left", "top": "top", "bottom": "bottom"}


def lit_scenes(num: int) -> list[LitScene]:
    return [draw_lit(0, 2 * number).lit for number in range(num)]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def covers(lit: LitScene) -> np.ndarray:
    return coverage(lit.scene, lit.placement)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


# ---------------------------------------------------------------- light


@pytest.mark.parametrize(
    ("name", "strengths", "towards"),
    [
        ("left", (0.5, 0, 0, 0, 0.1), (-1, 0)),
        ("bottom", (0, 0, 0, 0.5, 0.1), (0, 1)),
        ("top left", (0.5, 0, 0.5, 0, 0.2), (-math.sqrt(0.5), -math.sqrt(0.5))),
        ("bottom right", (0, 0.5, 0, 0.5, 0.2), (math.sqrt(0.5), math.sqrt(0.5))),
    ],
)
def test_named_lights(name, strengths, towards):
    light = light_map(name)
    assert (light.shape, light.dtype, LIGHTS[4]) == ((1, 5, 3), np.float32, "front")
    assert np.array_equal(light[0], np.float32(strengths)[:, None].repeat(3, axis=1))
    assert direction(name) == pytest.approx(towards)


def test_a_corner_is_the_sum_of_its_singles():
    corners = [name for name, sides in NAMED.items() if len(sides) == 2]
    assert len(corners) == len(NAMED) - 4 == 4
    for name in corners:
        assert np.array_equal(light_map(name), sum(light_map(side) for side in NAMED[name]))


@pytest.mark.parametrize(("split", "num"), [("random", 200), ("all", 20), ("nothing", 20)])
def test_light_adds_up_however_it_is_split(split, num):
    rng = np.random.default_rng(0)
    for lit in lit_scenes(num):
        light = rng.uniform(0, 1, (1, 5, 3))
        kept = {"random": rng.integers(0, 2, (1, 5, 1)), "all": np.ones((1, 5, 1)), "nothing": np.zeros((1, 5, 1))}
        first, second = light * kept[split], light * (1 - kept[split])
        parts = render_linear(lit, first) + render_linear(lit, second)
        assert np.abs(render_linear(lit, light) - parts).max() <= 1e-15


def test_light_adds_up_in_pictures_but_not_in_srgb():
    in_linear, in_srgb = [], []
    for lit in lit_scenes(50):
        parts = [render(lit, light_map(name)) for name in ("top", "left")]
        whole = render(lit, light_map("top left"))
        in_linear.append(relative(sum(to_linear(part) for part in parts), to_linear(whole)))
        in_srgb.append(relative(sum(pixels(part) for part in parts), pixels(whole)))
    assert 0 < max(in_linear) < 0.01  # 8-bit pictures
    assert np.mean(in_linear) < 0.006
    assert min(in_srgb) > 0.3


def test_no_light_is_black_and_light_scales_the_picture():
    assert not render_linear(CIRCLE, np.zeros((1, 5, 3))).any()
    light = light_map("left")
    assert render_linear(CIRCLE, 2 * light) == pytest.approx(2 * render_linear(CIRCLE, light), abs=1e-15)
    green = render_linear(CIRCLE, light * [0, 1, 0])
    assert green[:, :, 1].all()
    assert not green[:, :, [0, 2]].any()


def test_nothing_clips():
    brightest = 0.0
    for color in COLORS:
        for background in ("white", "yellow"):
            lit = LitScene(replace(CIRCLE.scene, color=color, background=background), CIRCLE.placement)
            brightest = max(brightest, *(render_linear(lit, light_map(name)).max() for name in NAMED))
    assert brightest == pytest.approx(0.856, abs=0.001)
    with pytest.raises(AssertionError, match=r"clip at 1: 2\.4"):
        render(lit, 3 * light_map("top left"))


@pytest.mark.parametrize("name", NAMED)
def test_a_mirrored_scene_under_mirrored_light_is_the_mirrored_picture(name):
    mirrored_name = " ".join(MIRRORED[word] for word in name.split())
    for lit in lit_scenes(20):
        x, y = lit.placement.center
        mirrored = LitScene(lit.scene, Placement((64 - x, y), lit.placement.radius))
        picture, covered = render_linear(lit, light_map(name)), covers(lit)
        flipped, also_covered = render_linear(mirrored, light_map(mirrored_name))[:, ::-1], covers(mirrored)[:, ::-1]
        alike = np.abs(covered - also_covered) == 0  # outlines are drawn to a quarter pixel
        assert alike.mean() > 0.95
        assert np.abs(flipped - picture)[alike].max() < 1e-14
        assert np.abs(covered - also_covered).max() < 0.6


def test_transport_of_a_dome():
    at = Placement((32.5, 32.5), 16.0)  # the centre of pixel (32, 32)
    dome = transport(LitScene(CIRCLE.scene, at))
    assert dome.shape == (5, 64, 64)
    assert dome[:, 32, 32] == pytest.approx([0.6 / math.sqrt(1.36)] * 4 + [1])  # faces the viewer
    # 10 px to the left: n = (-0.5, 0, sqrt(0.75)) at 1.25 · 16 = 20 px
    left, right = (sign * 0.5 + 0.6 * math.sqrt(0.75) for sign in (1, -1))
    assert dome[:2, 32, 22] == pytest.approx(np.array([left, right]) / math.sqrt(1.36))
    assert dome[4, 32, 22] == pytest.approx(math.sqrt(0.75))
    assert dome[1, 32, 17] == 0  # turned away from the right
    assert dome[4].min() == pytest.approx(math.sqrt(0.1))  # no normal is steeper


def test_transport_of_the_wall():
    flat = wall_transport()
    assert flat[:, 31:33, 31:33].mean(axis=(1, 2)) == pytest.approx([0.45] * 4 + [0.8])
    assert flat[0, 5, [0, 63]] == pytest.approx([0.75 - 0.6 / 128, 0.15 + 0.6 / 128])
    assert np.array_equal(flat[2], flat[0].T)
    assert np.array_equal(flat[1], flat[0][:, ::-1])


def test_srgb_is_the_standard_curve_and_its_inverse():
    values = np.arange(256, dtype=np.uint8)
    linear = to_linear(values)
    assert linear[[0, 10, 255]] == pytest.approx([0, 10 / 255 / 12.92, 1])
    assert linear_to_srgb(np.array([0.001, 0.2140411])) == pytest.approx([0.01292, 0.5], abs=1e-6)
    assert np.array_equal(np.round(255 * linear_to_srgb(linear)), values)
    with pytest.raises(AssertionError, match="8-bit"):
        to_linear(np.zeros(3))


def test_albedo_is_linear():
    assert albedo("white") == pytest.approx([((245 / 255 + 0.055) / 1.055) ** 2.4] * 3)


# ---------------------------------------------------------------- pictures


def test_the_wall_is_the_picture_without_the_object():
    for lit in lit_scenes(20):
        outside = covers(lit) == 0
        light = light_map("top right")
        assert np.array_equal(pixels(wall(lit, light))[outside], pixels(render(lit, light))[outside])
        assert not np.array_equal(pixels(wall(lit, light)), pixels(render(lit, light)))


def test_the_light_comes_from_where_it_says():
    shown = pixels(render(CIRCLE, light_map("left"))).mean(axis=2)
    assert shown[32, 22] > shown[32, 42] + 20  # the object
    assert shown[32, 2] > shown[32, 61] + 20  # the wall


def test_the_mask_is_the_coverage():
    assert mask(CIRCLE).mode == "L"
    assert pixels(mask(CIRCLE)) / 255 == pytest.approx(covers(CIRCLE), abs=1e-6)


def test_a_cutout_is_the_picture_with_the_mask_as_alpha():
    for lit in lit_scenes(20):
        light = light_map("top left")
        found = cutout(lit, light, None)
        assert (found.mode, found.size) == ("RGBA", (64, 64))
        assert np.array_equal(pixels(found.getchannel("A")), pixels(mask(lit)))
        assert np.array_equal(pixels(found)[:, :, :3], pixels(render(lit, light)))


def test_a_foreground_is_the_object_on_grey():
    for lit in lit_scenes(20):
        light, covered = light_map("bottom"), covers(lit)
        shown, picture = pixels(foreground(lit, light, None)), pixels(render(lit, light))
        assert (shown[covered == 0] == 127).all()
        assert np.array_equal(shown[covered == 1], picture[covered == 1])
        rim = (covered > 0) & (covered < 1)
        blended = 127 + (picture - 127) * covered[:, :, None]
        assert np.abs(shown - blended)[rim].max() <= 1


def test_stripes_darken_the_foreground_to_two_fifths():
    stripes = Stripes(angle=0.0, period_px=16.0, phase=0.0)
    shade = stripes.shade()
    assert (shade.min(), shade.max()) == pytest.approx((0.4, 1))
    assert shade.mean() == pytest.approx(0.7, abs=0.01)
    assert np.abs(shade[:, :16] - shade[:, 16:32]).max() < 1e-12
    assert (shade == shade[0]).all()  # their normal is x
    assert ((shade[0] > 0.41) & (shade[0] < 0.99)).any()  # soft edges

    light, inside = light_map("left"), covers(CIRCLE) == 1
    ratio = to_linear(foreground(CIRCLE, light, stripes))[inside] / to_linear(foreground(CIRCLE, light, None))[inside]
    assert ratio[:, 0] == pytest.approx(shade[inside], abs=0.06)  # red is bright enough for 8 bit


@pytest.mark.parametrize(
    ("light_name", "text"),
    [
        ("left", "left light a large red circle in the center on a blue background"),
        ("top left", "top left light a large red circle in the center on a blue background"),
        (None, "a large red circle in the center on a blue background"),
    ],
)
def test_caption(light_name, text):
    assert caption(CIRCLE, light_name) == text


# ---------------------------------------------------------------- the data set


def test_examples_are_a_function_of_seed_and_index():
    drawn = [draw_lit(3, index) for index in range(40)]
    assert drawn == [draw_lit(3, index) for index in reversed(range(40))][::-1]
    assert not {example.lit for example in drawn} & {draw_lit(4, index).lit for index in range(40)}


def test_two_examples_share_a_scene_and_a_group_but_no_light():
    for number in range(200):
        first, second = draw_lit(0, 2 * number), draw_lit(0, 2 * number + 1)
        assert first.lit == second.lit
        assert first.group == second.group == str(number)
        assert first.light_name != second.light_name


def test_examples_cover_the_known_world_and_all_lights():
    drawn = [draw_lit(0, index) for index in range(800)]
    scenes = [example.lit.scene for example in drawn]
    assert {scene.color for scene in scenes} == {scene.background for scene in scenes} == set(KNOWN["color"])
    assert {scene.shape for scene in scenes} == set(KNOWN["shape"])
    assert {(scene.size, scene.style) for scene in scenes} == {("large", "plain")}
    assert all(abs(example.lit.placement.radius - 16) <= 0.8 for example in drawn)
    for turn in (0, 1):
        names = [example.light_name for example in drawn[turn::2]]
        assert min(map(names.count, NAMED)) > 25  # 50 expected
    pairs = {(example.light_name, example.foreground_light_name) for example in drawn}
    assert pairs == {(a, b) for a in NAMED for b in NAMED if a != b}
    assert sum(example.stripes is not None for example in drawn) == pytest.approx(400, abs=60)


def test_light_1_is_some_but_not_all_of_the_light():
    parts = set()
    for index in range(800):
        example = draw_lit(0, index)
        light, light_1 = example.light, example.light_1
        assert ((light_1 == light) | (light_1 == 0)).all()
        assert light_1.any()
        assert (light - light_1).any()
        parts.add((example.light_name, light_1.tobytes()))
    assert len(parts) == 4 * 2 + 4 * 6  # all splits of two and of three lights


def test_columns_hold_what_the_example_shows():
    example = draw_lit(0, 5)
    while example.stripes is None:
        example = draw_lit(0, int(example.group) * 2 + 2)
    read = {name: column(example) for name, column in COLUMNS.items()}
    light, light_1 = (np.load(io.BytesIO(read[name]), allow_pickle=False) for name in ("light", "light_1"))
    for values, expected in ((light, light_map(example.light_name)), (light_1, example.light_1)):
        assert (values.dtype, values.shape) == (np.float32, (1, 5, 3))
        assert np.array_equal(values, expected)
    images = {
        "background": wall(example.lit, light),
        "relit_1": render(example.lit, light_1),
        "relit_2": render(example.lit, light - light_1),
    }
    assert set(read) == {*images, "foreground", "mask", "light", "light_1"}
    for name, image in images.items():
        assert np.array_equal(pixels(decode_rgb(read[name])), pixels(image))
    under_another = cutout(example.lit, light_map(example.foreground_light_name), example.stripes)
    for name, image in (("mask", mask(example.lit)), ("foreground", under_another)):
        found = Image.open(io.BytesIO(read[name]))
        assert found.mode == image.mode
        assert np.array_equal(pixels(found), pixels(image))
    relit = sum(to_linear(images[name]) for name in ("relit_1", "relit_2"))
    assert relative(relit, to_linear(render(example.lit, light))) < 0.01
