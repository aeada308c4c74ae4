"""A model in the original key layout is read back by stock Diffusers, bit by bit, without a network."""

import errno
import os
import socket
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from torch import nn
from transformers import T5Config, T5EncoderModel

from sdtrain.ground.errors import DiskFullError, InputError
from sdtrain.ground.files import new_folder, sha256_file
from sdtrain.models import single_file
from sdtrain.models.parts import Configs, load_parts, load_tokenizer, meta_parts, read_configs
from sdtrain.models.pipelines import build_pipeline
from sdtrain.models.sd1 import SD1
from sdtrain.models.single_file import save_single_file
from tests.conftest import ROOT

BUILTIN = ROOT / "data" / "builtin"
PARTS = ("unet", "vae", "text_encoder")
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("this needs a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def make_pipeline(configs: Configs, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """A pipeline without the cost of random weights: each tensor is another piece of one random row."""
    parts = meta_parts(configs, sample_size=8)
    row = torch.randn(65_521, generator=torch.Generator().manual_seed(0)).to(dtype)  # prime, unlike any tensor's side
    number = 0
    for module in parts.modules():
        module.to(dtype).to_empty(device="cpu")
        for tensor in module.state_dict().values():
            number += 1
            tensor.copy_(row.roll(number).repeat(-(-tensor.numel() // len(row)))[: tensor.numel()].view(tensor.shape))
    parts.tokenizer = load_tokenizer(BUILTIN)
    return build_pipeline(parts, DDPMScheduler())


def read_back(pipeline: StableDiffusionPipeline, file: Path, folder: Path, dtype=torch.float32):
    """Stock Diffusers' view of the file, from a Diffusers folder with the pipeline's configs and nothing else."""
    pipeline.save_config(folder)
    for part in ("unet", "vae", "scheduler"):
        getattr(pipeline, part).save_config(folder / part)
    pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    assert not list(folder.rglob("*.safetensors"))
    return StableDiffusionPipeline.from_single_file(file, config=str(folder), dtype=dtype, local_files_only=True)


def assert_same(pipeline: StableDiffusionPipeline, loaded: StableDiffusionPipeline) -> None:
    for part in PARTS:
        ours, theirs = (getattr(each, part).state_dict() for each in (pipeline, loaded))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert theirs[key].dtype == tensor.dtype
            assert torch.equal(theirs[key], tensor), f"{part}: {key}"


def keys_of(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def tiny() -> StableDiffusionPipeline:
    return build_pipeline(load_parts(BUILTIN), DDPMScheduler())


def test_builtin_model_survives(tiny, tmp_path):
    file = tmp_path / "model.safetensors"
    save_single_file(tiny, file)
    assert_same(tiny, read_back(tiny, file, tmp_path / "configs"))
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    once = sha256_file(file)
    save_single_file(tiny, file)
    assert sha256_file(file) == once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "model.safetensors"]


def test_stable_diffusion_1_5_survives_under_its_known_keys(tmp_path):
    pipeline = make_pipeline(SD1, torch.float16)
    golden = (ROOT / "tests" / "golden" / "sd15_keys.txt").read_text().splitlines()[1:]
    known = {key: list(map(int, shape.split(","))) for key, shape in map(str.split, golden)}
    parts = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model.")
    assert [sum(key.startswith(part) for key in known) for part in parts] == [686, 248, 196]
    file = tmp_path / "model.safetensors"
    try:
        save_single_file(pipeline, file)
        assert keys_of(file) == known
        assert_same(pipeline, read_back(pipeline, file, tmp_path / "configs", torch.float16))
    finally:
        file.unlink(missing_ok=True)  # 2.1 GB, which pytest would keep


def configs_of(unet: dict, vae: dict) -> Configs:
    """The built-in model's configs, smaller, with changes."""
    tiny = read_configs(BUILTIN)
    return Configs(
        unet={**tiny.unet, "block_out_channels": (16, 32), "cross_attention_dim": 24, **unet},
        vae={**tiny.vae, "block_out_channels": (8, 8, 16, 16), **vae},
        text_encoder={**tiny.text_encoder, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 11},
    )


STRUCTURES = {
    "linear projections, two layers": ({"use_linear_projection": True, "layers_per_block": 2}, {}),
    "attention in the last blocks only": (
        {"down_block_types": DOWN, "up_block_types": UP[::-1], "transformer_layers_per_block": 2},
        {"layers_per_block": 3},
    ),
    "one block": (
        {"block_out_channels": (16,), "down_block_types": DOWN[1:], "up_block_types": UP[1:]},
        {
            "block_out_channels": (8,),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
        },
    ),
    "five blocks, three layers, numbers with two digits": (
        {
            "block_out_channels": (16, 16, 32, 48, 64),
            "down_block_types": (DOWN[1], DOWN[0], DOWN[1], DOWN[1], DOWN[0]),
            "up_block_types": (UP[0], UP[1], UP[1], UP[0], UP[1]),
            "layers_per_block": 3,
        },
        {
            "block_out_channels": (8, 16, 8, 24, 24),
            "down_block_types": ("DownEncoderBlock2D",) * 5,
            "up_block_types": ("UpDecoderBlock2D",) * 5,
            "layers_per_block": 2,
        },
    ),
    "other channels in and out": ({"in_channels": 9, "out_channels": 8}, {"latent_channels": 16, "in_channels": 1}),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_other_structures_survive(tmp_path, structure):
    pipeline = make_pipeline(configs_of(*STRUCTURES[structure]), torch.bfloat16)
    save_single_file(pipeline, tmp_path / "model.safetensors")
    assert_same(pipeline, read_back(pipeline, tmp_path / "model.safetensors", tmp_path / "configs", torch.bfloat16))


def test_vae_attention_is_written_as_convolutions(tiny, tmp_path):
    save_single_file(tiny, tmp_path / "model.safetensors")
    shapes = keys_of(tmp_path / "model.safetensors")
    for half in ("encoder", "decoder"):
        attention = f"first_stage_model.{half}.mid.attn_1."
        found = {key.removeprefix(attention): shape for key, shape in shapes.items() if key.startswith(attention)}
        layers = ("q", "k", "v", "proj_out")
        weights = {f"{layer}.weight": [80, 80, 1, 1] for layer in layers} | {"norm.weight": [80]}
        assert found == weights | {f"{layer}.bias": [80] for layer in (*layers, "norm")}


def test_tied_and_rearranged_weights_survive(tmp_path):
    pipeline = make_pipeline(configs_of({}, {}))
    resnets = pipeline.unet.mid_block.resnets
    resnets[1].conv1.weight = resnets[0].conv1.weight
    attention = pipeline.vae.encoder.mid_block.attentions[0]
    attention.to_k.weight = attention.to_q.weight
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.decoder.mid_block.attentions[0].to_v.weight.data = torch.randn(16, 16).T
    save_single_file(pipeline, tmp_path / "model.safetensors")
    assert_same(pipeline, read_back(pipeline, tmp_path / "model.safetensors", tmp_path / "configs"))
    assert not pipeline.unet.conv_in.weight.is_contiguous()  # the pipeline itself is left as it was


def test_each_part_keeps_its_dtype(tmp_path):
    pipeline = make_pipeline(configs_of({}, {}))
    pipeline.unet.half()
    pipeline.text_encoder.bfloat16()
    save_single_file(pipeline, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        found = {(key.split(".")[0], opened.get_slice(key).get_dtype()) for key in opened.keys()}  # noqa: SIM118
    assert found == {("model", "F16"), ("first_stage_model", "F32"), ("cond_stage_model", "BF16")}


REFUSED = {
    "unet": {
        "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": None,
        "layers_per_block": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "dual_cross_attention": True,
        "attention_type": "gated",
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier",
        "time_cond_proj_dim": 32,
        "class_embed_type": "timestep",
        "num_class_embeds": 3,
        "addition_embed_type": "image",
        "encoder_hid_dim_type": "text_proj",
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
    },
    "vae": {
        "down_block_types": (*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
NEEDS = {"encoder_hid_dim_type": {"encoder_hid_dim": 12}, "addition_embed_type": {"encoder_hid_dim": 12}}
"""What a model with this key also needs."""


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, changes in REFUSED.items() for key in changes])
def test_what_the_layout_does_not_have_is_refused_by_key(tmp_path, part, key):
    value = REFUSED[part][key]
    changes = {part: {**NEEDS.get(key, {}), key: value}}
    parts = meta_parts(configs_of(changes.get("unet", {}), changes.get("vae", {})), sample_size=8)
    parts.tokenizer = load_tokenizer(BUILTIN)
    with pytest.raises(InputError) as refused:
        save_single_file(build_pipeline(parts, DDPMScheduler()), tmp_path / "model.safetensors")
    assert str(refused.value).startswith("export.single_file: ")
    assert f" can't express {key} = {value} of the {part}, it takes " in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_text_encoder_is_refused(tmp_path):
    pipeline = make_pipeline(configs_of({}, {}))
    pipeline.text_encoder = T5EncoderModel(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=8))
    with pytest.raises(InputError, match=r"export\.single_file: .* model_type = t5 of the text_encoder, "):
        save_single_file(pipeline, tmp_path / "model.safetensors")


@pytest.mark.parametrize("part", PARTS)
def test_weights_outside_the_structure_are_not_passed_over(tmp_path, part):
    """As an adapter's that nobody merged."""
    pipeline = make_pipeline(configs_of({}, {}))
    inner = next(module for module in getattr(pipeline, part).modules() if isinstance(module, nn.Linear))
    inner.lora_A = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match=r"no name for .*\.lora_A\.weight"):
        save_single_file(pipeline, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DiskFullError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failing_write_leaves_the_old_export(tiny, tmp_path, monkeypatch, error, told):
    """The folder of exports comes into being as a whole, so this file has no temporary name of its own."""

    def write_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    old = tmp_path / "model" / "model.safetensors"
    old.parent.mkdir()
    old.write_bytes(b"old")
    monkeypatch.setattr(single_file, "save_file", write_half)
    with (
        pytest.raises(told, match=r"model \(needs" if told is DiskFullError else None),
        new_folder(old.parent) as folder,
    ):
        save_single_file(tiny, folder / old.name)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old.parent]
