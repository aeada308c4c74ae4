"""The latent cache: every image encoded by the frozen VAE, every caption by the tokenizer.

It stores the VAE's posterior (mean and log-variance), not one sample of it, and with `random_flip` also
that of the flipped image, because flipping a latent doesn't give it. Conditions are cached as methods need them: a
hint as the pixels of the same crop.
"""

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sdtrain.data.conditions import CONDITIONS
from sdtrain.data.edges import canny_edges
from sdtrain.data.images import decode_rgb, draw_crop, square_pixels
from sdtrain.data.shards import NUM_PROBES, PROBE, SPLITS, read_dataset
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import new_folder, sha256_file, sha256_json, write_json
from sdtrain.ground.manifests import (
    CachedCondition,
    DatasetManifest,
    LatentsManifest,
    Shard,
    encoders_fingerprint,
)
from sdtrain.models.parts import load_tokenizer, load_vae, pick_device, tokenize, vae_factor
from sdtrain.params.schema import PrecomputeParams

_SHARD_ROWS, _SHARD_BYTES = 2048, 512 * 2**20
"""The most rows of a shard, and bytes of their conditions, as it is put together in memory."""


def precompute_latents(
    params: PrecomputeParams, seed: int, base: Path, dataset: Path, out: Path, metrics: Path
) -> None:
    """Encode `dataset` with the VAE and tokenizer of `base` into `out`; counts and statistics to `metrics`.

    Raises:
        InputError: the resolution isn't a multiple of the VAE's factor, or an encoding isn't finite.
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
    conditions = _cached_conditions(params, manifest)
    counts = {"num_truncated_captions": 0, "num_upscaled": 0, **{f"num_blank_{name}s": 0 for name in conditions}}
    statistics = _Statistics(vae.config.scaling_factor)
    splits: dict[str, list[Shard]] = {}
    with new_folder(out) as folder:
        for split in SPLITS:
            rows, splits[split] = read_dataset(dataset, split), []
            progress = tqdm(
                total=manifest.splits[split].num_rows, desc=f"precompute {split}", unit="image", disable=None
            )
            while shard := list(islice(rows, _num_shard_rows(conditions))):
                tensors = _encode_shard(params, seed, shard, conditions, vae, device, progress)
                for name in conditions:
                    counts[f"num_blank_{name}s"] += int((tensors[name].flatten(1).amax(1) == 0).sum())
                captions = [row["caption"] for row in shard]
                tensors["input_ids"] = tokenize(tokenizer, captions)
                max_token_id = max(max_token_id, tensors["input_ids"].max().item())
                statistics.add(tensors)
                lengths = tokenizer(captions, truncation=False, verbose=False).input_ids
                counts["num_truncated_captions"] += sum(len(ids) > tokenizer.model_max_length for ids in lengths)
                counts["num_upscaled"] += sum(min(row["width"], row["height"]) < params.resolution for row in shard)
                name = f"{split}-{len(splits[split]):05}.safetensors"
                lists = {"ids": [row["id"] for row in shard]}
                if split == "validation":
                    lists["captions"] = captions
                save_file(tensors, folder / name, metadata={key: json.dumps(values) for key, values in lists.items()})
                splits[split].append(Shard(file=name, num_rows=len(shard), sha256=sha256_file(folder / name)))
                if split == "validation" and len(splits[split]) == 1:
                    pixels = _pixels(params, seed, shard[:NUM_PROBES])
                    save_file({"pixels": torch.from_numpy(pixels).contiguous()}, folder / PROBE)
            progress.close()
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
    print(
        f"latents {statistics.shape}, scaled std {statistics.std:.3f}; "
        f"{counts['num_truncated_captions']} captions truncated to {tokenizer.model_max_length} tokens, "
        f"{counts['num_upscaled']} images upscaled to {params.resolution} px"
    )


def _cached_conditions(params: PrecomputeParams, dataset: DatasetManifest) -> dict[str, CachedCondition]:
    """What is cached of each condition: those of the data set, and those computed from the image."""
    channels = {name: condition.channels for name, condition in dataset.conditions.items()}
    channels |= dict.fromkeys(params.derived_conditions, 1)
    shape = (params.resolution, params.resolution)
    return {name: CachedCondition(kind="pixels", shape=(number, *shape)) for name, number in sorted(channels.items())}


def _condition_pixels(
    params: PrecomputeParams, seed: int, row: dict, image: np.ndarray, name: str, channels: int
) -> np.ndarray:
    """A row's condition, uint8 [channels, resolution, resolution], cropped as its image is.

    Args:
        image: the row's, cropped, as `_pixels` gives it.
    """
    if name in params.derived_conditions:
        return canny_edges(image, seed, row["id"])
    crop = draw_crop((row["width"], row["height"]), params.resolution, params.center_crop, seed, row["id"])
    return CONDITIONS[name].crop(row[name], crop, channels)


def _num_shard_rows(conditions: dict[str, CachedCondition]) -> int:
    row_bytes = sum(math.prod(condition.shape) for condition in conditions.values())
    return max(1, min(_SHARD_ROWS, _SHARD_BYTES // max(1, row_bytes)))


def _encode_shard(
    params: PrecomputeParams,
    seed: int,
    rows: list[dict],
    conditions: dict[str, CachedCondition],
    vae,
    device,
    progress: tqdm,
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    seen = {name: np.empty((len(rows), *condition.shape), dtype=np.uint8) for name, condition in conditions.items()}
    for first in range(0, len(rows), params.batch_size):
        batch = rows[first : first + params.batch_size]
        images = _pixels(params, seed, batch)
        for place, (row, image) in enumerate(zip(batch, images, strict=True), start=first):
            for name, values in seen.items():
                values[place] = _condition_pixels(params, seed, row, image, name, len(values[place]))
        pixels = torch.from_numpy(images).to(device)
        for suffix, view in (("", pixels), *((("_flipped", pixels.flip(-1)),) if params.random_flip else ())):
            with torch.inference_mode():
                posterior = vae.encode(view).latent_dist
            for name, values in (("mean", posterior.mean), ("logvar", posterior.logvar)):
                stored = values.half().cpu()
                finite = stored.isfinite().flatten(1).all(1)
                if not finite.all():
                    bad = [row["id"] for row, ok in zip(batch, finite, strict=True) if not ok]
                    raise InputError(
                        f"the VAE's {name} isn't finite for {', '.join(bad)} (ids in inputs.csv); "
                        "remove the images, or use another VAE"
                    )
                parts.setdefault(name + suffix, []).append(stored)
        progress.update(len(batch))
    encoded = {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
    return encoded | {name: torch.from_numpy(values) for name, values in seen.items()}


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
