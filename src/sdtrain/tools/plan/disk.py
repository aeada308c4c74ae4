"""What a run of the full pipeline writes, what DVC stores a second time, and what `dvc push` sends."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from sdtrain.data.conditions import CONDITIONS
from sdtrain.data.shards import NUM_PROBES
from sdtrain.evaluation.pictures import MAX_BYTES
from sdtrain.ground.grid import MIN_CELL_PX
from sdtrain.ground.light import MAP_PX
from sdtrain.ground.manifests import LIT_WORLDS
from sdtrain.methods import METHODS
from sdtrain.models.parts import Configs, vae_factor
from sdtrain.params.schema import EvaluateParams, Params
from sdtrain.tools.plan.base import Base
from sdtrain.tools.plan.images import Images
from sdtrain.tools.plan.made import Made
from sdtrain.tools.plan.sizes import folder_bytes, size
from sdtrain.training.disk import MAX_STATES, disk_needs
from sdtrain.training.memory import Costs

_ID_BYTES = 38
"""Of an image's id in the head of a latent shard: 32 characters, quotes with their backslashes, comma, space."""


@dataclass(frozen=True)
class Item:
    """Something that the pipeline writes."""

    name: str
    num_bytes: int | None
    """At most; None is unknown."""
    origin: str
    is_out: bool = True
    """A cached out: DVC stores a second copy, and pushes it."""
    is_there: bool = False


def disk_items(
    params: Params, base: Base, images: Images, costs: Costs, latent_shape: tuple[int, int, int], made: Made
) -> list[Item]:
    """What a run of the full pipeline writes."""
    num_best, method = params.train.num_best_checkpoints, params.method
    needs = disk_needs(costs, num_best)
    kinds = "raw and EMA" if params.train.use_ema else "raw"
    num_all = sum(base.num_parameters.values())
    model_bytes = METHODS[method.name].exported_bytes(method, params.export, costs.num_parameters, num_all)
    states = f"of this run: up to {MAX_STATES} of {size(costs.state_bytes)}, and {num_best + 2} checkpoints beside them"
    checkpoints = f"{num_best} best and the last, {size(costs.checkpoint_bytes)} each, {kinds} weights"
    dataset_origin = images.bytes_origin if images.num_bytes is not None else "see images"
    return [
        Item("base", base.num_bytes, base.bytes_origin, is_there=made.base),
        Item("dataset", images.num_bytes, dataset_origin, is_there=made.dataset),
        latents_item(params, base, images, latent_shape, made.latents),
        Item("states", needs.states_bytes, states, is_out=False),
        Item("checkpoints", needs.checkpoints_bytes, checkpoints),
        Item("model", model_bytes, f"about, {params.export.dtype}"),
        *_features_items(params.evaluate),
        Item("samples", _samples_bytes(params, base.configs, latent_shape[-1]), "at most"),
        Item("evaluation", MAX_BYTES, "at most"),
        *_hub_items(params, base, images, made),
    ]


def latents_item(params: Params, base: Base, images: Images, latent_shape: tuple[int, int, int], is_made: bool) -> Item:
    """data/latents, in the format of `shards.py`: float16 mean and log-variance, int64 token ids, float32 probe."""
    num_views, num_values = 2 if params.precompute.random_flip else 1, math.prod(latent_shape)
    num_tokens = base.configs.text_encoder["max_position_embeddings"]
    conditions = {name: _condition_bytes(params, name, latent_shape) for name in _conditions(params)}
    row_bytes = num_views * 2 * 2 * num_values + 8 * num_tokens + _ID_BYTES + sum(conditions.values())
    shape = " x ".join(map(str, latent_shape))
    parts = [
        shape,
        *(["plain and flipped"] if num_views == 2 else []),
        *(f"a {name} of {num_bytes / 2**10:.1f} KiB" for name, num_bytes in conditions.items()),
    ]
    row = f"{row_bytes / 2**10:.1f} KiB per image: {', '.join(parts)}"
    if images.num_all is None:
        return Item("latents", None, row)
    probe_bytes = min(NUM_PROBES, images.num_validation) * 3 * 4 * params.precompute.resolution**2
    return Item("latents", images.num_all * row_bytes + probe_bytes, row, is_there=is_made)


