"""A small world of captioned scenes whose content can be checked by arithmetic.

A scene is one flat shape on a flat background. `render` draws it with anti-aliasing where a
`Placement` says, `caption` puts it into words, and `measure` reads colour, shape, size, position and
style back from any image by fitting templates, so that *prompt accuracy* needs no other model.

The world has two parts. The base model's UNet was trained on `KNOWN` only; the default job
fine-tunes it on scenes that also show `NEW` concepts. `draw_example` draws from it in two ways: `shapes`
have one of the named sizes and places, `free_shapes` any, of which their captions say nothing:
their `outline` or `coverage` tells.
"""

import io
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SIZE_PX = 64
"""Width and height of a rendered scene."""

_SUPERSAMPLING = 4
_OUTLINE_RGB = (20, 20, 20)
_OUTLINE_WIDTH_PX = 2.5  # drawn inward from the shape's edge
_ANCHOR_JITTER_PX = 1.5
_RADIUS_JITTER = 0.05
_FREE_RADII_PX = (9.5, 16.8)  # from the smallest to the largest that a jittered size has
_EXTENT = 1.2  # no shape reaches further from its centre, left or right, up or down, in radii
_EDGE_WIDTH_PX = 1.5
_MIN_AREA_PX = 40
_CONTRAST = 55.0  # RGB distance from the background that counts as an object

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "green": (40, 150, 60),
    "blue": (40, 75, 205),
    "yellow": (242, 212, 55),
    "white": (245, 245, 245),
    "gray": (125, 125, 125),
    "orange": (240, 130, 25),
    "purple": (140, 50, 170),
    "cyan": (60, 205, 220),
}
RADII_PX = {"small": 10.0, "large": 16.0}
ANCHORS_PX: dict[str, tuple[float, float]] = {
    "in the center": (32.0, 32.0),
    "at the top left": (20.0, 20.0),
    "at the top right": (44.0, 20.0),
    "at the bottom left": (20.0, 44.0),
    "at the bottom right": (44.0, 44.0),
}


