"""The latent cache: every image encoded by the frozen VAE, every caption by the tokenizer.

It stores the VAE's posterior (mean and log-variance), not one sample of it, and with `random_flip` also
that of the flipped image, because flipping a latent doesn't give it. Conditions are cached as methods need them, and
as `data/conditions.py` says: images as pixels of the same crop or as the mode of their own posterior, a mask at the
latents' size, a light map as it is.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sdtrain.data.conditions import CONDITIONS, area_mean, on_grey
from sdtrain.data.degradations import degraded
from sdtrain.data.edges import canny_edges
from sdtrain.data.images import decode_rgb, draw_crop, square_pixels
from sdtrain.data.shards import NUM_PROBES, PROBE, read_dataset
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import new_folder, sha256_file, sha256_json, write_json
from sdtrain.ground.headers import add_metadata
from sdtrain.ground.manifests import (
    CachedCondition,
    DatasetManifest,
    LatentsManifest,
    Shard,
    encoders_fingerprint,
)
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.models.parts import load_tokenizer, load_vae, pick_device, tokenize, vae_factor
from sdtrain.params.schema import PrecomputeParams

_SHARD_ROWS, _SHARD_BYTES = 2048, 512 * 2**20
"""The most rows of a shard, and bytes of their conditions, as it is put together in memory."""
_DTYPES = {"pixels": np.uint8, "latents": np.float16, "mask": np.float16, "light": np.float32}
"""By a condition's kind."""


