"""Checks of what only `method.name: ic_light` and the lit worlds, which are for it, need."""

from sdtrain.ground.light import MAP_PX
from sdtrain.ground.manifests import LIT_WORLDS
from sdtrain.params.view import Rule, View, has_effect


def _not_ic_light(p: View) -> tuple[str, str] | None:
    if p.method.name != "ic_light":
        return f"method.name = {p.method.name!r}", "method.name to ic_light"


def _light_settings_fit(p: View) -> str | None:
    """Those of maps with maps, and those of the consistency loss with a weight."""
    if p.method.name != "ic_light":
        return None
    light, weight = p.method.light, p.method.consistency_weight
    phi, latents = p.method.phi, p.method.consistency_latents
    for field in ("light_size", "num_light_tokens"):
        value = getattr(p.method, field)
        if light == "map" and value is None:
            return f"method.{field} = None: method.light = 'map' needs it"
        if light == "words" and value is not None:
            return f"method.{field} = {value}: has no effect with method.light = 'words'; set it to null"
    if weight and light == "words":
        return (
            f"method.consistency_weight = {weight}: splits the light map at random, and method.light = 'words' has "
            "none; set it to 0, or method.light to map"
        )
    if weight and p.method.variant == "fbc":
        return (
            f"method.consistency_weight = {weight}: asks for parts of the light, and with method.variant = 'fbc' the "
            "background shows all of it; set it to 0, or method.variant to fc"
        )
    for field, value in (("phi", phi), ("consistency_latents", latents)):
        if weight and value is None:
            return f"method.{field} = None: method.consistency_weight = {weight} needs it"
        if not weight and value is not None:
            return f"method.{field} = {value!r}: has no effect with method.consistency_weight = 0; set it to null"
    if latents == "own" and phi != "mlp":
        return (
            f"method.phi = {phi!r}: with method.consistency_latents = 'own' the three predictions have the same "
            "target, so there is no closed form and nothing to add; use mlp, or shared"
        )


def _lit_world_fits(p: View) -> str | None:
    """The lit worlds are for relighting, and relighting of generated scenes is for them."""
    if p.dataset.source != "generated":
        return None
    world, is_lit = p.dataset.world, p.dataset.world in LIT_WORLDS
    if is_lit != (p.method.name == "ic_light"):
        return (
            f"dataset.world = {world!r}: method.name = 'ic_light' needs 'lit' or 'lit_by_map', and only that method "
            "does"
        )
    if is_lit and (p.method.light == "map") != (world == "lit_by_map"):
        return (
            f"dataset.world = {world!r}: with method.light = {p.method.light!r} the light is told by "
            f"{'maps' if p.method.light == 'map' else 'captions'}; use "
            f"{'lit_by_map' if p.method.light == 'map' else 'lit'}"
        )


def _relights_generated(p: View) -> bool:
    return p.method.name == "ic_light" and p.dataset.source == "generated"


def _lit_scenes_are_known(p: View) -> str | None:
    if _relights_generated(p) and p.dataset.new_fraction:
        return f"dataset.new_fraction = {p.dataset.new_fraction}: lit scenes show known concepts only; set it to 0.0"


def _lit_grid_has_one_each(p: View) -> str | None:
    if _relights_generated(p) and p.sample.images_per_prompt != 1:
        return (
            f"sample.images_per_prompt = {p.sample.images_per_prompt}: the grid of lit scenes has one image under each "
            "light; set it to 1"
        )


def _light_size_can_be(p: View) -> str | None:
    """The size that maps have in the cache, which the gate decides."""
    size = p.method.light_size if p.method.name == "ic_light" and p.method.light == "map" else None
    if size is None:
        return None
    if _relights_generated(p) and size != [1, 5]:
        return f"method.light_size = {size}: the maps of dataset.world = 'lit_by_map' are [1, 5]"
    if min(size) >= MAP_PX and size != [MAP_PX, MAP_PX]:
        return f"method.light_size = {size}: larger maps are reduced to [{MAP_PX}, {MAP_PX}]; set it to that"


def _words_of_light_survive_the_flip(p: View) -> str | None:
    if p.method.name == "ic_light" and p.method.light == "words" and p.precompute.random_flip:
        return (
            "precompute.random_flip = True: with method.light = 'words' captions tell the side of the light, which is "
            "wrong for a flipped image; use false, or light maps, which are mirrored, and captions without the light"
        )


RELIGHTING_RULES: tuple[Rule, ...] = (
    has_effect("base.unet_offset", _not_ic_light), _light_settings_fit, _light_size_can_be,
    _lit_world_fits, _lit_scenes_are_known, _lit_grid_has_one_each, _words_of_light_survive_the_flip,
)  # fmt: skip
