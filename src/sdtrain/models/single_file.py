"""One .safetensors in the key layout of the original Stable Diffusion 1.x, which ComfyUI and A1111 load.

Diffusers and Transformers hold the modules of CompVis' `ldm` under names of their own. The tensors are the same, but
for the weights of the VAE's attention: linear here, 1x1 convolutions there. So the layout is a renaming of modules, and
follows from the configs:

- UNet (`UNetModel`): `input_blocks` and `output_blocks` are flat lists. An entry is a resnet, then its transformer if
  the block has them; the upsampler is appended to the last entry of its block, while the downsampler, like the first
  convolution, is an entry of its own.
- VAE (`Encoder`, `Decoder`): `up` is numbered from the image's side, against the order of `up_blocks`.
- Text encoder: CLIPTextModel as it was then, with its modules in `text_model`.

The file holds these modules' tensors only, without the original's `position_ids` (0 to 76) and buffers of the noise
schedule, which its readers make themselves. ComfyUI and A1111 take all else from SD 1.5: structure and sizes, epsilon
prediction, the noise schedule, the VAE's scaling factor. Stock Diffusers reads any size back with the configs of a
Diffusers folder, without a network: `StableDiffusionPipeline.from_single_file(file, config="path/to/folder")`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import disk_errors_explained

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TRANSFORMER_BLOCK = (
    *("norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("norm3", "ff.net.0.proj", "ff.net.2"),
)
_VAE_RESNET = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TEXT_LAYER = (
    *("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    *("layer_norm2", "mlp.fc1", "mlp.fc2"),
)

_TAKES = {
    "unet": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": (int,),
        "transformer_layers_per_block": (int,),
        "dual_cross_attention": (False,),
        "attention_type": ("default",),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "time_cond_proj_dim": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
    },
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "mid_block_add_attention": (True,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    },
    "text_encoder": {"model_type": ("clip_text_model",)},
}
"""What the layout can express of the config values that decide which weights there are; `int` stands for any number."""


def save_single_file(pipeline: StableDiffusionPipeline, file: Path) -> None:
    """Write the UNet, the VAE and the text encoder, in the dtypes that they have; into a folder that isn't in use yet.

    Raises:
        InputError: the layout can't express one's structure; names the config key.
    """
    tensors = _original_tensors(pipeline)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with disk_errors_explained(str(file), file.parent, num_bytes):
        save_file(tensors, file, metadata={"format": "pt"})


def _original_tensors(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All tensors by their original keys, as safetensors takes them: contiguous, none twice."""
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    _check_structure("vae", vae.config)
    _check_structure("text_encoder", text_encoder.config)
    renamed = [
        *_renamed("model.diffusion_model", unet, original_unet_names(unet.config)),
        *_renamed("first_stage_model", vae, _vae_names(vae.config)),
        *_renamed("cond_stage_model.transformer.text_model", text_encoder, _text_names(text_encoder.config)),
    ]
    tensors, written = {}, set()
    for key, tensor in renamed:
        assert key not in tensors, f"two tensors are named {key}"
        if ".mid.attn_1." in key and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensor = tensor.contiguous()
        tensors[key] = tensor.clone() if tensor.data_ptr() in written else tensor  # tied weights have one memory
        written.add(tensor.data_ptr())
    return tensors


def _renamed(prefix: str, module: nn.Module, names: dict[str, str]) -> Iterable[tuple[str, Tensor]]:
    for key, tensor in module.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        assert owner in names, f"the original layout of {prefix} has no name for {key}"
        yield f"{prefix}.{names[owner]}.{leaf}", tensor


def original_unet_names(config: Any) -> dict[str, str]:
    """The original name of every module of the UNet that holds weights, by Diffusers' name; some that it lacks, too.

    Raises:
        InputError: the layout can't express the UNet's structure; names the config key.
    """
    _check_structure("unet", config)
    layers = config.layers_per_block
    depth = range(config.transformer_layers_per_block)
    transformer = [f"transformer_blocks.{i}.{module}" for i in depth for module in _TRANSFORMER_BLOCK]
    attention = {name: name for name in ("norm", "proj_in", "proj_out", *transformer)}
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        **_below("mid_block.resnets.0", "middle_block.0", _UNET_RESNET),
        **_below("mid_block.attentions.0", "middle_block.1", attention),
        **_below("mid_block.resnets.1", "middle_block.2", _UNET_RESNET),
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for block in range(len(config.down_block_types)):
        first = 1 + block * (layers + 1)
        for layer in range(layers):
            names |= _below(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{first + layer}.0", _UNET_RESNET)
            names |= _below(f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{first + layer}.1", attention)
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for block, kind in enumerate(config.up_block_types):
        first = block * (layers + 1)
        for layer in range(layers + 1):
            names |= _below(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{first + layer}.0", _UNET_RESNET)
            names |= _below(f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{first + layer}.1", attention)
        place = 2 if kind == "CrossAttnUpBlock2D" else 1
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{place}.conv"
    return names


def _vae_names(config: Any) -> dict[str, str]:
    """As `original_unet_names`."""
    layers, last = config.layers_per_block, len(config.block_out_channels) - 1
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        names |= _below(half, half, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        names |= _below(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", _VAE_RESNET)
        names |= _below(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        names |= _below(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", _VAE_RESNET)
    for block in range(last + 1):
        ours, theirs = f"encoder.down_blocks.{block}", f"encoder.down.{block}"
        for layer in range(layers):
            names |= _below(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", _VAE_RESNET)
        names[f"{ours}.downsamplers.0.conv"] = f"{theirs}.downsample.conv"
        ours, theirs = f"decoder.up_blocks.{block}", f"decoder.up.{last - block}"
        for layer in range(layers + 1):
            names |= _below(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", _VAE_RESNET)
        names[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    return names


def _text_names(config: Any) -> dict[str, str]:
    """As `original_unet_names`."""
    layers = [f"encoder.layers.{i}.{module}" for i in range(config.num_hidden_layers) for module in _TEXT_LAYER]
    embeddings = ("embeddings.token_embedding", "embeddings.position_embedding")
    return {name: name for name in (*embeddings, *layers, "final_layer_norm")}


def _below(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{inner}": f"{theirs}.{original}" for inner, original in names.items()}


def _check_structure(part: str, config: Any) -> None:
    for key, takes in _TAKES[part].items():
        value = getattr(config, key)
        values = value if isinstance(value, list | tuple) else [value]
        if type(value) not in takes and not all(each in takes for each in values):
            raise InputError(
                f"export.single_file: Stable Diffusion's original key layout can't express {key} = {value} of the "
                f"{part}, it takes {' or '.join(getattr(each, '__name__', str(each)) for each in takes)}; "
                "switch export.single_file off: the Diffusers folder has the whole model"
            )
