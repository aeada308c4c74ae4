"""The latent cache: exact, complete, and refused where it doesn't fit."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.edges import canny_edges
from sdtrain.data.images import decode_rgb, square_pixels
from sdtrain.data.shards import Column, LatentShards, held_out_pictures, read_dataset
from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.models.parts import load_tokenizer, load_vae, tokenize
from sdtrain.precompute import precompute_latents


def precompute(workspace, out, **changes):
    params = workspace.make_params(dataset={"source": "imagefolder"}, precompute=changes)
    precompute_latents(
        params.precompute, params.seed, workspace.base, workspace.dataset, out / "latents", out / "m.json"
    )
    return LatentShards(out / "latents", "train", encoders_fingerprint(workspace.base))


def test_every_row_is_the_vae_s_posterior_and_the_caption_s_tokens(workspace):
    shards = LatentShards(workspace.latents, "train", encoders_fingerprint(workspace.base))
    rows = list(read_dataset(workspace.dataset, "train"))
    assert shards.ids == [row["id"] for row in rows]
    vae, tokenizer = load_vae(workspace.base), load_tokenizer(workspace.base)
    for index in (0, 7, len(rows) - 1):
        pixels = torch.from_numpy(square_pixels(decode_rgb(rows[index]["image"]), 64, True, 0, rows[index]["id"]))
        posterior = vae.encode(pixels[None]).latent_dist
        mean, logvar, input_ids = shards.read(index, "mean", "logvar", "input_ids").values()
        torch.testing.assert_close(mean, posterior.mean[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logvar, posterior.logvar[0], rtol=1e-3, atol=5e-3)
        assert torch.equal(input_ids, tokenize(tokenizer, [rows[index]["caption"]])[0])


def test_the_flipped_image_has_an_encoding_of_its_own(workspace, tmp_path):
    shards = precompute(workspace, tmp_path, random_flip=True)
    row = next(read_dataset(workspace.dataset, "train"))
    pixels = torch.from_numpy(square_pixels(decode_rgb(row["image"]), 64, True, 0, row["id"]))
    posterior = load_vae(workspace.base).encode(pixels.flip(-1)[None]).latent_dist
    mean, flipped = (shards.read(0, "mean", flipped=flipped)["mean"] for flipped in (False, True))
    torch.testing.assert_close(flipped, posterior.mean[0], rtol=1e-3, atol=1e-3)
    assert (flipped - mean.flip(-1)).abs().mean() > 0.05, "latents can't be flipped"


def test_scaled_latents_have_unit_spread(workspace):
    metrics = json.loads((workspace.folder / "precompute.json").read_text())
    assert metrics["latents_std"] == pytest.approx(1, abs=0.1)
    assert metrics["num_truncated_captions"] == 0
    assert metrics["num_upscaled"] == 0


def test_enlarged_images_are_counted(workspace, tmp_path):
    precompute(workspace, tmp_path, resolution=128)
    assert json.loads((tmp_path / "m.json").read_text())["num_upscaled"] == 60


@pytest.mark.parametrize(("resolution", "advice"), [(60, "use 56 or 64"), (4, "use 8")])
def test_a_resolution_the_vae_can_t_halve_is_refused(workspace, tmp_path, resolution, advice):
    with pytest.raises(InputError, match=rf"precompute.resolution = {resolution}: must be a multiple of 8.*{advice}"):
        precompute(workspace, tmp_path, resolution=resolution)
    assert not list(tmp_path.glob("latents*"))


def test_batch_size_changes_rounding_only(workspace, tmp_path):
    shards = precompute(workspace, tmp_path, batch_size=7)
    reference = LatentShards(workspace.latents, "train", encoders_fingerprint(workspace.base))
    torch.testing.assert_close(shards.read(20, "mean"), reference.read(20, "mean"), rtol=2e-3, atol=2e-3)


def test_a_vae_that_gives_nan_is_caught(workspace, tmp_path, monkeypatch):
    vae = load_vae(workspace.base)
    vae.quant_conv.bias[0] = float("nan")
    monkeypatch.setattr("sdtrain.precompute.load_vae", lambda base: vae)
    with pytest.raises(InputError, match="mean isn't finite for [0-9a-f]{32}"):
        precompute(workspace, tmp_path)


def test_hints_are_cached_as_their_pixels_and_mirrored_when_read(hinted, tmp_path, monkeypatch):
    """In shards of a few rows, as large hints make them."""
    monkeypatch.setattr("sdtrain.precompute._SHARD_BYTES", 20 * 64 * 64)
    settings = hinted.make_params().precompute.model_copy(update={"random_flip": True})
    precompute_latents(settings, 0, hinted.base, hinted.dataset, tmp_path / "latents", tmp_path / "m.json")
    for split in ("train", "validation"):
        shards = LatentShards(tmp_path / "latents", split, encoders_fingerprint(hinted.base))
        shards.check_columns({"hint": Column((3, 64, 64), dtype="uint8")})
        rows = list(read_dataset(hinted.dataset, split))
        assert [shard.num_rows for shard in shards.manifest.splits[split]][:-1] == [20] * ((len(rows) - 1) // 20)
        for index, row in enumerate(rows):
            hint = torch.from_numpy(np.array(Image.open(io.BytesIO(row["hint"]))))
            assert torch.equal(shards.read(index, "hint")["hint"], hint.expand(3, -1, -1))
            assert torch.equal(shards.read(index, "hint", flipped=True)["hint"], hint.flip(-1).expand(3, -1, -1))
        if split == "validation":
            assert shards.captions == [row["caption"] for row in rows]
            captions, conditions = held_out_pictures(shards, ["hint"], 2)
            for caption, image in zip(captions, conditions["hint"], strict=True):
                index = shards.captions.index(caption)
                assert np.array_equal(np.asarray(image), shards.read(index, "hint")["hint"].permute(1, 2, 0).numpy())
    assert json.loads((tmp_path / "m.json").read_text())["num_blank_hints"] == 0


def test_edges_are_those_of_the_cropped_image(workspace, tmp_path):
    settings = workspace.make_params().precompute.model_copy(update={"derived_conditions": {"hint": "canny"}})
    precompute_latents(settings, 0, workspace.base, workspace.dataset, tmp_path / "latents", tmp_path / "m.json")
    num_blank, num_rows = 0, 0
    for split in ("train", "validation"):
        shards = LatentShards(tmp_path / "latents", split, encoders_fingerprint(workspace.base))
        for index, row in enumerate(read_dataset(workspace.dataset, split)):
            pixels = square_pixels(decode_rgb(row["image"]), 64, True, 0, row["id"])
            edges = torch.from_numpy(canny_edges(pixels, 0, row["id"]))
            assert torch.equal(shards.read(index, "hint")["hint"], edges.expand(3, -1, -1))
            num_blank, num_rows = num_blank + (not edges.any()), num_rows + 1
    assert num_blank < num_rows / 10
    assert json.loads((tmp_path / "m.json").read_text())["num_blank_hints"] == num_blank


def test_a_method_refuses_hints_of_another_size(hinted):
    shards = LatentShards(hinted.latents, "train", encoders_fingerprint(hinted.base))
    with pytest.raises(InputError, match=r"a row of column 'hint' has shape \(3, 64, 64\), the training method needs"):
        shards.check_columns({"hint": Column((3, 128, 128), dtype="uint8")})
