"""The lit world: scenes under known light, before the sRGB curve exactly linear in it, so relighting can be checked.

The object of a `Scene` is a dome cut out by its outline, before a flat wall; both are Lambertian, and nothing casts a
shadow. Light is the strength of five basis lights, an environment map [1, 5, 3] in the order of `LIGHTS`. So a picture
in linear light is M·A·Σ T_k L_k + (1-M)·W·Σ T_k^wall L_k, with M the share of a pixel that the object covers, A and W
the albedos (`COLORS` in linear light), and T the transport: how much of a light a point receives. Pixel centres are at
half integers, x runs to the right, y down, z towards the viewer.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from sdtrain.data.scenes import COLORS, SIZE_PX, Placement, Scene, coverage, draw_scene, place, png_bytes
from sdtrain.data.scenes import caption as scene_caption
from sdtrain.ground import randomness
from sdtrain.ground.light import linear_to_srgb, srgb_to_linear

SIDES: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
"""x and y of the direction towards each light that is at a side."""
LIGHTS: tuple[str, ...] = (*SIDES, "front")
"""The basis lights, in the order of a light map's columns."""
NAMED: dict[str, tuple[str, ...]] = {
    "left": ("left",),
    "right": ("right",),
    "top": ("top",),
    "bottom": ("bottom",),
    "top left": ("top", "left"),
    "top right": ("top", "right"),
    "bottom left": ("bottom", "left"),
    "bottom right": ("bottom", "right"),
}
"""The lights that captions name, and the sides that each joins."""

_SIDE_STRENGTH, _FRONT_STRENGTH = 0.5, 0.1  # of a single named light
_SIDE_ELEVATION = 0.6  # z of a side's light, whose x or y is 1
_DOME = 1.25  # radius of the sphere that an object is a part of, in the object's radii
_STEEPEST = 0.9  # greatest x² + y² of a normal
_WALL_LEAST, _WALL_RANGE, _WALL_FRONT = 0.15, 0.6, 0.8
_SHADOW = 0.4  # the share of light in a stripe of shadow
_STRIPE_PERIODS_PX = (8.0, 20.0)
_GREY = 127  # of a foreground where the object isn't; IC-Light's pixel / 127 - 1 makes it 0


@dataclass(frozen=True)
class LitScene:
    """What a picture shows, and where; the light comes apart."""

    scene: Scene
    placement: Placement


@dataclass(frozen=True)
class Stripes:
    """Parallel stripes of shadow with soft edges, as wide as the gaps between them."""

    angle: float
    """Of their normal, in radians."""
    period_px: float
    phase: float
    """In radians."""

    def shade(self) -> np.ndarray:
        """The share of light that passes, float64 [64, 64] in 0.4..1."""
        x, y = _pixel_centers()
        along = x * math.cos(self.angle) + y * math.sin(self.angle)
        wave = np.sin(2 * math.pi * along / self.period_px + self.phase)
        return _SHADOW + (1 - _SHADOW) * np.clip(0.5 + 1.5 * wave, 0, 1)


@dataclass(frozen=True)
class LitExample:
    """One example of the data set: a scene under a named light, and the same object under another."""

    lit: LitScene
    light_name: str
    foreground_light_name: str
    stripes: Stripes | None
    """The foreground's shadows."""
    part: tuple[str, ...]
    """The basis lights of `light` that `light_1` has: neither none nor all of them."""
    group: str
    """Equal for examples of one scene, which must stay in one split."""

    @property
    def light(self) -> np.ndarray:
        """float32 [1, 5, 3]."""
        return light_map(self.light_name)

    @property
    def light_1(self) -> np.ndarray:
        """A part of `light`, float32 [1, 5, 3]; the other part is exactly light - light_1."""
        return self.light * np.float32([name in self.part for name in LIGHTS])[None, :, None]