def _regular(num_points: int, turn: float, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    angles = turn + 2 * math.pi * np.arange(num_points) / num_points
    r = np.array([radii[i % len(radii)] for i in range(num_points)])
    return np.stack([r * np.cos(angles), r * np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    points = np.stack([x, y], axis=1) / 16.5
    return points - (points.max(axis=0) + points.min(axis=0)) / 2


def _cross(arm: float = 0.34) -> np.ndarray:
    a = arm
    return np.array(
        [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    )


SHAPES: dict[str, np.ndarray] = {
    "circle": _regular(64, 0.0),
    "square": _regular(4, math.pi / 4) * 1.2,
    "triangle": _regular(3, -math.pi / 2) * 1.15 + np.array([0.0, 0.2]),
    "diamond": _regular(4, 0.0) * np.array([0.8, 1.1]),
    "star": _regular(10, -math.pi / 2, (1.15, 0.48)),
    "heart": _heart(),
    "cross": _cross(),
}
"""Polygons [num_points, 2] in units of the shape's radius, y downward, centred on the anchor."""

STYLES = ("plain", "outlined")

KNOWN = {
    "color": ("red", "green", "blue", "yellow", "white", "gray"),
    "shape": ("circle", "square", "triangle", "diamond"),
    "style": ("plain",),
}
NEW = {
    "color": ("orange", "purple", "cyan"),
    "shape": ("star", "heart", "cross"),
    "style": ("outlined",),
}


@dataclass(frozen=True)
class Scene:
    """What an image shows; every field is a word of the caption."""

    color: str
    shape: str
    size: str
    position: str
    background: str
    style: str = "plain"

    @property
    def new_concepts(self) -> tuple[str, ...]:
        """Names of the concepts in this scene that the base's UNet has never seen."""
        values = asdict(self)
        new = [values[kind] for kind in NEW if values[kind] in NEW[kind]]
        return tuple(new + ([self.background] if self.background in NEW["color"] else []))


@dataclass(frozen=True)
class Placement:
    """Where a scene's shape is, and how large."""

    center: tuple[float, float]
    """x and y, px from the top left corner."""
    radius: float
    """px; the unit of `SHAPES`."""


def draw_example(
    world: Literal["shapes", "free_shapes"], new_fraction: float, rng: np.random.Generator
) -> tuple[Scene, Placement, str]:
    """A scene of the world, its placement and its caption; it shows a new concept with probability `new_fraction`."""
    scene = draw_scene(rng, new=bool(rng.random() < new_fraction))
    if world == "shapes":
        placement = place(scene, rng)
        return scene, placement, draw_caption(scene, rng)
    placement = place_freely(rng)
    scene = replace(scene, size=_nearest_size(placement.radius), position=_nearest_position(placement.center))
    return scene, placement, caption(scene, omit=("size", "position"))


def draw_scene(rng: np.random.Generator, new: bool, known_background: bool = False) -> Scene:
    """A random scene: of known concepts only, or (`new`) with at least one new concept.

    `known_background` keeps new colours off the background, so that a prompt tests one thing.
    """
    while True:
        pick = {
            kind: str(rng.choice(NEW[kind] if new and rng.random() < rate else KNOWN[kind]))
            for kind, rate in (("color", 0.5), ("shape", 0.5), ("style", 0.3))
        }
        backgrounds = NEW["color"] if new and not known_background and rng.random() < 0.15 else KNOWN["color"]
        scene = Scene(
            size=str(rng.choice(list(RADII_PX))),
            position=str(rng.choice(list(ANCHORS_PX))),
            background=str(rng.choice([c for c in backgrounds if c != pick["color"]])),
            **pick,
        )
        if bool(scene.new_concepts) == new:
            return scene


def caption(scene: Scene, omit: tuple[str, ...] = ()) -> str:
    """The scene in words, e.g. `a large orange star at the top left on a white background`.

    `omit` names fields to leave unsaid: size, position or background.
    """
    words = [] if "size" in omit else [scene.size]
    words += ([] if scene.style == "plain" else [scene.style]) + [scene.color, scene.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    text = " ".join([article, *words])
    if "position" not in omit:
        text += f" {scene.position}"
    if "background" not in omit:
        text += f" on {'an' if scene.background[0] in 'aeiou' else 'a'} {scene.background} background"
    return text


def draw_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption like those that people write: two of three are complete, the others leave out a part."""
    if rng.random() < 2 / 3:
        return caption(scene)
    return caption(scene, omit=(str(rng.choice(["size", "position", "background"])),))


def place(scene: Scene, rng: np.random.Generator) -> Placement:
    """The place and size that the scene names, with a jitter."""
    center = np.array(ANCHORS_PX[scene.position]) + rng.uniform(-_ANCHOR_JITTER_PX, _ANCHOR_JITTER_PX, 2)
    radius = RADII_PX[scene.size] * (1 + rng.uniform(-_RADIUS_JITTER, _RADIUS_JITTER))
    return Placement(tuple(center.tolist()), float(radius))


def place_freely(rng: np.random.Generator) -> Placement:
    """Any size and any place at which the whole shape is in the image, uniformly."""
    radius = rng.uniform(*_FREE_RADII_PX)
    center = rng.uniform(_EXTENT * radius, SIZE_PX - _EXTENT * radius, 2)
    return Placement(tuple(center.tolist()), float(radius))


def render(scene: Scene, placement: Placement) -> Image.Image:
    """Draw the scene, RGB [64, 64]."""
    center, radius = np.array(placement.center), placement.radius
    canvas = (SIZE_PX * _SUPERSAMPLING,) * 2
    image = Image.new("RGB", canvas, COLORS[scene.background])
    fill = Image.new("RGB", canvas, _OUTLINE_RGB if scene.style == "outlined" else COLORS[scene.color])
    image.paste(fill, mask=_mask(scene.shape, center, radius))
    if scene.style == "outlined":
        image.paste(COLORS[scene.color], mask=_mask(scene.shape, center, radius, inset_px=_OUTLINE_WIDTH_PX))
    return image.reduce(_SUPERSAMPLING)


def outline(scene: Scene, placement: Placement) -> Image.Image:
    """The shape's edge, 1.5 px wide inward, white on black, anti-aliased: L [64, 64]."""
    center, radius = np.array(placement.center), placement.radius
    inner = _mask(scene.shape, center, radius, inset_px=_EDGE_WIDTH_PX)
    return ImageChops.subtract(_mask(scene.shape, center, radius), inner).reduce(_SUPERSAMPLING)


def coverage(scene: Scene, placement: Placement) -> np.ndarray:
    """The share of each pixel that the shape covers, float32 [64, 64] in 0..1."""
    return _coverage(scene.shape, np.array(placement.center), placement.radius)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Soft intersection over union of two masks in 0..1: the sum of their minima over the sum of their maxima.

    0 where both are empty: an image that shows nothing agrees with no mask.
    """
    union = np.maximum(a, b).sum()
    return float(np.minimum(a, b).sum() / union) if union else 0.0


def object_mask(image: Image.Image) -> np.ndarray | None:
    """How much of each pixel is the object's, float32 [64, 64] in 0..1, as `measure` sees it; None where it sees none.

    An image of another size is scaled first.
    """
    found = _find_object(image)
    return None if found is None else found[2].astype(np.float32)


def measure(image: Image.Image) -> Scene | None:
    """Read a scene back from an image by arithmetic; None where it shows no object.

    The border's median gives the background, what differs from it the object's mask. Each shape's
    polygon is scaled to the mask's area and moved to its centroid; the best intersection over
    union names the shape. Colours are the nearest of `COLORS` in RGB.
    """
    found = _find_object(image)
    if found is None:
        return None
    pixels, background, mask = found
    area = mask.sum()
    ys, xs = np.mgrid[:SIZE_PX, :SIZE_PX] + 0.5
    centroid = np.array([(mask * xs).sum(), (mask * ys).sum()]) / area

    best = (-1.0, "", centroid, 0.0)
    for shape, polygon in SHAPES.items():
        unit_area, unit_centroid = _area_and_centroid(polygon)
        radius = math.sqrt(area / unit_area)
        center = centroid - radius * unit_centroid
        template = _coverage(shape, center, radius)
        best = max(best, (iou(mask, template), shape, center, radius), key=lambda fit: fit[0])
    _, shape, center, radius = best

    core = _coverage(shape, center, radius, inset_px=_OUTLINE_WIDTH_PX + 1)
    inside = np.median(pixels[core >= min(0.9, core.max())], axis=0)
    rim = (_coverage(shape, center, radius, inset_px=0.5) > 0.9) & (_coverage(shape, center, radius, inset_px=2) < 0.1)
    ink = np.linalg.norm(pixels[rim] - np.array(_OUTLINE_RGB), axis=1)
    outlined = rim.any() and np.mean(ink < np.linalg.norm(pixels[rim] - inside, axis=1)) > 0.5
    return Scene(
        color=_nearest_color(inside),
        shape=shape,
        size=_nearest_size(radius),
        position=_nearest_position(center),
        background=_nearest_color(background),
        style="outlined" if outlined else "plain",
    )


def _find_object(image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The image's pixels [64, 64, 3], its background's colour [3], and the object's soft mask [64, 64]."""
    if image.size != (SIZE_PX, SIZE_PX):
        image = image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    background = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - background, axis=2)
    if (distance > _CONTRAST).sum() < _MIN_AREA_PX:
        return None
    ink_contrast = np.linalg.norm(background - _OUTLINE_RGB)  # an outline must not weigh less than the fill
    contrast = min(np.median(distance[distance > _CONTRAST]), ink_contrast)
    mask = np.clip(distance / contrast, 0, 1)
    mask[mask < 0.35] = 0
    return pixels, background, mask


def _mask(shape: str, center: np.ndarray, radius: float, inset_px: float = 0.0) -> Image.Image:
    """The shape's supersampled mask, shrunk by `inset_px` on every side."""
    mask = Image.new("L", (SIZE_PX * _SUPERSAMPLING,) * 2)
    points = [tuple(p) for p in (SHAPES[shape] * radius + center) * _SUPERSAMPLING - 0.5]
    draw = ImageDraw.Draw(mask)
    draw.polygon(points, fill=255)
    if inset_px:
        draw.line([*points, points[0], points[1]], fill=0, width=round(2 * inset_px * _SUPERSAMPLING), joint="curve")
    return mask


def _coverage(shape: str, center: np.ndarray, radius: float, inset_px: float = 0.0) -> np.ndarray:
    """The share of each pixel that the shape covers, [64, 64] in 0..1."""
    return np.asarray(_mask(shape, center, radius, inset_px).reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def _area_and_centroid(polygon: np.ndarray) -> tuple[float, np.ndarray]:
    x, y = polygon.T
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    cross = x * y2 - x2 * y
    area = cross.sum() / 2
    return abs(area), np.array([((x + x2) * cross).sum(), ((y + y2) * cross).sum()]) / (6 * area)


def _nearest_color(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.linalg.norm(np.array(COLORS[name]) - rgb)))


def _nearest_size(radius: float) -> str:
    return min(RADII_PX, key=lambda name: abs(RADII_PX[name] - radius))


def _nearest_position(center: np.ndarray | tuple[float, float]) -> str:
    return min(ANCHORS_PX, key=lambda name: math.dist(ANCHORS_PX[name], center))


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
