"""What `evaluate` draws and shows: sets beside real images, worst held-out images, nearest neighbours."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from sdtrain.data import scenes
from sdtrain.data.shards import LatentShards
from sdtrain.evaluation import image_comparison as module
from sdtrain.evaluation.clip_score import load_caption_features
from sdtrain.evaluation.drawn_images import DrawnImages, cropped_images
from sdtrain.evaluation.image_comparison import compare_images, load_judge
from sdtrain.evaluation.pictures import write_neighbors
from sdtrain.export import export_model
from sdtrain.features import resolve_features
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.ground.values import Values, read_values
from sdtrain.models.parts import load_parts
from sdtrain.params.schema import BUILTIN_CLIP
from tests.integration.conftest import Workspace

NONE = {"features": "none", "features_path": BUILTIN_CLIP, "nearest_neighbors": False}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, make_params, root):
    """A workspace on images in a folder, wider than high, half of them held out."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(24):
        scene = scenes.draw_scene(rng, new=False)
        image = scenes.render(scene, scenes.place(scene, rng))
        wide = Image.new("RGB", (96, 64))
        wide.paste(image, (16, 0))
        wide.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(scenes.caption(scene))
    own = {"source": "imagefolder", "path": str(folder), "validation_fraction": 0.5}
    knows_them = {"features_path": str(root / "data" / "builtin_clip")}  # as they show its world
    changes = {"dataset": own, "evaluate": knows_them}
    return Workspace(tmp_path_factory.mktemp("workspace"), make_params, root, changes)


