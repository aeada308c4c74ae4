"""Features of images, by a frozen image encoder: DINOv2's class token or CLIP's image embedding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor, CLIPModel, Dinov2Model, PreTrainedModel

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json, sha256_file, sha256_json
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.models.parts import hide_progress_bars

_ENCODERS = {"dinov2": Dinov2Model, "clip": CLIPModel}
"""By `model_type` of `config.json`."""


class ImageFeatures:
    """An image encoder with its preprocessing, on one device."""

    def __init__(self, name: str, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
        self.name = name
        """The model and its revision: features of equal names can be compared."""
        self.has_captions = isinstance(model, CLIPModel)
        """Whether it embeds captions, too: `clip_score.load_caption_features`."""
        self._model, self._processor = model, processor

    def extract(self, images: Sequence[Image.Image], batch_size: int, processes: Processes = ALONE) -> np.ndarray:
        """Features, float32 [len(images), d], which depend on `batch_size` only by rounding.

        DINOv2's are its class token after the last layer norm, CLIP's its projected embedding, not at unit length.
        """
        batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return np.concatenate(list(processes.map(self.extract_batch, batches)))

    def extract_batch(self, images: Sequence[Image.Image]) -> np.ndarray:
        """As `extract`, of one batch."""
        return self._features(images).float().cpu().numpy()

    @torch.inference_mode()
    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self._processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        pixels = pixels.to(self._model.device)
        if isinstance(self._model, CLIPModel):
            return self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)
        return self._model(pixel_values=pixels).pooler_output


def load_features(folder: Path, label: str, device: torch.device) -> ImageFeatures:
    """The image encoder in a folder in the layout of Transformers, with safetensors and an image processor.

    Pillow scales and crops the images, as the processor's config says, even where torchvision is installed, which
    filters otherwise. The name is `label@revision`; the revision is the start of a hash of weights and configs, so it
    is the same for a folder and for the repository that it was copied from.

    Args:
        label: what people call the model, e.g. its repository on the hub.

    Raises:
        InputError: it isn't a DINOv2 or CLIP model, or a part of it is missing or damaged.
    """
    config = folder / "config.json"
    kind = read_json(config).get("model_type")
    if kind not in _ENCODERS:
        raise InputError(f"{config}: model_type = {kind!r} gives no features here; take one of {', '.join(_ENCODERS)}")
    model = load_frozen(_ENCODERS[kind], folder, device)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its image processor can't be loaded: {error}") from None
    return ImageFeatures(f"{label}@{_revision(folder)}", model, processor)


def load_frozen(kind: type[PreTrainedModel], folder: Path, device: torch.device) -> PreTrainedModel:
    """A model of Transformers from a local folder with safetensors, in fp32, frozen, in eval mode.

    Raises:
        InputError: its weights are missing, damaged, or lack some that the model has.
    """
    hide_progress_bars()
    try:
        model, found = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: its {kind.__name__} can't be loaded: {error}") from None
    if found["missing_keys"]:  # which Transformers would draw at random
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise InputError(
            f"{folder}: {len(found['missing_keys'])} weights of {kind.__name__} are missing, such as {missing}; "
            "take a folder that holds the whole model"
        )
    return model.requires_grad_(False).eval().to(device)


def _revision(folder: Path) -> str:
    names = ["config.json", "preprocessor_config.json", *(path.name for path in folder.glob("*.safetensors"))]
    return sha256_json({name: sha256_file(folder / name) for name in names if (folder / name).exists()})[:8]