def precompute_latents(
    params: PrecomputeParams,
    seed: int,
    base: Path,
    dataset: Path,
    out: Path,
    metrics: Path,
    processes: Processes = ALONE,
) -> None:
    """Encode `dataset` with the VAE and tokenizer of `base` into `out`; counts and statistics to `metrics`.

    Args:
        processes: who share the encoding; the main one writes.

    Raises:
        InputError: the resolution isn't a multiple of the VAE's factor, no foreground has the alpha that masks are to
            be made of, or an encoding isn't finite.
    """
    manifest = DatasetManifest.read(dataset)
    fingerprint = encoders_fingerprint(base)
    vae, tokenizer, device = load_vae(base), load_tokenizer(base), pick_device()
    factor = vae_factor(vae.config.block_out_channels)
    if params.resolution % factor:
        below, above = params.resolution // factor * factor, -(-params.resolution // factor) * factor
        raise InputError(
            f"precompute.resolution = {params.resolution}: must be a multiple of {factor}, the factor by "
            f"which the base's VAE downsamples; use {below or above} or {above}"
        )
    vae.to(device)
    max_token_id = 0
    latent_shape = (vae.config.latent_channels, params.resolution // factor, params.resolution // factor)
    conditions = _cached_conditions(params, manifest, latent_shape)
    counts = {"num_truncated_captions": 0, "num_upscaled": 0, **{f"num_blank_{name}s": 0 for name in conditions}}
    counts |= {"num_uncut_foregrounds": 0} if "foreground" in conditions else {}
    statistics = _Statistics(vae.config.scaling_factor)
    splits: dict[str, list[Shard]] = {}
    num_rows = _num_shard_rows(params, conditions)
    with new_folder(out) if processes.is_main else nullcontext() as folder:
        for split in manifest.splits:
            rows, splits[split] = _own_files(read_dataset(dataset, split), params.batch_size, num_rows, processes), []
            progress = tqdm(
                total=manifest.splits[split].num_rows, desc=f"precompute {split}", unit="image", disable=None
            )
            while shard := list(islice(rows, num_rows)):
                tensors, num_blank = _encode_shard(
                    params, seed, shard, manifest, conditions, vae, device, progress, processes
                )
                if not processes.is_main:
                    continue
                for name in conditions:
                    counts[f"num_blank_{name}s"] += num_blank[name]
                if "foreground" in conditions:
                    counts["num_uncut_foregrounds"] += num_blank["uncut"]
                captions = [row["caption"] for row in shard]
                tensors["input_ids"] = tokenize(tokenizer, captions)
                max_token_id = max(max_token_id, tensors["input_ids"].max().item())
                statistics.add(tensors)
                lengths = tokenizer(captions, truncation=False, verbose=False).input_ids
                counts["num_truncated_captions"] += sum(len(ids) > tokenizer.model_max_length for ids in lengths)
                counts["num_upscaled"] += sum(min(row["width"], row["height"]) < params.resolution for row in shard)
                name = f"{split}-{len(splits[split]):05}.safetensors"
                lists = {"ids": [row["id"] for row in shard]}
                if split != "train":
                    lists["captions"] = captions
                save_file(tensors, folder / name)
                add_metadata(folder / name, {key: json.dumps(values) for key, values in lists.items()})
                splits[split].append(Shard(file=name, num_rows=len(shard), sha256=sha256_file(folder / name)))
                if split == "validation" and len(splits[split]) == 1:
                    pixels = _pixels(params, seed, shard[:NUM_PROBES])
                    save_file({"pixels": torch.from_numpy(pixels).contiguous()}, folder / PROBE)
            progress.close()
        if not processes.is_main:
            return
        inputs = {"encoders": fingerprint, "dataset": manifest.fingerprint, "seed": seed}
        settings = params.model_dump(exclude={"batch_size"})
        LatentsManifest(
            encoders_fingerprint=fingerprint,
            fingerprint=sha256_json([LatentsManifest.VERSION, inputs, settings]),
            params=settings,
            seed=seed,
            max_token_id=max_token_id,
            shape=tuple(statistics.shape),
            conditions=conditions,
            splits=splits,
        ).write(folder)
        report = {**counts, "latents_mean": statistics.mean, "latents_std": statistics.std}
        write_json(metrics, report)
    if num_uncut := counts.get("num_uncut_foregrounds"):
        print(f"WARNING: {num_uncut} foregrounds show no grey, nothing was cut out; give masks, or images with alpha")
    print(
        f"latents {statistics.shape}, scaled std {statistics.std:.3f}; "
        f"{counts['num_truncated_captions']} captions truncated to {tokenizer.model_max_length} tokens, "
        f"{counts['num_upscaled']} images upscaled to {params.resolution} px"
    )


def _cached_conditions(
    params: PrecomputeParams, dataset: DatasetManifest, latent_shape: tuple[int, int, int]
) -> dict[str, CachedCondition]:
    """What is cached of each condition: those of the data set, and those computed of the others and the image."""
    given, derived, side = dataset.conditions, params.derived_conditions, params.resolution
    if "mask" in derived and given["foreground"].channels != 4:
        raise InputError(
            f"precompute.derived_conditions.mask = {derived['mask']!r}: no foreground of the data set is transparent "
            "anywhere; give files with an alpha channel, or masks in dataset.condition_columns"
        )
    cached = {}
    for name in sorted({*given, *derived}):
        kind = CONDITIONS[name].kind
        if kind == "pixels":
            shape = (given[name].channels if name in given else 1, side, side)
        elif kind == "light":
            shape = given[name].shape
        else:
            shape = (1 if kind == "mask" else latent_shape[0], *latent_shape[1:])
        cached[name] = CachedCondition(kind=kind, shape=shape)
    return cached


def _row_conditions(
    params: PrecomputeParams, seed: int, row: dict, image: np.ndarray, dataset: DatasetManifest
) -> dict[str, np.ndarray]:
    """A row's conditions, cropped as its image is, R = resolution.

    Pixels and mask are uint8 [channels, R, R], a light float32 [H, W, 3], and what is cached as latents is as the VAE
    gets it, float32 [3, R, R].

    Args:
        image: the row's, cropped, as `_pixels` gives it.
    """
    crop, derived = draw_crop((row["width"], row["height"]), params.resolution, params.center_crop, seed, row["id"]), {}
    given = {
        name: CONDITIONS[name].crop(row[name], crop, condition.channels)
        for name, condition in dataset.conditions.items()
    }
    if "hint" in params.derived_conditions:
        derived["hint"] = canny_edges(image, seed, row["id"])
    if "mask" in params.derived_conditions:
        derived["mask"] = given["foreground"][3:]
    if "foreground" in params.derived_conditions:
        derived["foreground"] = degraded(image, given["mask"][0].astype(np.float32) / 255, seed, row["id"])
    found = given | derived
    for name, values in found.items():
        if name == "foreground":
            found[name] = on_grey(values, found.get("mask"))
        elif CONDITIONS[name].kind == "latents":
            found[name] = values.astype(np.float32) / (127 if name == "background" else 127.5) - 1
    return found


def _num_shard_rows(params: PrecomputeParams, conditions: dict[str, CachedCondition]) -> int:
    row_bytes = 0
    for condition in conditions.values():
        num_views = 2 if condition.kind == "latents" and params.random_flip else 1
        row_bytes += num_views * math.prod(condition.shape) * np.dtype(_DTYPES[condition.kind]).itemsize
    return max(1, min(_SHARD_ROWS, _SHARD_BYTES // max(1, row_bytes)))


def _own_files(rows: Iterator[dict], batch_size: int, num_shard_rows: int, processes: Processes) -> Iterator[dict]:
    """The rows, with images of this process's batches only, and of the main one's probe: each holds a whole shard."""
    for place, row in enumerate(rows):
        is_own = place % num_shard_rows // batch_size % processes.num == processes.index
        if not (is_own or (processes.is_main and place < NUM_PROBES)):
            row = {name: row[name] for name in ("id", "caption", "width", "height")}
        yield row


def _encode_shard(
    params: PrecomputeParams,
    seed: int,
    rows: list[dict],
    dataset: DatasetManifest,
    conditions: dict[str, CachedCondition],
    vae,
    device,
    progress: tqdm,
    processes: Processes,
) -> tuple[dict[str, Tensor], Counter[str]]:
    """The rows' columns but for the captions'; and how many of each condition are blank, and of foregrounds `uncut`,
    which have no grey at all. Only the main process puts them together, others get nothing. A round of batches at a
    time."""
    encode = partial(_encode_batch, params, seed, dataset, conditions, vae, device)
    columns: dict[str, Tensor] = {}
    num_done, num_blank = 0, Counter()
    batches = [rows[first : first + params.batch_size] for first in range(0, len(rows), params.batch_size)]
    for batch, (encoded, blank) in zip(batches, processes.map(encode, batches), strict=True):
        if not processes.is_main:
            continue
        for name, values in encoded.items():
            if name not in columns:
                columns[name] = torch.empty((len(rows), *values.shape[1:]), dtype=values.dtype)
            columns[name][num_done : num_done + len(batch)] = values
        num_done, num_blank = num_done + len(batch), num_blank + blank
        progress.update(len(batch))
    return columns, num_blank


def _encode_batch(
    params: PrecomputeParams,
    seed: int,
    dataset: DatasetManifest,
    conditions: dict[str, CachedCondition],
    vae,
    device,
    batch: list[dict],
) -> tuple[dict[str, Tensor], Counter[str]]:
    """As `_encode_shard`, of a batch."""
    columns, num_blank = {}, Counter()
    images = _pixels(params, seed, batch)
    for suffix, posterior in _posteriors(params, vae, device, images):
        for name, values in (("mean", posterior.mean), ("logvar", posterior.logvar)):
            columns[name + suffix] = _stored(values, name, batch)
    found = [_row_conditions(params, seed, row, image, dataset) for row, image in zip(batch, images, strict=True)]
    for name, condition in conditions.items():
        values = np.stack([row[name] for row in found])
        blank = values == CONDITIONS[name].blank
        num_blank[name] += int(blank.reshape(len(batch), -1).all(axis=1).sum())
        if name == "foreground":
            num_blank["uncut"] += int((~blank.reshape(len(batch), -1).any(axis=1)).sum())
        if condition.kind == "latents":
            for suffix, posterior in _posteriors(params, vae, device, values):
                columns[name + suffix] = _stored(posterior.mode(), f"mean of the {name}", batch)
            continue
        if condition.kind == "mask":
            values = np.stack([area_mean(mask, params.resolution // condition.shape[-1]) for mask in values])
        columns[name] = torch.from_numpy(values.astype(_DTYPES[condition.kind]))
    return columns, num_blank


def _posteriors(params: PrecomputeParams, vae, device, pixels: np.ndarray) -> Iterator[tuple[str, object]]:
    """The VAE's posterior of pixels [B, 3, R, R], and of the flipped ones where they are cached, by names' suffix."""
    view = torch.from_numpy(pixels).to(device)
    for suffix in ("", "_flipped")[: 1 + params.random_flip]:
        with torch.inference_mode():
            yield suffix, vae.encode(view.flip(-1) if suffix else view).latent_dist


def _stored(values: Tensor, name: str, rows: list[dict]) -> Tensor:
    """float16, in the machine's memory.

    Raises:
        InputError: not all is finite.
    """
    stored = values.half().cpu()
    finite = stored.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = [row["id"] for row, ok in zip(rows, finite, strict=True) if not ok]
        raise InputError(
            f"the VAE's {name} isn't finite for {', '.join(bad)} (ids in inputs.csv); "
            "remove the images, or use another VAE"
        )
    return stored


def _pixels(params: PrecomputeParams, seed: int, rows: list[dict]) -> np.ndarray:
    """The images as the VAE gets them, float32 [len(rows), 3, resolution, resolution] in -1..1."""
    return np.stack(
        [
            square_pixels(decode_rgb(row["image"]), params.resolution, params.center_crop, seed, row["id"])
            for row in rows
        ]
    )


class _Statistics:
    """Mean and standard deviation of the scaled latents, summed over shards."""

    def __init__(self, scaling_factor: float) -> None:
        self.scaling_factor, self.shape = scaling_factor, []
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, tensors: dict[str, Tensor]) -> None:
        scaled = tensors["mean"].double() * self.scaling_factor
        self.shape = list(scaled.shape[1:])
        self._count += scaled.numel()
        self._sum += scaled.sum().item()
        self._squares += scaled.square().sum().item()

    @property
    def mean(self) -> float:
        return self._sum / self._count

    @property
    def std(self) -> float:
        return (self._squares / self._count - self.mean**2) ** 0.5
