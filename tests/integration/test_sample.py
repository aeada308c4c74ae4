"""Images to compare: which are drawn, that each is what its model draws, and where they stand."""

import numpy as np
import pytest
from PIL import Image

from sdtrain.export import export_model
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import write_json
from sdtrain.ground.samples import Samples
from sdtrain.methods.checkpoints import load_checkpoint
from sdtrain.models.pipelines import generate
from sdtrain.models.trained import load_base_pipeline, load_model
from sdtrain.params.schema import SampleParams
from tests.integration.test_resume import files_of

CELL_PX, MARGIN_PX = 128, 8


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory):
    """With two best checkpoints, of which the best is the last."""
    return workspace.train(tmp_path_factory.mktemp("run"), train={"num_best_checkpoints": 2})


@pytest.fixture(scope="module")
def model(workspace, run, tmp_path_factory):
    """The raw weights: those of the checkpoints are averaged."""
    out = tmp_path_factory.mktemp("model") / "model"
    export_model(workspace.make_params(export={"weights": "raw"}).export, workspace.base, run.checkpoints, out)
    return out


@pytest.fixture(scope="module")
def params(workspace) -> SampleParams:
    changes = {"images_per_prompt": 2, "guidance_scales": [4.0, 1.5], "checkpoints": ["last"]}
    return workspace.make_params(sample=changes).sample


@pytest.fixture(scope="module")
def out(workspace, run, model, params, tmp_path_factory):
    """The folder in which `samples` are."""
    out = tmp_path_factory.mktemp("out")
    workspace.sample(model, out, params, checkpoints=run.checkpoints)
    return out


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_file_is_listed_under_a_name_that_says_what_it_shows(out, params):
    samples = Samples.read(out / "samples")
    assert sorted(files_of(out / "samples")) == sorted(
        ["grid.png", "grid-guidance-1.5.png", "samples.json", *(image.file for image in samples.drawn)]
    )
    assert samples.given == []
    assert samples.texts == params.prompts
    assert samples.models == ["base", "trained", "last"]
    assert [image.file for image in samples.drawn if image.model == "last"] == [
        f"images/{row:02}-last-guidance{scale}-seed{seed}.png"
        for scale in (4, 1.5)
        for row in (0, 1)
        for seed in (0, 1)
    ]
    image = next(image for image in samples.drawn if image.file == "images/01-trained-guidance1.5-seed1.png")
    expected = {"prompt": 1, "text": params.prompts[1], "item": None, "light": None, "model": "trained", "seed": 1}
    assert image.model_dump() == {"file": image.file, "guidance_scale": 1.5, **expected}


@pytest.mark.parametrize("name", ["base", "trained", "last"])
@pytest.mark.parametrize("scale", [4.0, 1.5])
def test_an_image_is_what_its_model_draws(workspace, run, model, params, out, name, scale):
    if name == "last":
        method, scheduler, _ = load_checkpoint(run.checkpoints / "last", "ema", workspace.base)
        pipeline = method.pipeline(scheduler)
    else:
        pipeline = load_base_pipeline(workspace.base) if name == "base" else load_model(model, workspace.base)
    images = generate(
        pipeline,
        [prompt for prompt in params.prompts for _ in range(2)],
        [0, 1, 0, 1],
        num_inference_steps=params.num_inference_steps,
        guidance_scale=scale,
        batch_size=params.batch_size,
    )
    listed = [
        image for image in Samples.read(out / "samples").drawn if (image.model, image.guidance_scale) == (name, scale)
    ]
    assert len(listed) == len(images)
    for entry, image in zip(listed, images, strict=True):
        assert np.array_equal(pixels(out / "samples" / entry.file), image), entry.file
        assert (entry.prompt, entry.seed) == divmod(listed.index(entry), 2)


@pytest.mark.parametrize(("grid", "scale"), [("grid.png", 4.0), ("grid-guidance-1.5.png", 1.5)])
def test_a_grid_has_a_column_for_each_model(out, grid, scale):
    whole, samples = pixels(out / "samples" / grid), Samples.read(out / "samples")
    places = {"base": 0, "trained": 1, "last": 2}
    assert whole.shape[1] == 3 * (2 * (CELL_PX + MARGIN_PX) + 2 * MARGIN_PX)
    for image in (image for image in samples.drawn if image.guidance_scale == scale and image.prompt == 0):
        left = MARGIN_PX + places[image.model] * (whole.shape[1] // 3) + image.seed * (CELL_PX + MARGIN_PX)
        column = whole[:, left : left + CELL_PX]
        cell = pixels(out / "samples" / image.file).repeat(2, axis=0).repeat(2, axis=1)
        assert any(np.array_equal(column[top : top + CELL_PX], cell) for top in range(60)), image.file


def test_the_same_samples_twice_are_the_same_bytes(workspace, run, model, params, out, tmp_path):
    workspace.sample(model, tmp_path, params, checkpoints=run.checkpoints)
    assert files_of(tmp_path / "samples") == files_of(out / "samples")


def test_the_first_scale_without_checkpoints_draws_the_same_images(workspace, model, params, out, tmp_path):
    plain = params.model_copy(update={"guidance_scales": [4.0], "checkpoints": []})
    workspace.sample(model, tmp_path, plain)
    ours, theirs = (files_of(place / "samples") for place in (tmp_path, out))
    names = [name for name in ours if name.startswith("images/")]
    assert len(names) == 8
    assert [name for name in names if ours[name] != theirs[name]] == []


def test_a_checkpoint_that_was_exported_is_not_drawn_again(workspace, run, params, tmp_path, capsys):
    export_model(workspace.make_params().export, workspace.base, run.checkpoints, tmp_path / "model")
    asked = params.model_copy(update={"checkpoints": ["best", "best-2"]})
    samples = workspace.sample(tmp_path / "model", tmp_path, asked, checkpoints=run.checkpoints)
    assert samples.models == ["base", "trained", "best-2"]
    assert "best isn't drawn: it is trained, ema weights of step 4\n" in capsys.readouterr().out


def test_a_checkpoint_that_another_one_equals_is_drawn_once(workspace, run, model, params, tmp_path, capsys):
    asked = params.model_copy(update={"checkpoints": ["last", "best"]})
    samples = workspace.sample(model, tmp_path, asked, checkpoints=run.checkpoints)
    assert samples.models == ["base", "trained", "last"]
    assert capsys.readouterr().out == "best isn't drawn: it is last, ema weights of step 4\n"


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(workspace, run, model, params, tmp_path):
    asked = params.model_copy(update={"checkpoints": ["last", "best-3"]})
    with pytest.raises(InputError, match=r"checkpoints has no 'best-3', but best, best-2, last; list those"):
        workspace.sample(model, tmp_path, asked, checkpoints=run.checkpoints)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (None, r"samples\.json: no such file; run `dvc repro sample`"),
        ({"drawn": [{}], "given": []}, r"samples\.json: drawn\.0\.file: Field required; run `dvc repro sample`"),
    ],
)
def test_a_list_that_cannot_be_read_is_explained(tmp_path, tree, message):
    if tree is not None:
        write_json(tmp_path / "samples.json", tree)
    with pytest.raises(InputError, match=message):
        Samples.read(tmp_path)
