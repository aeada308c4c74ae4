"""The base model from local parts, and a UNet of one's own structure."""

import pytest
import torch

from sdtrain.base import resolve_base
from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import BaseManifest
from sdtrain.models.parts import load_unet

SMALL = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def resolve(make_params, root, out, seed=0, **changes):
    params = make_params(base={"path": str(root / "data" / "builtin"), **changes})
    return resolve_base(params.base, seed, out)


def test_a_unet_of_ones_own_takes_its_widths_from_the_other_parts(make_params, root, tmp_path):
    manifest = resolve(make_params, root, tmp_path / "base", unet_config=SMALL)
    unet = load_unet(tmp_path / "base" / "unet")
    assert unet.config.block_out_channels == [16, 32]
    assert (unet.config.in_channels, unet.config.out_channels, unet.config.cross_attention_dim) == (4, 4, 128)
    assert manifest.sources[-1] == {"unet_config": SMALL, "seed": 0, "parts": ["unet"]}


def test_its_first_weights_follow_the_seed(make_params, root, tmp_path):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        resolve(make_params, root, tmp_path / f"{number}", seed=seed, unet_config=SMALL)
        weights.append(load_unet(tmp_path / f"{number}" / "unet").conv_in.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_out_chanels": [16]},
            "base.unet_config.block_out_chanels = .*no such setting; nearest is block_out_channels",
        ),
        ({"cross_attention_dim": 96}, "unet cross_attention_dim = 96, but text_encoder hidden_size = 128"),
        ({"in_channels": 8}, "unet in_channels = 8, but vae latent_channels = 4"),
        ({"layers_per_block": [1, 1, 1]}, "base.unet_config: "),
    ],
)
def test_a_structure_that_can_t_work_is_explained(make_params, root, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        resolve(make_params, root, tmp_path / "base", unet_config={**SMALL, **changes})
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_names_every_file(make_params, root, tmp_path):
    manifest = resolve(make_params, root, tmp_path / "base")
    files = {str(p.relative_to(tmp_path / "base")) for p in (tmp_path / "base").rglob("*") if p.is_file()}
    assert set(manifest.files) == files - {"manifest.json"}
    assert BaseManifest.read(tmp_path / "base") == manifest


def test_a_folder_without_weights_is_explained(make_params, root, tmp_path):
    import shutil

    shutil.copytree(root / "data" / "builtin", tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "model" / "unet" / "diffusion_pytorch_model.bin"
    )
    params = make_params(base={"path": str(tmp_path / "model")})
    with pytest.raises(InputError, match="lacks unet/diffusion_pytorch_model.safetensors .it has pickled weights"):
        resolve_base(params.base, 0, tmp_path / "base")