def light_map(name: str) -> np.ndarray:
    """The white light of that name, float32 [1, 5, 3]."""
    strengths = np.zeros((1, len(LIGHTS), 3), np.float32)
    for side in NAMED[name]:
        strengths[:, LIGHTS.index(side)] += np.float32(_SIDE_STRENGTH)
        strengths[:, LIGHTS.index("front")] += np.float32(_FRONT_STRENGTH)
    return strengths


def direction(name: str) -> np.ndarray:
    """Where the light comes from in the picture's plane: a unit vector, float64 [2]."""
    total = np.sum([SIDES[side] for side in NAMED[name]], axis=0, dtype=np.float64)
    return total / np.linalg.norm(total)


def transport(lit: LitScene) -> np.ndarray:
    """How much of each basis light the object's points receive, float64 [5, 64, 64].

    The dome goes on beyond the outline, so `coverage` says where this is the object's.
    """
    centers, (x, y) = _pixel_centers(), lit.placement.center
    rho = (centers - np.array([x, y])[:, None, None]) / (_DOME * lit.placement.radius)
    rho *= np.minimum(1, np.sqrt(_STEEPEST / np.maximum((rho**2).sum(axis=0), 1e-12)))
    normals = np.stack([*rho, np.sqrt(1 - (rho**2).sum(axis=0))])
    sides = np.array([(*side, _SIDE_ELEVATION) for side in SIDES.values()]) / math.hypot(1, _SIDE_ELEVATION)
    towards = np.vstack([sides, (0, 0, 1)])
    return np.maximum(0, np.einsum("kn,nhw->khw", towards, normals))


def wall_transport() -> np.ndarray:
    """How much of each basis light the wall's points receive, float64 [5, 64, 64]: more the nearer to its side."""
    half = SIZE_PX / 2
    across = (_pixel_centers() - half) / half
    nearness = 0.5 + 0.5 * np.einsum("kn,nhw->khw", np.array(list(SIDES.values())), across)
    return np.concatenate([_WALL_LEAST + _WALL_RANGE * nearness, np.full((1, SIZE_PX, SIZE_PX), _WALL_FRONT)])


def albedo(color: str) -> np.ndarray:
    """The share of light that a colour of `COLORS` reflects, float64 [3]."""
    return to_linear(np.array(COLORS[color], np.uint8))


def render_linear(lit: LitScene, light: np.ndarray) -> np.ndarray:
    """The scene in linear light, float64 [64, 64, 3]; `light` is [1, 5, 3]."""
    covered = coverage(lit.scene, lit.placement).astype(np.float64)[:, :, None]
    shown = albedo(lit.scene.color) * _received(transport(lit), light)
    return covered * shown + (1 - covered) * _wall_linear(lit, light)


def render(lit: LitScene, light: np.ndarray) -> Image.Image:
    """The scene as a picture, RGB [64, 64], sRGB at exposure 1: pictures under different lights can be compared."""
    return _picture(render_linear(lit, light))


def wall(lit: LitScene, light: np.ndarray) -> Image.Image:
    """The wall without the object under that light, RGB [64, 64]."""
    return _picture(_wall_linear(lit, light))


def mask(lit: LitScene) -> Image.Image:
    """White where the object is, L [64, 64]."""
    return Image.fromarray(_eight_bit(coverage(lit.scene, lit.placement)))


def cutout(lit: LitScene, light: np.ndarray, stripes: Stripes | None) -> Image.Image:
    """The picture under that light and those shadows, RGBA [64, 64], transparent where the object isn't."""
    shade = 1.0 if stripes is None else stripes.shade()[:, :, None]
    image = _picture(render_linear(lit, light) * shade)
    image.putalpha(mask(lit))
    return image


def foreground(lit: LitScene, light: np.ndarray, stripes: Stripes | None) -> Image.Image:
    """The cutout on grey, RGB [64, 64]: 127 + (x - 127)·M."""
    *pixels, alpha = np.moveaxis(np.asarray(cutout(lit, light, stripes), dtype=np.float64), 2, 0)
    return Image.fromarray(np.round(_GREY + (np.stack(pixels, 2) - _GREY) * alpha[:, :, None] / 255).astype(np.uint8))


