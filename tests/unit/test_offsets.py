"""Offsets in the released IC-Light's layout: base + offset is the exported UNet to the bit, in both key layouts."""

import copy
import errno
import json
import os

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain.ground.errors import DiskFullError, InputError
from sdtrain.models import offsets as module
from sdtrain.models.ic_light import LightEncoder, widen_conv_in
from sdtrain.models.offsets import (
    load_offsets,
    merge_offsets,
    offsets,
    save_offsets,
    save_original_offsets,
)
from sdtrain.models.parts import load_parts, load_unet
from sdtrain.models.pipelines import build_ic_light_pipeline
from sdtrain.models.sd1 import SD1
from sdtrain.models.trained import load_relit
from tests.conftest import ROOT

BUILTIN = ROOT / "data" / "builtin"
CONFIG = {
    "identity": {"base": "of no resolved base"},
    "params": {
        "precompute": {"resolution": 64},
        "train": {"prediction_type": "epsilon", "zero_terminal_snr": False},
    },
}


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return load_unet(BUILTIN / "unet")


def merged(base: UNet2DConditionModel, added: dict) -> UNet2DConditionModel:
    """A new UNet: what readers of a file get."""
    unet = copy.deepcopy(base)
    merge_offsets(unet, added)
    return unet


def trained(base: UNet2DConditionModel, in_channels: int = 8) -> UNet2DConditionModel:
    """The base, widened, with every weight changed a little."""
    unet, rng = copy.deepcopy(base), torch.Generator().manual_seed(0)
    widen_conv_in(unet, in_channels)
    for weight in unet.state_dict().values():
        weight += 0.01 * torch.randn(weight.shape, generator=rng)
    return unet


def differing(ours: nn.Module, theirs: nn.Module) -> list[str]:
    tensors, others = ours.state_dict(), theirs.state_dict()
    assert tensors.keys() == others.keys()
    return [key for key, tensor in tensors.items() if not torch.equal(tensor, others[key])]


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize("in_channels", [8, 12])
def test_offsets_are_what_training_added(base, in_channels):
    unet, original = trained(base, in_channels), copy.deepcopy(base)
    added = offsets(unet, base)
    assert list(added) == list(unet.state_dict())
    assert {tensor.dtype for tensor in added.values()} == {torch.float32}
    assert added["conv_in.weight"].shape == (64, in_channels, 3, 3)
    assert torch.equal(added["conv_in.weight"][:, 4:], unet.conv_in.weight[:, 4:])
    assert torch.equal(added["conv_in.weight"][:, :4], unet.conv_in.weight[:, :4] - base.conv_in.weight)
    assert torch.equal(added["conv_in.bias"], unet.conv_in.bias - base.conv_in.bias)
    assert not differing(base, original)
    widen_conv_in(original, in_channels)
    assert all(torch.equal(tensor, added[key]) for key, tensor in offsets(unet, original).items())
    assert not any(tensor.any() for tensor in offsets(original, base).values())


def test_base_plus_offset_is_not_always_the_trained_weight(base):
    """Why an exported UNet is defined as the sum: 1 + (1e-9 - 1) is 0 in fp32."""
    start = copy.deepcopy(base)
    start.conv_out.bias[0] = 1
    unet = trained(start)
    unet.conv_out.bias[0] = 1e-9
    added = offsets(unet, start)
    assert added["conv_out.bias"][0] == -1
    assert merged(start, added).conv_out.bias[0] == 0
    assert differing(merged(start, added), unet) == ["conv_out.bias"]


