"""What the plan says of a data set with conditions, before and after it is made."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from sdtrain.dataset import build_dataset
from sdtrain.ground.files import read_json
from sdtrain.ground.manifests import DatasetManifest
from sdtrain.params.schema import DatasetParams, Params
from sdtrain.tools.plan.images import ask_source, count_images
from sdtrain.tools.plan.made import Made, find_made
from sdtrain.tools.plan.sizes import folder_bytes
from sdtrain.training.files import TrainFiles
from tests.unit.test_conditions import NUM, beside, in_parquet, in_tars, listed, listed_and_beside

NOTHING_MADE = Made(base=False, dataset=False, latents=False, stale=[])


@pytest.fixture
def params_of(tmp_path, make_params):
    """A function from fields of the section `dataset` to its params, without those of the method that they are for."""
    shipped = make_params().dataset.model_dump() | {"path": str(tmp_path / "in"), "validation_fraction": 0.5}
    return lambda **fields: DatasetParams.model_validate(shipped | fields)


@pytest.mark.parametrize("write", [listed, beside, listed_and_beside, in_parquet, in_tars])
def test_files_of_hints_are_no_images(write, tmp_path, params_of):
    assert ask_source(params_of(**write(tmp_path / "in")), seed=0).num_images == NUM


@pytest.mark.parametrize("write", [listed, beside])
def test_files_of_hints_are_in_the_bytes(write, tmp_path, params_of):
    params = params_of(**write(tmp_path / "in"))
    files = [path for path in (tmp_path / "in").rglob("*") if path.suffix in (".png", ".bmp")]
    assert len(files) == 2 * NUM
    assert ask_source(params, seed=0).num_bytes == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("world", ["shapes", "free_shapes"])
def test_drawn_hints_are_in_the_bytes(world, tmp_path, params_of):
    params = params_of(num_scenes=200, world=world, condition_columns={"hint": "outline"})
    planned = count_images(params, 0, tmp_path / "no", tmp_path / "no", NOTHING_MADE)
    build_dataset(params, 0, tmp_path / "out", tmp_path / "metrics.json")
    assert planned.num_bytes == pytest.approx(folder_bytes(tmp_path / "out"), rel=0.05)


def test_images_of_a_test_split_are_planned_and_counted(tmp_path, params_of):
    params = params_of(num_scenes=200, validation_fraction=0.2, test_fraction=0.3)
    places = tmp_path / "no", tmp_path / "out"
    planned = count_images(params, 0, *places, NOTHING_MADE)
    assert (planned.num_train, planned.num_validation, planned.num_test) == (100, 40, 60)
    build_dataset(params, 0, tmp_path / "out", tmp_path / "metrics.json")
    counted = count_images(params, 0, *places, replace(NOTHING_MADE, dataset=True))
    metrics = read_json(tmp_path / "metrics.json")
    assert counted.num_train == metrics["num_train"]
    assert (counted.num_validation, counted.num_test) == (metrics["num_validation"], metrics["num_test"])
    assert planned.num_all == counted.num_all == 200
    assert planned.num_bytes == pytest.approx(counted.num_bytes, rel=0.1)


def made_for(params: Params, dataset: DatasetParams, folder: Path) -> Made:
    files = TrainFiles(*(folder / "nothing" for _ in fields(TrainFiles)))
    return find_made(params.model_copy(update={"dataset": dataset}), files, folder / "out")


@pytest.mark.parametrize(
    ("made", "asked", "fault"),
    [
        ({}, {}, None),
        ({"world": "free_shapes"}, {"world": "free_shapes"}, None),
        ({"world": "free_shapes"}, {}, "was made from another source"),
        ({}, {"world": "free_shapes"}, "was made from another source"),
        (
            {"world": "free_shapes", "new_fraction": 0.4},
            {"world": "free_shapes", "new_fraction": 0.5},
            "was made from another source",
        ),
        ({"condition_columns": {"hint": "outline"}}, {"condition_columns": {"hint": "outline"}}, None),
        ({}, {"condition_columns": {"hint": "outline"}}, "was made with other conditions"),
        ({"condition_columns": {"hint": "outline"}}, {}, "was made with other conditions"),
    ],
)
def test_a_data_set_of_another_world_or_without_the_hints_is_out_of_date(
    made, asked, fault, tmp_path, params_of, make_params
):
    build_dataset(params_of(num_scenes=20, **made), 0, tmp_path / "out", tmp_path / "metrics.json")
    found = made_for(make_params(), params_of(num_scenes=20, **asked), tmp_path)
    assert found.dataset is (fault is None)
    expected = [] if fault is None else [f"{tmp_path / 'out'} {fault}; `dvc repro dataset` remakes it"]
    assert found.stale == expected
    assert DatasetManifest.read(tmp_path / "out").source["generated"] == 20