@pytest.fixture(scope="module")
def photographs_model(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("photographs_model")
    run = photographs.train(out)
    export_model(photographs.make_params().export, photographs.base, run.checkpoints, out / "model")
    return out / "model"


def shards_of(workspace: Workspace, split: str) -> LatentShards:
    return LatentShards(workspace.latents, split, encoders_fingerprint(workspace.base))


def test_own_images_are_drawn_from_held_out_captions(photographs, photographs_model, tmp_path):
    photographs.evaluate(photographs_model, tmp_path, photographs.make_params(evaluate={"num_prompts": 5}))
    held_out = shards_of(photographs, "validation")
    captions = dict(zip(held_out.ids, held_out.captions, strict=True))
    table = read_values((tmp_path / "values.parquet").read_bytes(), "values.parquet")
    scores = table[table.metric == "clip_score_builtin_clip"]
    assert set(scores.model) == {"base", "trained", "real"}
    asked = dict(zip(scores.item, scores.text, strict=True))
    assert asked == {item: captions[item] for item in [held_out.ids[row] for row in held_out.chosen(5)]}
    numbers = read_json(tmp_path / "image_sets.json")
    assert numbers["num_drawn_images"] == 5
    mean = scores[scores.model == "trained"].value.mean()
    assert numbers["clip_score_builtin_clip_trained"] == pytest.approx(mean, rel=1e-5)


def test_the_worst_held_out_images_are_shown_as_the_vae_saw_them(photographs, photographs_model, tmp_path):
    metrics = photographs.evaluate(photographs_model, tmp_path, photographs.make_params())
    rows = read_json(tmp_path / "evaluation" / "worst.json")
    table = read_values((tmp_path / "values.parquet").read_bytes(), "values.parquet")
    losses = table[(table.metric == "held_out_loss") & (table.model == "trained")].groupby("item").value.mean()
    assert [row["item"] for row in rows] == losses.sort_values(ascending=False).index[:8].tolist()
    assert [row["loss_trained"] for row in rows] == pytest.approx([losses[row["item"]] for row in rows], rel=1e-5)
    assert np.mean(losses) == pytest.approx(metrics["held_out_loss_trained"], rel=1e-5)
    cropped = dict(cropped_images(shards_of(photographs, "validation"), photographs.dataset))
    for row in rows:
        image = Image.open(tmp_path / "evaluation" / row["image"])
        assert image.size == (64, 64)
        assert ImageChops.difference(image, cropped[row["item"]]).getbbox() is None


def test_without_an_encoder_nothing_is_drawn_of_own_images(photographs, photographs_model, tmp_path, monkeypatch):
    without = photographs.make_params(evaluate=NONE)
    resolve_features(without.evaluate, out=tmp_path / "features")
    monkeypatch.setattr(photographs, "features", tmp_path / "features")
    monkeypatch.setattr("sdtrain.evaluate.draw_held_out", lambda *_: pytest.fail("drew"))
    photographs.evaluate(photographs_model, tmp_path, without)
    assert read_json(tmp_path / "image_sets.json") == {}
    neighbors = read_json(tmp_path / "evaluation" / "neighbors.json")
    assert neighbors == {"features": None, "num_samples": 0, "threshold": None, "pairs": []}


# ---------------------------------------------------------------- of drawn images, without drawing them


def compared_with_training_images(workspace, images: DrawnImages, out, **changes) -> tuple[dict, dict]:
    params = workspace.make_params(evaluate=changes).evaluate
    out.mkdir(parents=True)
    train = shards_of(workspace, "train")
    judge = load_judge(workspace.features, load_parts(workspace.base).text_encoder)
    values = Values()
    compared = compare_images(params, 0, judge, images, train, workspace.dataset, values)
    write_neighbors(out, compared, images, train, workspace.dataset)
    values.write(out / "values.parquet")
    return compared.numbers, read_json(out / "neighbors.json")


def scene_images(seed: int, num: int) -> tuple[list[str], list[Image.Image]]:
    rng = np.random.default_rng(seed)
    drawn = [scenes.draw_scene(rng, new=bool(rng.random() < 0.8)) for _ in range(num)]
    return [scenes.caption(scene) for scene in drawn], [
        scenes.render(scene, scenes.place(scene, rng)) for scene in drawn
    ]


def test_a_model_that_copies_is_told_and_its_copies_are_shown(workspace, tmp_path, capsys):
    train = list(cropped_images(shards_of(workspace, "train"), workspace.dataset))[:50]
    captions, real = scene_images(1, 50)
    images = DrawnImages()
    copies = [image for _, image in train]
    images.add(
        [str(number) for number in range(50)], captions, real, {"base": scene_images(2, 50)[1], "trained": copies}
    )
    numbers, found = compared_with_training_images(workspace, images, tmp_path / "out")
    assert numbers["near_copy_share_builtin_clip_trained"] == 1
    assert numbers["near_copy_share_builtin_clip_base"] < 0.2
    assert "WARNING: the model copies: 100 % of what it draws" in capsys.readouterr().err
    table = read_values((tmp_path / "out" / "values.parquet").read_bytes(), "values.parquet")
    copied = table[table.metric == "near_copy_share_builtin_clip"].groupby("model").value
    assert copied.size().to_dict() == {"base": 50, "trained": 50}
    for name, share in copied.mean().items():
        assert share == pytest.approx(numbers[f"near_copy_share_builtin_clip_{name}"])
    assert len(found["pairs"]) == 8
    assert {pair["item"] for pair in found["pairs"]} <= {item for item, _ in train}
    for pair in found["pairs"]:
        sample, original = (Image.open(tmp_path / "out" / pair[name]) for name in ("sample", "train"))
        assert ImageChops.difference(sample, original).getbbox() is None
        assert pair["ratio"] == 0
    assert found["features"].startswith("builtin_clip@")
    assert found["num_samples"] == 50
    assert found["threshold"] > 0


def test_with_few_held_out_images_the_nearest_are_shown_without_a_verdict(workspace, tmp_path, capsys):
    train = [image for _, image in cropped_images(shards_of(workspace, "train"), workspace.dataset)][:24]
    captions, real = scene_images(1, 24)
    images = DrawnImages()
    images.add([str(number) for number in range(24)], captions, real, {"base": real, "trained": train})
    numbers, found = compared_with_training_images(workspace, images, tmp_path / "out")
    assert [name for name in numbers if "copy" in name] == []
    assert "WARNING" not in capsys.readouterr().err
    assert (found["threshold"], len(found["pairs"])) == (None, 8)
    assert {pair["ratio"] for pair in found["pairs"]} == {0}


def test_the_shipped_encoder_is_not_asked_about_other_worlds(
    photographs, photographs_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sdtrain.evaluate.draw_held_out", lambda *_: pytest.fail("drew"))
    photographs.evaluate(photographs_model, tmp_path, photographs.make_params(evaluate={"features_path": BUILTIN_CLIP}))
    assert "no images are drawn: data/builtin_clip knows generated scenes only" in capsys.readouterr().out
    assert read_json(tmp_path / "image_sets.json") == {}


def test_neighbours_can_be_left_out(workspace, tmp_path, monkeypatch):
    captions, real = scene_images(1, 24)
    images = DrawnImages()
    images.add([str(number) for number in range(24)], captions, real, {"base": real, "trained": real})
    monkeypatch.setattr(module, "nearest_neighbors", lambda *_: pytest.fail("compared"))
    numbers, found = compared_with_training_images(workspace, images, tmp_path / "out", nearest_neighbors=False)
    assert found["pairs"] == []
    assert [name for name in numbers if "copy" in name] == []
    assert "mmd_rbf_builtin_clip_trained" in numbers


def test_a_model_is_not_judged_by_its_own_text_encoder(workspace):
    """Told before anything is drawn, also where one of the two is in half precision."""
    own = load_caption_features(workspace.features, torch.device("cpu"))._model.text_model.half()
    with pytest.raises(InputError, match=r"evaluate.features: builtin_clip@\w+ has the base's own text encoder"):
        load_judge(workspace.features, own)


def test_wrong_captions_score_lower(workspace, tmp_path):
    captions, real = scene_images(1, 24)
    images = DrawnImages()
    other = scene_images(3, 24)[1]
    images.add([str(number) for number in range(24)], captions, real, {"base": other, "trained": real})
    numbers, _ = compared_with_training_images(workspace, images, tmp_path / "out", nearest_neighbors=False)
    assert numbers["clip_score_builtin_clip_trained"] == numbers["clip_score_builtin_clip_real"]
    assert numbers["clip_score_builtin_clip_trained"] > numbers["clip_score_builtin_clip_base"] + 10