@pytest.mark.parametrize("in_channels", [8, 12])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_give_the_exported_unet_back_to_the_bit(base, tmp_path, in_channels, layout, dtype):
    file, added = tmp_path / "offset.safetensors", offsets(trained(base, in_channels), base)
    exported = merged(base, {key: tensor.to(dtype) for key, tensor in added.items()})
    if layout == "diffusers":
        save_offsets(file, added, dtype)
    else:
        save_original_offsets(file, added, exported.config, dtype)
    loaded = load_offsets(file, base.config)
    assert {tensor.dtype for tensor in loaded.values()} == {dtype}
    again = copy.deepcopy(base)
    merge_offsets(again, loaded, file)
    assert not differing(again, exported)
    assert again.config.in_channels == in_channels
    assert base.config.in_channels == 4
    widened = copy.deepcopy(base)
    widen_conv_in(widened, in_channels)
    assert not differing(merged(widened, loaded), exported)


def test_public_inference_code_reads_the_file(base, tmp_path):
    """The arithmetic of lllyasviel/IC-Light's gradio_demo.py: a new convolution, sums by the UNet's keys, strict."""
    file, added = tmp_path / "iclight_sd15_fc.safetensors", offsets(trained(base), base)
    save_offsets(file, added, torch.float32)
    unet = copy.deepcopy(base)
    with torch.no_grad():
        convolution = nn.Conv2d(8, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        convolution.weight.zero_()
        convolution.weight[:, :4].copy_(unet.conv_in.weight)
        convolution.bias = unet.conv_in.bias
        unet.conv_in = convolution
    in_file, origin = load_file(file), unet.state_dict()
    assert in_file.keys() == origin.keys()
    unet.load_state_dict({key: origin[key] + in_file[key] for key in origin}, strict=True)
    assert not differing(unet, merged(base, added))
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("in_channels", "num_parameters"), [(8, 859_532_484), (12, 859_544_004)])
def test_stable_diffusion_1_5_has_the_released_sizes_and_keys(in_channels, num_parameters):
    with torch.device("meta"):
        base, unet = (UNet2DConditionModel.from_config(SD1.unet) for _ in range(2))
    widen_conv_in(unet, in_channels)
    added = offsets(unet, base)
    assert len(added) == 686
    assert sum(tensor.numel() for tensor in added.values()) == num_parameters
    assert list(added["conv_in.weight"].shape) == [320, in_channels, 3, 3]
    assert list(added["conv_in.bias"].shape) == [320]
    merge_offsets(base, added)
    assert shapes(base.state_dict()) == shapes(added) == shapes(unet.state_dict())


def test_original_keys_are_stable_diffusions(tmp_path, monkeypatch):
    golden = (ROOT / "tests" / "golden" / "sd15_keys.txt").read_text().splitlines()[1:]
    known = {key: list(map(int, shape.split(","))) for key, shape in map(str.split, golden)}
    prefix = "model.diffusion_model."
    known = {key.removeprefix(prefix): shape for key, shape in known.items() if key.startswith(prefix)}
    known["input_blocks.0.0.weight"] = [320, 8, 3, 3]
    with torch.device("meta"):
        base, unet = (UNet2DConditionModel.from_config(SD1.unet) for _ in range(2))
    widen_conv_in(unet, 8)
    written = []
    monkeypatch.setattr(module, "save_file", lambda tensors, file, metadata: written.append(shapes(tensors)))
    save_original_offsets(tmp_path / "offset.safetensors", offsets(unet, base), unet.config, torch.float16)
    assert written == [known]


def test_offsets_in_half_precision_are_more_exact_than_weights(base):
    unet = trained(base)
    added = offsets(unet, base)
    ours = merged(base, {key: tensor.half() for key, tensor in added.items()})
    theirs = copy.deepcopy(unet).half().float()

    def error(found: nn.Module) -> float:
        pairs = [(found.state_dict()[key], weight) for key, weight in unet.state_dict().items()]
        return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()

    assert 10 * error(ours) < error(theirs)


