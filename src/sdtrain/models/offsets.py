"""IC-Light's weights as the released ones are: what training added to the base, in one .safetensors.

The layout (lllyasviel/IC-Light, gradio_demo.py): all tensors of the UNet, trained minus base, where the base's first
convolution is widened with zeros; so for the new input channels they are the weights themselves. Readers compute
base + offset, which in floating point isn't always the trained weight. So a model and its offsets agree by definition:
the model is what `merge_offsets` makes of the base.

ComfyUI-IC-Light-Native takes them in the original key layout, without `model.diffusion_model.`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import disk_errors_explained
from sdtrain.ground.headers import read_metadata
from sdtrain.models.ic_light import widen_conv_in
from sdtrain.models.single_file import original_unet_names

Offsets = dict[str, Tensor]
"""By Diffusers' keys of the UNet."""
_CONV_IN = "conv_in.weight"
_ORIGINAL_CONV_IN = "input_blocks.0.0.weight"


def offsets(trained: UNet2DConditionModel, base: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> Offsets:
    """Trained minus base, computed in fp32.

    Args:
        base: plain, or already with as many input channels as `trained`.
        dtype: to return.
    """
    weights, patched = trained.state_dict(), base.state_dict()
    assert weights.keys() == patched.keys(), "the trained UNet has other tensors than its base"
    new_channels = weights[_CONV_IN].shape[1] - patched[_CONV_IN].shape[1]
    patched[_CONV_IN] = F.pad(patched[_CONV_IN], (0, 0, 0, 0, 0, new_channels))
    return {key: (weight.float() - patched[key].float()).to(dtype) for key, weight in weights.items()}


def merge_offsets(unet: UNet2DConditionModel, added: Offsets, source: Path | str = "the offsets") -> None:
    """Widen a base's UNet and add the offsets, in place.

    Args:
        source: where they come from, for the error.

    Raises:
        InputError: they belong to another structure than this base's.
    """
    check_offsets(unet, added, source)
    widen_conv_in(unet, added[_CONV_IN].shape[1])
    for key, weight in unet.state_dict().items():
        weight.copy_(weight.float() + added[key].to(weight.device, torch.float32))


def check_offsets(unet: UNet2DConditionModel, added: Offsets, source: Path | str) -> None:
    """Check that the offsets have every tensor of this base's UNet, with its shape.

    Raises:
        InputError: names the source and a tensor, with both shapes.
    """
    shapes = {key: tuple(weight.shape) for key, weight in unet.state_dict().items()}
    differ = sorted(shapes.keys() ^ added.keys())
    if differ:
        where = "isn't among the latter" if differ[0] in added else "is missing"
        raise InputError(
            f"{source}: not offsets of this base: of their {len(added)} tensors and its UNet's {len(shapes)}, "
            f"{len(differ)} are on one side only; {differ[0]} {where}; use the base that they were made for"
        )
    out_channels, in_channels, *kernel = shapes[_CONV_IN]
    widths = (8, 12) if in_channels == 4 else (in_channels,)
    for key, shape in shapes.items():
        takes = [(out_channels, width, *kernel) for width in widths] if key == _CONV_IN else [shape]
        if tuple(added[key].shape) not in takes:
            raise InputError(
                f"{source}: its {key} is {list(added[key].shape)}, and this base's UNet takes "
                f"{' or '.join(str(list(each)) for each in takes)}; use the base that it was made for"
            )


def save_offsets(file: Path, added: Offsets, dtype: torch.dtype) -> None:
    """Write them as the released IC-Light is, in Diffusers' keys; into a folder that isn't in use yet."""
    _save(file, added, dtype)


def save_original_offsets(file: Path, added: Offsets, unet_config: Any, dtype: torch.dtype) -> None:
    """As `save_offsets`, in the original key layout, e.g. `input_blocks.0.0.weight`.

    Raises:
        InputError: the layout can't express the UNet's structure; names the config key.
    """
    _save(file, _renamed(added, original_unet_names(unet_config)), dtype)


def load_offsets(file: Path, unet_config: Any) -> Offsets:
    """The tensors of a file in either key layout, as they are in it.

    Args:
        unet_config: of the base's UNet, by which the original keys are read.

    Raises:
        InputError: the file is missing or damaged, or has neither layout's keys.
    """
    read_metadata(file)  # which checks that the file is whole
    tensors = load_file(file)
    if _ORIGINAL_CONV_IN in tensors:
        ours = {original: name for name, original in original_unet_names(unet_config).items()}
        try:
            return _renamed(tensors, ours)
        except KeyError as unknown:
            raise InputError(
                f"{file}: not offsets of this base, whose UNet has no {unknown.args[0]}; "
                "use the base that they were made for"
            ) from None
    if _CONV_IN not in tensors:
        raise InputError(
            f"{file}: not offsets of an IC-Light: it has neither {_CONV_IN} nor {_ORIGINAL_CONV_IN} "
            f"among its {len(tensors)} tensors"
        )
    return tensors


def _renamed(tensors: Offsets, names: dict[str, str]) -> Offsets:
    """With their modules' new names.

    Raises:
        KeyError: there is none for a key, which it holds.
    """
    renamed = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if module not in names:
            raise KeyError(key)
        renamed[f"{names[module]}.{leaf}"] = tensor
    return renamed


def _save(file: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    with disk_errors_explained(str(file), file.parent, sum(tensor.nbytes for tensor in tensors.values())):
        save_file(tensors, file, metadata={"format": "pt"})
