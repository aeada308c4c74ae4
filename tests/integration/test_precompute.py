"""The latent cache: exact, complete, and refused where it doesn't fit."""

import json

import pytest
import torch

from sdtrain.data.images import decode_rgb, square_pixels
from sdtrain.data.shards import LatentShards, read_dataset
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
