"""Runs that are wrong say so at their end: real trainings on the shapes world, long enough to tell."""

import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdtrain.export import export_model
from sdtrain.ground.errors import InputError
from sdtrain.precompute import precompute_latents
from tests.integration.conftest import Workspace

pytestmark = pytest.mark.full

GOOD = {
    "max_steps": 60, "batch_size": 16, "micro_batch_size": 16, "lr": 2e-3, "lr_warmup_steps": 5,
    "save_every_n_steps": 60, "log_every_n_steps": 5, "trackers": [],
}  # fmt: skip
VALIDATION = {"every_n_steps": 12, "num_timesteps": 4, "max_samples": 32, "prompts": []}


@pytest.fixture(scope="module")
def world(make_params, root, tmp_path_factory):
    changes = {"dataset": {"num_scenes": 400}, "validation": VALIDATION}
    return Workspace(tmp_path_factory.mktemp("world"), make_params, root, changes)


def told_by(world, out: Path, capsys, latents: Path | None = None, **train) -> str:
    world.train(out, latents=latents, train={**GOOD, **train})
    return capsys.readouterr().err


def test_a_good_run_says_nothing(world, tmp_path, capsys):
    assert "WARNING" not in told_by(world, tmp_path, capsys)


def test_a_learning_rate_100_times_too_low(world, tmp_path, capsys):
    told = told_by(world, tmp_path, capsys, lr=2e-5)
    assert "at the end as fast as at the start: a learning rate of 2e-05 is too low" in told


def test_a_learning_rate_100_times_too_high(world, tmp_path, capsys):
    with pytest.raises(InputError, match=r"stopped being finite between steps \d+ and \d+; .*: lower train.lr"):
        told_by(world, tmp_path, capsys, lr=0.2)


def test_captions_that_are_nearly_always_dropped(world, tmp_path, capsys):
    told = told_by(world, tmp_path, capsys, caption_dropout=0.999)
    assert "WARNING: train.caption_dropout = 0.999: training hardly saw a caption" in told


def test_captions_of_other_images(world, tmp_path, capsys):
    shutil.copytree(world.dataset, tmp_path / "dataset")
    for path in (tmp_path / "dataset").glob("*.parquet"):
        table = pq.read_table(path)
        captions = table.column("caption").to_pylist()
        random.Random(0).shuffle(captions)
        place = table.column_names.index("caption")
        pq.write_table(table.set_column(place, "caption", pa.array(captions)), path)
    params, latents = world.make_params(), tmp_path / "latents"
    precompute_latents(params.precompute, 0, world.base, tmp_path / "dataset", latents, tmp_path / "metrics.json")
    told = told_by(world, tmp_path, capsys, latents)
    assert "WARNING: the model ignores what it is told:\nthe model hardly uses the caption" in told


def test_images_learned_by_heart(make_params, root, tmp_path, capsys):
    """20 images, each seen some 300 times."""
    few = {"dataset": {"num_scenes": 80, "validation_fraction": 0.7}, "validation": VALIDATION | {"every_n_steps": 100}}
    world = Workspace(tmp_path / "world", make_params, root, few)
    run = world.train(tmp_path, train={**GOOD, "max_steps": 400})
    params = world.make_params(export={"checkpoint": "last", "weights": "raw"}, evaluate={"num_timesteps": 8})
    export_model(params.export, world.base, run.checkpoints, tmp_path / "model")
    numbers = world.evaluate(tmp_path / "model", tmp_path / "out", params)
    assert numbers["memorized_gain_ci_low"] > 0.05
    assert "WARNING: the model memorises: the loss of its training images is " in capsys.readouterr().err