def make_folder(folder, light: bool) -> dict[str, nn.Module]:
    """An export: the pipeline's folder, and its offsets in both layouts; returns its modules."""
    parts = load_parts(BUILTIN)
    added = offsets(trained(parts.unet), parts.unet)
    save_offsets(folder / "offset.safetensors", added, torch.float32)
    save_original_offsets(folder / "original.safetensors", added, parts.unet.config, torch.float32)
    merge_offsets(parts.unet, added)
    if light:
        parts.others["light_encoder"] = LightEncoder((1, 5), num_tokens=3, dim=128)
        nn.init.normal_(parts.others["light_encoder"].layers[-1].weight)
    build_ic_light_pipeline(parts, parts.scheduler).save_pretrained(folder)
    (folder / "training_config.json").write_text(json.dumps(CONFIG))
    return {"unet": parts.unet, **parts.others}


@pytest.mark.parametrize("light", [False, True])
def test_export_is_loaded_the_same_from_its_folder_and_from_either_file(tmp_path, light):
    modules = make_folder(tmp_path, light)
    for file in (None, "offset.safetensors", "original.safetensors"):
        loaded = load_relit(tmp_path, BUILTIN, file)
        assert (loaded.light_encoder is not None) == light
        for name, exported in modules.items():
            assert not differing(getattr(loaded, name), exported)
        processors = {type(processor).__name__ for processor in loaded.unet.attn_processors.values()}
        assert ("LightAttnProcessor" in processors) == light
        assert loaded.unet.config.in_channels == 8


def test_other_bases_are_refused(base, tmp_path):
    added = offsets(trained(base), base)
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config({**base.config, "block_out_channels": (32, 96)})
        deeper = UNet2DConditionModel.from_config({**base.config, "layers_per_block": 2})
    nine = copy.deepcopy(base)
    nine.conv_in = nn.Conv2d(9, 64, 3, padding=1)
    changed = {
        r"x: its conv_in\.weight is \[64, 8, 3, 3\], .* \[32, 8, 3, 3\] or \[32, 12, 3, 3\]; use": (other, added),
        r"x: its conv_in\.weight is \[64, 8, 3, 3\], and this base's UNet takes \[64, 9, 3, 3\]; use": (nine, added),
        r"x: its conv_in\.weight is \[64, 4, 3, 3\]": (base, offsets(base, base)),
        r"x: its conv_out\.bias is \[5\], and this base's UNet takes \[4\]": (
            base,
            added | {"conv_out.bias": torch.zeros(5)},
        ),
        rf"x: not offsets of this base: of their {len(added)} tensors and its UNet's \d+, .* is missing": (
            deeper,
            added,
        ),
        r"1 are on one side only; extra isn't among the latter": (base, added | {"extra": torch.zeros(1)}),
    }
    before = copy.deepcopy(base)
    for reason, (unet, given) in changed.items():
        with pytest.raises(InputError, match=reason):
            merge_offsets(unet, given, "x")
    assert not differing(base, before)
    assert base.config.in_channels == 4


def test_damaged_and_foreign_files_are_refused(base, tmp_path):
    file = tmp_path / "offset.safetensors"
    with pytest.raises(InputError, match=r"offset\.safetensors: no such file"):
        load_offsets(file, base.config)
    save_file({"lora.weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=r"offset\.safetensors: not offsets of an IC-Light: it has neither conv_in"):
        load_offsets(file, base.config)
    save_file({"input_blocks.0.0.weight": torch.zeros(2), "input_blocks.99.0.op.weight": torch.zeros(2)}, file)
    with pytest.raises(
        InputError, match=r"not offsets of this base, whose UNet has no input_blocks\.99\.0\.op\.weight"
    ):
        load_offsets(file, base.config)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"offset\.safetensors: not a complete \.safetensors file"):
        load_offsets(file, base.config)


def test_structures_that_the_original_layout_lacks_are_refused(base, tmp_path):
    added = offsets(trained(base), base)
    base = copy.deepcopy(base)
    base.register_to_config(class_embed_type="timestep")
    with pytest.raises(InputError, match="can't express class_embed_type = timestep of the unet"):
        save_original_offsets(tmp_path / "offset.safetensors", added, base.config, torch.float32)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_explained(base, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(DiskFullError, match=r"offset\.safetensors \(needs"):
        save_offsets(tmp_path / "offset.safetensors", offsets(base, base), torch.float32)
