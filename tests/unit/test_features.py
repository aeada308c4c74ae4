"""Features of images and captions, by tiny random encoders in the layout of Transformers, saved here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from sdtrain.evaluation.clip_score import clip_score, load_caption_features
from sdtrain.evaluation.features import load_features
from sdtrain.ground.errors import InputError
from tests.conftest import ROOT

CPU = torch.device("cpu")
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
BEGIN, END = 618, 619
"""Of the built-in tokenizer."""


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**LAYERS, image_size=28, patch_size=14)).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**LAYERS, "intermediate_size": 64, "vocab_size": 620, "bos_token_id": BEGIN, "eos_token_id": END}
    vision = {**LAYERS, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(ROOT / "data" / "builtin" / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(request, tmp_path) -> Path:
    """A copy, to be damaged, of the folder whose fixture's name is the parameter."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / request.param)


def pictures(num: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + 8 * i, 64, 3), dtype=np.uint8)) for i in range(num)]


# ---------------------------------------------------------------- images


def test_dinov2_features_are_its_class_token_of_the_cropped_picture(dino):
    """The shorter side is scaled to 32 px by Pillow, the middle 28 px are kept."""
    picture = pictures(1)[0]  # 64 × 40
    scaled = picture.resize((51, 32), Image.Resampling.BICUBIC).crop((11, 2, 39, 30))
    pixels = (np.asarray(scaled) / 255 - MEAN) / STD
    model = Dinov2Model.from_pretrained(dino)
    with torch.no_grad():
        hidden = model(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)).last_hidden_state
    found = load_features(dino, "tiny", CPU).extract([picture], batch_size=1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, hidden[:, 0].numpy(), rtol=0, atol=1e-5)


def test_clip_features_are_its_image_embeddings(clip):
    model = CLIPModel.from_pretrained(clip)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(pictures(3), return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = model(input_ids=torch.tensor([[BEGIN, END]]), pixel_values=pixels).image_embeds
    found = load_features(clip, "tiny", CPU).extract(pictures(3), batch_size=3)
    assert found.shape == (3, 24)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(found / lengths, embeds.numpy(), rtol=0, atol=1e-6)
    assert abs(lengths - 1).min() > 0.01, "not scaled to unit length"


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_neither_batch_size_nor_order_matters(kind, request):
    encoder, images = load_features(request.getfixturevalue(kind), "tiny", CPU), pictures(5)
    whole = encoder.extract(images, batch_size=5)
    np.testing.assert_allclose(encoder.extract(images, batch_size=2), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.extract(images[::-1], batch_size=3)[::-1], whole, rtol=0, atol=1e-5)
    assert np.ptp(whole, axis=0).max() > 0.01, "the pictures differ"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_are_read_as_rgb(dino, mode):
    encoder, image = load_features(dino, "tiny", CPU), pictures(1)[0].convert(mode)
    assert (encoder.extract([image], 1) == encoder.extract([image.convert("RGB")], 1)).all()


def test_the_name_is_the_same_for_a_copy_and_another_after_any_change(dino, tmp_path):
    name = load_features(dino, "org/tiny", CPU).name
    assert name.startswith("org/tiny@")

    copied = shutil.copytree(dino, tmp_path / "copied")
    (copied / "README.md").write_text("A copy.")
    assert load_features(copied, "org/tiny", CPU).name == name

    weights = load_file(copied / "model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert load_features(copied, "org/tiny", CPU).name != name

    cropped = shutil.copytree(dino, tmp_path / "cropped")
    config = json.loads((cropped / "preprocessor_config.json").read_text())
    (cropped / "preprocessor_config.json").write_text(json.dumps({**config, "size": {"shortest_edge": 40}}))
    assert load_features(cropped, "org/tiny", CPU).name != name


def test_half_precision_files_are_loaded_in_full_precision(dino, tmp_path):
    Dinov2Model.from_pretrained(dino).half().save_pretrained(tmp_path)
    shutil.copy(dino / "preprocessor_config.json", tmp_path)
    found = load_features(tmp_path, "tiny", CPU).extract(pictures(2), 2)
    assert (found != found.astype(np.float16)).any()


@pytest.mark.parametrize("copy", ["dino", "clip"], indirect=True)
def test_missing_weights_are_refused_not_drawn(copy):
    weights = load_file(copy / "model.safetensors")
    gone = {"layernorm.weight", "visual_projection.weight"} & set(weights)
    save_file(
        {name: w for name, w in weights.items() if name not in gone}, copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=f"1 weights of .* are missing, such as {gone.pop()}"):
        load_features(copy, "tiny", CPU)


@pytest.mark.parametrize("copy", ["dino"], indirect=True)
def test_pickled_weights_are_refused(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="Dinov2Model can't be loaded: .*model.safetensors"):
        load_features(copy, "tiny", CPU)


@pytest.mark.parametrize("copy", ["dino"], indirect=True)
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", '{"model_type": "vit"}', "model_type = 'vit' gives no features here; take one of dinov2, clip"),
        ("preprocessor_config.json", None, "image processor can't be loaded"),
        ("model.safetensors", "damaged", "Dinov2Model can't be loaded"),
    ],
)
def test_other_and_damaged_folders_are_refused(copy, file, content, message):
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(InputError, match=message):
        load_features(copy, "tiny", CPU)