def _conditions(params: Params) -> list[str]:
    return sorted({*params.precompute.derived_conditions, *params.dataset.condition_columns})


def _condition_bytes(params: Params, name: str, latent_shape: tuple[int, int, int]) -> int:
    """What an image's condition takes in the cache, at most."""
    kind, size = CONDITIONS[name].kind, latent_shape[-1] ** 2
    if kind == "pixels":  # edges and outlines are grey, others may have colours
        is_grey = name in params.precompute.derived_conditions or params.dataset.source == "generated"
        return (1 if is_grey else 3) * params.precompute.resolution**2
    if kind == "latents":
        return 2 * latent_shape[0] * size * (2 if params.precompute.random_flip else 1)
    if kind == "mask":
        return 2 * size
    return 3 * 4 * math.prod(getattr(params.method, "light_size", None) or (MAP_PX, MAP_PX))


def _features_items(params: EvaluateParams) -> list[Item]:
    """The image encoder that images are compared by; of the hub's the size isn't asked for."""
    if params.features == "local":
        return [Item("features", folder_bytes(Path(params.features_path)), f"at most, all of {params.features_path}")]
    return [Item("features", None, str(params.features_repo))] if params.features == "hub" else []


def _samples_bytes(params: Params, configs: Configs, latent_size: int) -> int:
    """The images' pixels before PNG compression, by themselves and in grids, at the size that the base draws."""
    own = configs.unet.get("sample_size")
    drawn = vae_factor(configs.vae["block_out_channels"]) * (own if isinstance(own, int) else latent_size)
    side = drawn * math.ceil(MIN_CELL_PX / drawn)
    num_rows = params.sample.num_held_out or len(params.sample.prompts)
    num_scales, num_checkpoints = len(params.sample.guidance_scales), len(params.sample.checkpoints)
    num_given, num_drawn = len(_conditions(params)) + 1, params.sample.images_per_prompt * (2 + num_checkpoints)
    if params.dataset.world in LIT_WORLDS:
        num_given, num_drawn = 1 + 4, 1 + 4 * (1 + num_checkpoints)  # foreground, base; the others under four lights
    pixels = num_scales * (num_given + num_drawn) * side**2 + (num_given + num_scales * num_drawn) * drawn**2
    return num_rows * 3 * pixels


def _hub_items(params: Params, base: Base, images: Images, made: Made) -> list[Item]:
    """What the hub's clients keep of their downloads; a data set twice, as files and as Arrow."""
    num_bytes = base.num_hub_bytes
    if params.dataset.source == "hub" and not made.dataset:
        num_bytes += 2 * (images.num_bytes or 0)
    return [Item("hub cache", num_bytes, f"about, downloads in {constants.HF_HOME}", is_out=False)] if num_bytes else []


def disk_lines(items: list[Item], free_bytes: int) -> list[tuple[str, str]]:
    """Each item, DVC's copies of the outs, the sum and the free space, and what `dvc push` sends."""
    outs = [item for item in items if item.is_out]
    copied, total = _sum(outs), _sum(items) + _sum(outs)
    there = sum(2 * item.num_bytes if item.is_out else item.num_bytes for item in items if item.is_there)
    unknown = " and ".join(item.name for item in items if item.num_bytes is None)
    about, besides = ("at least", f" without {unknown}") if unknown else ("about", "")
    already = f", {size(there)} of it there already" if there else ""
    lack = "" if total - there <= free_bytes else ": not enough"
    copies = "a second copy of the outs, with DVC's default cache.type; none with links or reflinks"
    parts = ", ".join(f"{item.name} {size(item.num_bytes)}" for item in outs)
    return [
        *((f"disk {item.name}", f"{size(item.num_bytes)} ({item.origin})") for item in items),
        ("disk DVC cache", f"{size(copied)} ({copies})"),
        ("disk", f"{about} {size(total)} in total{besides}{already}; {size(free_bytes)} free{lack}"),
        ("dvc push", f"{about} {size(copied)}{besides}: {parts}; no saved states; equal files are sent once"),
    ]


def _sum(items: Iterable[Item]) -> int:
    """The sum of the known sizes."""
    return sum(item.num_bytes or 0 for item in items)
