"""The world of scenes: what is drawn can be said, and can be measured again."""

from dataclasses import replace
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
    coverage,
    draw_caption,
    draw_example,
    draw_scene,
    iou,
    measure,
    object_mask,
    outline,
    place,
    place_freely,
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


def test_place_jitters_by_its_rng_alone():
    first, again, other = (
        np.asarray(render(EXAMPLE, place(EXAMPLE, np.random.default_rng(seed)))) for seed in (0, 0, 1)
    )
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_render_paints_the_named_colours():
    scene = Scene("red", "square", "large", "in the center", "blue")
    pixels = np.asarray(render(scene, place(scene, np.random.default_rng(0))))
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


# ---------------------------------------------------------------- free shapes, and where a shape is


def free(num: int) -> list[tuple[Scene, Placement, str]]:
    rng = np.random.default_rng(0)
    return [draw_example("free_shapes", 0.5, rng) for _ in range(num)]


def test_examples_of_the_world_of_shapes_are_a_scene_its_place_and_its_caption():
    rng, again = np.random.default_rng(4), np.random.default_rng(4)
    for _ in range(20):
        scene, placement, text = draw_example("shapes", 0.5, rng)
        assert scene == draw_scene(again, new=bool(again.random() < 0.5))
        assert placement == place(scene, again)
        assert text == draw_caption(scene, again)
        assert np.abs(np.array(placement.center) - ANCHORS_PX[scene.position]).max() <= 1.5
        assert placement.radius == pytest.approx(RADII_PX[scene.size], rel=0.05)


@pytest.mark.parametrize("new", [0.0, 1.0])
def test_new_fraction_of_free_shapes(new):
    rng = np.random.default_rng(0)
    drawn = [draw_example("free_shapes", new, rng)[0] for _ in range(50)]
    assert {bool(scene.new_concepts) for scene in drawn} == {bool(new)}


def test_free_shapes_have_any_size_and_place_inside_the_image():
    rng = np.random.default_rng(0)
    placements = [place_freely(rng) for _ in range(2000)]
    radii = np.array([placement.radius for placement in placements])
    centers = np.array([placement.center for placement in placements])
    assert 9.5 <= radii.min() < 9.6
    assert 16.7 < radii.max() <= 16.8
    room = np.stack([centers - 1.2 * radii[:, None], 64 - centers - 1.2 * radii[:, None]])
    assert 0 <= room.min() < 0.1
    shares = (centers - 1.2 * radii[:, None]) / (64 - 2.4 * radii[:, None])
    assert np.histogram(shares, bins=4, range=(0, 1))[0] == pytest.approx(1000, rel=0.15)
    assert np.histogram(radii, bins=4, range=(9.5, 16.8))[0] == pytest.approx(500, rel=0.2)


@pytest.mark.parametrize("shape", SHAPES)
def test_free_shapes_are_whole_even_in_a_corner(shape):
    scene = Scene("red", shape, "large", "in the center", "blue")
    whole = coverage(scene, Placement((32.0, 32.0), 16.0)).sum()
    for x in (1.2 * 16, 64 - 1.2 * 16):
        for y in (1.2 * 16, 64 - 1.2 * 16):
            assert coverage(scene, Placement((x, y), 16.0)).sum() == pytest.approx(whole, rel=0.03)


def test_captions_of_free_shapes_leave_size_and_place_to_the_hint():
    for scene, placement, text in free(100):
        assert text == caption(scene, omit=("size", "position"))
        assert f"{scene.color} {scene.shape} on " in text
        assert abs(RADII_PX[scene.size] - placement.radius) == min(abs(r - placement.radius) for r in RADII_PX.values())
        away = {name: np.linalg.norm(np.subtract(anchor, placement.center)) for name, anchor in ANCHORS_PX.items()}
        assert away[scene.position] == min(away.values())


def test_measure_reads_free_shapes_wherever_they_are():
    for scene, placement, _ in free(300):
        found = measure(render(scene, placement))
        assert replace(found, size=scene.size, position=scene.position) == scene


def test_coverage_is_the_object_that_an_image_shows():
    agreement = []
    for scene, placement, _ in free(200):
        image = render(scene, placement)
        mask, wanted = object_mask(image), coverage(scene, placement)
        for found in (mask, wanted):
            assert (found.shape, found.dtype) == ((64, 64), np.float32)
            assert found.min() == 0
            assert found.max() == 1
        agreement.append(iou(mask, wanted))  # least for outlines that are nearer to the background than their fill
        elsewhere = coverage(scene, Placement(tuple(64 - c for c in placement.center), placement.radius))
        if np.abs(np.array(placement.center) - 32).max() > 8:
            assert iou(mask, elsewhere) < 0.7
    assert np.mean(agreement) > 0.96
    assert min(agreement) > 0.75
    large = object_mask(render(scene, placement).resize((128, 128), Image.Resampling.BICUBIC))
    assert iou(large, wanted) > 0.9


def test_a_circle_covers_its_area():
    circle = Scene("red", "circle", "large", "in the center", "blue")
    covered = coverage(circle, Placement((30.0, 34.0), 12.0))
    assert covered.sum() == pytest.approx(np.pi * 144, rel=0.02)
    ys, xs = np.mgrid[:64, :64] + 0.5
    assert [(covered * axis).sum() / covered.sum() for axis in (xs, ys)] == pytest.approx([30, 34], abs=0.15)


def test_an_outline_is_the_rim_of_the_shape():
    circle = Scene("red", "circle", "large", "in the center", "blue", "outlined")
    edge = outline(circle, Placement((30.0, 34.0), 12.0))
    assert (edge.mode, edge.size) == ("L", (64, 64))
    share = np.asarray(edge) / 255
    assert share.max() == 1
    assert len(np.unique(share)) > 4  # anti-aliased
    ys, xs = np.mgrid[:64, :64] + 0.5
    distance = np.hypot(xs - 30, ys - 34)
    assert not share[(distance < 9.5) | (distance > 13)].any()
    assert share.sum() == pytest.approx(np.pi * (12**2 - 10.5**2), rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_lies_inside_its_shape_and_around_it(shape):
    scene, placement = Scene("red", shape, "large", "in the center", "blue"), Placement((32.0, 32.0), 16.0)
    share, covered = np.asarray(outline(scene, placement)) / 255, coverage(scene, placement)
    assert (share <= covered + 1e-6).all()
    rows = covered.sum(axis=1) > 4  # each row of the shape has an edge left and right
    assert (share[rows].sum(axis=1) > 2).all()


def test_no_object_has_no_mask():
    assert object_mask(Image.new("RGB", (64, 64), "white")) is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([[1, 1], [0, 0]], [[1, 1], [0, 0]], 1),
        ([[1, 1], [0, 0]], [[0, 0], [1, 1]], 0),
        ([[1, 1], [0, 0]], [[1, 0], [0, 0]], 0.5),
        ([[0.5, 0], [0, 0]], [[1, 0.5], [0, 0]], 1 / 3),
        ([[0, 0], [0, 0]], [[1, 0], [0, 0]], 0),
        ([[0, 0], [0, 0]], [[0, 0], [0, 0]], 0),
    ],
)
def test_iou(a, b, expected):
    assert iou(np.float32(a), np.float32(b)) == pytest.approx(expected)
