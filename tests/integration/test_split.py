"""A test split: what is decided on validation images is reported on others."""

import json

import pytest
import torch

from sdtrain.data.shards import LatentShards, read_dataset
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.export import export_model
from sdtrain.ground.manifests import SPLITS, TEST, encoders_fingerprint
from sdtrain.ground.values import read_values
from sdtrain.methods.checkpoints import load_checkpoint
from sdtrain.models.parts import load_vae
from tests.integration.conftest import Workspace

METRICS_OF_TRAINING_IMAGES = {"train_loss", "guidance_magnitude_train"}


@pytest.fixture(scope="module")
def tested(tmp_path_factory, make_params, root) -> Workspace:
    """As the shrunken default, with a test split."""
    return Workspace(tmp_path_factory.mktemp("tested"), make_params, root, {"dataset": {"test_fraction": 0.2}})


def shards_of(place: Workspace, split: str) -> LatentShards:
    return LatentShards(place.latents, split, encoders_fingerprint(place.base))


def test_the_cache_holds_the_test_images_and_leaves_validation_as_it_is(tested, workspace):
    rows = list(read_dataset(tested.dataset, TEST))
    assert len(rows) > 4
    shards = {split: shards_of(tested, split) for split in (*SPLITS, TEST)}
    assert shards[TEST].ids == [row["id"] for row in rows]
    assert shards[TEST].captions == [row["caption"] for row in rows]
    assert sorted(shards["train"].ids + shards[TEST].ids) == sorted(shards_of(workspace, "train").ids)
    validation = shards_of(workspace, "validation")
    assert shards["validation"].ids == validation.ids
    for row in range(len(validation)):
        assert torch.equal(shards["validation"].read(row, "mean")["mean"], validation.read(row, "mean")["mean"])


def test_the_best_is_chosen_on_validation_and_reported_on_test_images(tested, tmp_path, capsys):
    params = tested.make_params(validation={"max_samples": 100})
    run = tested.train(tmp_path, train={"max_steps": 2}, validation={"max_samples": 100})
    method, scheduler, config = load_checkpoint(run.checkpoints / "best", "ema", tested.base)
    validation = shards_of(tested, "validation")
    assert config["num_validation"] == len(validation)
    questions = HeldOut(
        validation,
        load_vae(tested.base).config.scaling_factor,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        num_timesteps=params.validation.num_timesteps,
        max_samples=100,
        batch_size=16,
    )
    loss = questions.losses(method, scheduler).mean().item()
    assert json.loads(run.metrics.read_text())["best_validation_loss"] == pytest.approx(loss, rel=1e-4)

    export_model(params.export, tested.base, run.checkpoints, tmp_path / "model")
    numbers = tested.evaluate(tmp_path / "model", tmp_path, params, run.checkpoints)
    test, train = shards_of(tested, TEST), shards_of(tested, "train")
    assert numbers["num_held_out"] == len(test)
    assert f"held-out images: {len(test)} of the test split" in capsys.readouterr().out
    values = read_values((tmp_path / "values.parquet").read_bytes(), "values.parquet")
    of_images = values[~values.metric.str.contains("_accuracy|clip_score|near_copy")]  # of drawn ones
    of_training = of_images.metric.isin(METRICS_OF_TRAINING_IMAGES)
    assert {*of_images[~of_training].item} == {*test.ids}
    assert {*of_images[of_training].item} < {*train.ids}
    captions = dict(zip(test.ids, test.captions, strict=True))
    losses = of_images[of_images.metric == "held_out_loss"]
    assert losses.text.tolist() == [captions[item] for item in losses.item]
    assert numbers["held_out_loss_trained"] != pytest.approx(loss, rel=1e-3)
