"""CLIPScore: how well an image fits its caption, by a CLIP model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from sdtrain.evaluation.features import load_frozen
from sdtrain.ground.errors import InputError

_LEGACY_EOS = 2
"""What OpenAI's configs say wrongly; Transformers then takes the highest id of a caption for the end token."""


def clip_score(image_embeds: np.ndarray, text_embeds: np.ndarray) -> np.ndarray:
    """100 · max(cos, 0) of each image with its caption, float64 [N], from embeddings [N, d] of any length.

    Hessel et al. 2021, "CLIPScore", but for the scale: theirs is 2.5 · max(cos, 0), libraries report 100 · max(cos, 0).
    Scores by different CLIP models can't be compared.
    """
    assert image_embeds.shape == text_embeds.shape, f"got {image_embeds.shape} and {text_embeds.shape}"
    images, texts = image_embeds.astype(np.float64), text_embeds.astype(np.float64)
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return 100 * np.maximum((images * texts).sum(axis=1) / lengths, 0)


class CaptionFeatures:
    """The text's part of a CLIP model, on one device."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer

    def extract(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Projected embeddings, float32 [len(captions), d].

        Of a caption that is longer than the model's context, of 77 tokens as a rule, the end is cut off before the end
        token, at which CLIP reads the embedding.
        """
        batches = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
        return np.concatenate([self._features(batch).float().cpu().numpy() for batch in batches])

    def is_same_text_encoder(self, other: CLIPTextModel) -> bool:
        """Whether another text encoder has the same token embeddings, but for rounding to 16 bits."""
        own, its = (encoder.get_input_embeddings().weight.float().cpu() for encoder in (self._model.text_model, other))
        return own.shape == its.shape and torch.allclose(own, its, rtol=1e-2, atol=1e-4)

    @torch.inference_mode()
    def _features(self, captions: Sequence[str]) -> Tensor:
        # No mask is needed: attention is causal, and padding follows the end token.
        ids = self._tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        pooled = self._model.text_model(input_ids=ids.to(self._model.device)).pooler_output
        return self._model.text_projection(pooled)


def load_caption_features(folder: Path, device: torch.device) -> CaptionFeatures:
    """The text's part of the CLIP model in a folder in the layout of Transformers, with safetensors and a tokenizer.

    Its image's part is `features.load_features` of the same folder.

    Raises:
        InputError: a part of it is missing or damaged, or its tokenizer belongs to another model.
    """
    model = load_frozen(CLIPModel, folder, device)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its tokenizer can't be loaded: {error}") from None
    text = model.config.text_config
    expected = text.vocab_size - 1 if text.eos_token_id == _LEGACY_EOS else text.eos_token_id
    if tokenizer.eos_token_id != expected:
        raise InputError(
            f"{folder}: the tokenizer ends captions with token {tokenizer.eos_token_id}, the model of config.json "
            f"expects {expected}; embeddings would be read at the wrong place; take the model's own tokenizer"
        )
    return CaptionFeatures(model, tokenizer)
