"""The world of scenes: what is drawn can be said, and can be measured again."""

from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdtrain.data.images import decode_rgb
from sdtrain.data.scenes import (
    ANCHORS_PX,
    COLORS,
    KNOWN,
    NEW,
    RADII_PX,
    SHAPES,
    STYLES,
    Placement,
    Scene,
    caption,
    draw_caption,
    draw_scene,
    measure,
    place,
    png_bytes,
    render,
)

EXAMPLE = Scene("orange", "star", "large", "at the top left", "white")


def every_scene(rng: np.random.Generator) -> list[Scene]:
    """Every colour on every other as every shape in both styles; size and position are sampled."""
    return [
        Scene(color, shape, str(rng.choice(list(RADII_PX))), str(rng.choice(list(ANCHORS_PX))), background, style)
        for color, background, shape, style in product(COLORS, COLORS, SHAPES, STYLES)
        if color != background
    ]


@pytest.mark.parametrize("background", COLORS)
def test_measure_reads_back_what_render_drew(background):
    rng = np.random.default_rng(list(COLORS).index(background))
    drawn = [scene for scene in every_scene(rng) if scene.background == background]
    assert len(drawn) == 112
    assert [scene for scene in drawn if measure(render(scene, place(scene, rng))) != scene] == []


def test_measure_reads_every_size_position_and_style_of_every_shape():
    rng = np.random.default_rng(1)
    drawn = [
        Scene("white", shape, size, position, "green", style)  # its outline is nearer to the background than its fill
        for shape, size, position, style in product(SHAPES, RADII_PX, ANCHORS_PX, STYLES)
    ]
    assert [scene for scene in drawn if measure(render(scene, place(scene, rng))) != scene] == []


def test_measure_survives_a_mild_blur():
    rng = np.random.default_rng(2)
    for scene in every_scene(rng)[::4]:
        found = measure(render(scene, place(scene, rng)).filter(ImageFilter.GaussianBlur(0.6)))
        assert (found.shape, found.color, found.background) == (scene.shape, scene.color, scene.background)


def test_measure_survives_another_resolution():
    rng = np.random.default_rng(3)
    for scene in every_scene(rng)[::16]:
        assert measure(render(scene, place(scene, rng)).resize((256, 256), Image.Resampling.BICUBIC)) == scene


def test_png_keeps_every_pixel():
    image = render(EXAMPLE, place(EXAMPLE, np.random.default_rng(0)))
    assert np.array_equal(np.asarray(decode_rgb(png_bytes(image))), np.asarray(image))


@pytest.mark.parametrize("color", ["#000000", "#ffffff", "#2896d2"])
def test_a_blank_image_shows_no_scene(color):
    assert measure(Image.new("RGB", (64, 64), color)) is None


def test_a_speck_is_no_scene():
    image = Image.new("RGB", (64, 64), COLORS["white"])
    image.paste(COLORS["red"], (30, 30, 36, 36))  # 36 px, fewer than count as an object
    assert measure(image) is None


def test_render_jitters_by_its_rng_alone():
    first, again, other = (
        np.asarray(render(EXAMPLE, place(EXAMPLE, np.random.default_rng(seed)))) for seed in (0, 0, 1)
    )
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_render_paints_the_named_colours():
    pixels = np.asarray(render(Scene("red", "square", "large", "in the center", "blue"), Placement((32, 32), 16)))
    assert tuple(pixels[32, 32]) == COLORS["red"]
    assert tuple(pixels[2, 2]) == COLORS["blue"]


def concepts(scene: Scene) -> set[str]:
    return {scene.color, scene.shape, scene.style, scene.background}


NEW_NAMES = {name for names in NEW.values() for name in names}


def test_known_and_new_concepts_make_up_the_world():
    assert set(KNOWN["color"] + NEW["color"]) == set(COLORS)
    assert set(KNOWN["shape"] + NEW["shape"]) == set(SHAPES)
    assert set(KNOWN["style"] + NEW["style"]) == set(STYLES)


def test_known_scenes_never_show_a_new_concept():
    rng = np.random.default_rng(0)
    drawn = [draw_scene(rng, new=False) for _ in range(500)]
    assert [scene for scene in drawn if concepts(scene) & NEW_NAMES] == []


@pytest.mark.parametrize("known_background", [False, True])
def test_new_scenes_always_show_a_new_concept(known_background):
    rng = np.random.default_rng(0)
    drawn = [draw_scene(rng, new=True, known_background=known_background) for _ in range(500)]
    for scene in drawn:
        assert concepts(scene) & NEW_NAMES == set(scene.new_concepts) != set()
    assert any(scene.background in NEW["color"] for scene in drawn) is not known_background


def test_new_scenes_cover_the_world_and_never_hide_their_shape():
    rng = np.random.default_rng(1)
    drawn = [draw_scene(rng, new=True) for _ in range(1000)]
    assert set().union(*map(concepts, drawn)) == {*COLORS, *SHAPES, *STYLES}
    assert {(scene.size, scene.position) for scene in drawn} == set(product(RADII_PX, ANCHORS_PX))
    assert [scene for scene in drawn if scene.color == scene.background] == []


def test_draw_scene_is_a_function_of_its_rng():
    drawn = [[draw_scene(rng, new=True) for _ in range(20)] for rng in map(np.random.default_rng, (5, 5, 6))]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("scene", "omit", "text"),
    [
        (EXAMPLE, (), "a large orange star at the top left on a white background"),
        (EXAMPLE, ("size",), "an orange star at the top left on a white background"),
        (EXAMPLE, ("position",), "a large orange star on a white background"),
        (EXAMPLE, ("background",), "a large orange star at the top left"),
        (
            Scene("red", "heart", "small", "in the center", "orange", "outlined"),
            (),
            "a small outlined red heart in the center on an orange background",
        ),
        (
            Scene("cyan", "cross", "small", "at the bottom right", "gray", "outlined"),
            ("size",),
            "an outlined cyan cross at the bottom right on a gray background",
        ),
    ],
)
def test_caption(scene, omit, text):
    assert caption(scene, omit) == text


def test_drawn_captions_are_whole_in_two_of_three_cases():
    rng = np.random.default_rng(0)
    drawn = [draw_caption(EXAMPLE, rng) for _ in range(900)]
    whole = caption(EXAMPLE)
    assert set(drawn) == {whole, *(caption(EXAMPLE, (part,)) for part in ("size", "position", "background"))}
    assert 550 < drawn.count(whole) < 650  # 600 expected, 3.5 standard deviations