# ---------------------------------------------------------------- captions


def test_long_captions_keep_the_end_token(clip):
    """torchmetrics cuts the ids at 77, end token included, and so reads the embedding of the first token."""
    words = " ".join(["red circle blue square"] * 30)
    tokenizer, model = CLIPTokenizer.from_pretrained(clip), CLIPModel.from_pretrained(clip)
    ids = tokenizer(words).input_ids
    assert len(ids) > 77

    def embed(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model.text_projection(model.text_model(input_ids=torch.tensor([ids])).pooler_output).numpy()

    found = load_caption_features(clip, CPU).extract([words], batch_size=1)
    np.testing.assert_allclose(found, embed([*ids[:76], END]), rtol=0, atol=1e-6)
    assert abs(found - embed(ids[:77])).max() > 0.01


def test_captions_do_not_depend_on_the_length_of_others(clip):
    features, captions = load_caption_features(clip, CPU), ["a red circle", "a circle " * 60, ""]
    together, alone = (features.extract(captions, batch_size=size) for size in (3, 1))
    assert together.shape == (3, 24)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    assert abs(together[0] - together[1]).max() > 0.01


def set_text(folder: Path, **values: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("copy", ["clip"], indirect=True)
def test_openais_wrong_end_token_is_understood(copy, clip):
    set_text(copy, eos_token_id=2)
    captions = ["a red circle", "a blue square " * 60]
    found, expected = (load_caption_features(folder, CPU).extract(captions, 2) for folder in (copy, clip))
    assert (found == expected).all()


@pytest.mark.parametrize("copy", ["clip"], indirect=True)
@pytest.mark.parametrize("eos", [2, 600])
def test_another_models_tokenizer_is_refused(copy, eos):
    tokenizer = CLIPTokenizer.from_pretrained(copy)
    tokenizer.eos_token = "red</w>"
    tokenizer.save_pretrained(copy)
    set_text(copy, eos_token_id=eos)
    expected = {2: END, 600: 600}[eos]
    with pytest.raises(
        InputError, match=f"ends captions with token [0-9]+, the model of config.json expects {expected}"
    ):
        load_caption_features(copy, CPU)


@pytest.mark.parametrize("copy", ["clip"], indirect=True)
@pytest.mark.parametrize("eos", [2, END])
def test_a_folder_without_a_tokenizer_is_refused(copy, eos):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    set_text(copy, eos_token_id=eos)
    with pytest.raises(InputError, match="tokenizer"):
        load_caption_features(copy, CPU)


def test_clip_score_by_hand():
    """The cosine of any lengths, in percent; opposite ones score 0 as unrelated ones do."""
    images = np.array([[2.0, 0], [1, 1], [0, 1], [3, 4]], dtype=np.float32)
    texts = np.array([[5.0, 0], [1, 0], [0, -1], [4, -3]], dtype=np.float32)
    np.testing.assert_allclose(clip_score(images, texts), [100, 100 / 2**0.5, 0, 0])