def caption(lit: LitScene, light_name: str | None) -> str:
    """The picture in words, e.g. `top left light a large red circle in the center on a blue background`.

    The light's words come first: at a caption's end the frozen text encoder hardly sees them. None leaves them out.
    """
    text = scene_caption(lit.scene)
    return text if light_name is None else f"{light_name} light {text}"


def draw_lit(seed: int, index: int) -> LitExample:
    """The data set's example at `index`: known concepts only, large, two examples with different lights a scene."""
    number, turn = divmod(index, 2)
    rng = randomness.generator(seed, "lit scene", number)
    scene = replace(draw_scene(rng, new=False), size="large")
    lit = LitScene(scene, place(scene, rng))
    light_name = list(NAMED)[rng.permutation(len(NAMED))[turn]]

    rng = randomness.generator(seed, "lit example", index)
    foreground_light_name = str(rng.choice([name for name in NAMED if name != light_name]))
    stripes = draw_stripes(rng) if rng.random() < 0.5 else None
    present = (*NAMED[light_name], "front")
    chosen = int(rng.integers(1, 2 ** len(present) - 1))  # one bit a light, neither none nor all
    part = tuple(name for bit, name in enumerate(present) if chosen >> bit & 1)
    return LitExample(lit, light_name, foreground_light_name, stripes, part, str(number))


def draw_stripes(rng: np.random.Generator) -> Stripes:
    """Stripes of any direction."""
    angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    return Stripes(float(angle), float(rng.uniform(*_STRIPE_PERIODS_PX)), float(phase))


def to_linear(image: np.ndarray | Image.Image) -> np.ndarray:
    """8-bit sRGB to linear light, float64 in 0..1 of the same shape (IEC 61966-2-1)."""
    values = np.asarray(image)
    assert values.dtype == np.uint8, f"expected 8-bit sRGB, got {values.dtype}"
    return srgb_to_linear(values / 255)


def _pixel_centers() -> np.ndarray:
    """x and y, float64 [2, 64, 64], px."""
    return np.mgrid[:SIZE_PX, :SIZE_PX][::-1] + 0.5


def _received(transports: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Σ T_k L_k, float64 [64, 64, 3]."""
    assert light.shape == (1, len(LIGHTS), 3), f"expected a light of [1, {len(LIGHTS)}, 3], got {light.shape}"
    return np.einsum("khw,kc->hwc", transports, light[0].astype(np.float64))


def _wall_linear(lit: LitScene, light: np.ndarray) -> np.ndarray:
    return albedo(lit.scene.background) * _received(wall_transport(), light)


def _picture(linear: np.ndarray) -> Image.Image:
    assert linear.max() <= 1, f"the light is too strong, the picture would clip at 1: {linear.max():.3f}"
    return Image.fromarray(_eight_bit(linear_to_srgb(linear)))


def _eight_bit(values: np.ndarray) -> np.ndarray:
    return np.round(255 * values).astype(np.uint8)


def _npy_bytes(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


COLUMNS: dict[str, Callable[[LitExample], bytes]] = {
    "foreground": lambda e: png_bytes(cutout(e.lit, light_map(e.foreground_light_name), e.stripes)),
    "mask": lambda e: png_bytes(mask(e.lit)),
    "background": lambda e: png_bytes(wall(e.lit, e.light)),
    "light": lambda e: _npy_bytes(e.light),
    "light_1": lambda e: _npy_bytes(e.light_1),
    "relit_1": lambda e: png_bytes(render(e.lit, e.light_1)),
    "relit_2": lambda e: png_bytes(render(e.lit, e.light - e.light_1)),
}
"""The data set's columns besides image and caption: PNG, or a `.npy` file for a light."""
