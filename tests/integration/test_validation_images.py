"""The images of a run's validations: what is written, also of a run that was killed, resumed, or asked for others."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain import train as train_module
from sdtrain.data.shards import LatentShards, held_out_pictures
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.methods.checkpoints import load_checkpoint
from sdtrain.models.pipelines import generate
from sdtrain.training.images import folder_names
from tests.integration.test_resume import OPEN, STEPS, files_of, killed_in, stopped_after

PROMPTS = ["A red circle!", "a large orange star"]
FOLDERS = ["0-a-red-circle", "1-a-large-orange-star"]
DRAWN = {"prompts": PROMPTS, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped, without trackers."""
    out = tmp_path_factory.mktemp("whole")
    workspace.train(out, train={**STEPS, "trackers": []}, validation=DRAWN)
    return out


def test_each_prompt_has_an_image_of_each_validation(whole):
    names = [f"{folder}/{step}.png" for folder in FOLDERS for step in (2, 4, 6)]
    assert sorted(files_of(whole / "validation")) == sorted(names)
    for folder, prompt in zip(FOLDERS, PROMPTS, strict=True):
        with Image.open(whole / "validation" / folder / "4.png") as image:
            assert image.info["prompt"] == prompt


def test_the_last_is_what_the_last_checkpoint_draws(workspace, whole):
    method, scheduler, config = load_checkpoint(whole / "checkpoints" / "last", "ema", workspace.base)
    assert config["step"] == 6
    scale = workspace.make_params().validation.guidance_scale
    settings = {"num_inference_steps": 2, "guidance_scale": scale, "batch_size": 64}
    images = generate(method.pipeline(scheduler), PROMPTS, [0, 1], **settings)
    for folder, image in zip(FOLDERS, images, strict=True):
        with Image.open(whole / "validation" / folder / "6.png") as written:
            assert np.abs(np.asarray(written).astype(int) - np.asarray(image)).max() <= 1, "fused in another order"


@pytest.mark.parametrize("steps", [1, 5])
def test_a_run_that_was_stopped_has_the_same_images(workspace, whole, tmp_path, monkeypatch, steps):
    with monkeypatch.context() as patch:
        stopped_after(patch, steps)
        with pytest.raises(SystemExit):
            workspace.train(tmp_path, train=STEPS, validation=DRAWN)
    assert not (tmp_path / "validation").exists()
    workspace.train(tmp_path, train=STEPS, validation=DRAWN)
    assert files_of(tmp_path / "validation") == files_of(whole / "validation")


@pytest.mark.parametrize(("function", "call"), [("save", 2), ("keep_images", 2), ("write_images", 1)])
def test_a_run_that_was_killed_has_the_same_images(workspace, whole, tmp_path, monkeypatch, function, call):
    with monkeypatch.context() as patch:
        killed_in(patch, function, call)
        with pytest.raises(MemoryError):
            workspace.train(tmp_path, train=STEPS, validation=DRAWN)
    workspace.release_locks()
    workspace.train(tmp_path, train=STEPS, validation=DRAWN)
    assert files_of(tmp_path / "validation") == files_of(whole / "validation")


def test_a_longer_run_has_no_image_of_the_shorter_ones_end(workspace, tmp_path):
    for num_steps, steps in ((5, [2, 4, 5]), (6, [2, 4, 6])):
        workspace.train(tmp_path, train={**OPEN, "max_steps": num_steps}, validation=DRAWN)
        names = [f"{folder}/{step}.png" for folder in FOLDERS for step in steps]
        assert sorted(files_of(tmp_path / "validation")) == sorted(names)


def test_other_prompts_after_the_end_draw_the_last_step_alone(workspace, whole, tmp_path, monkeypatch, capfd):
    """Nothing is trained for them; and the first prompts' other images are still there."""
    shutil.copytree(whole / "resume", tmp_path / "resume")
    monkeypatch.setattr(train_module, "optimizer_step", lambda *_: pytest.fail("it trains again"))
    other = {**DRAWN, "prompts": PROMPTS[::-1][:1]}
    workspace.train(tmp_path, train=STEPS, validation=other)
    assert list(files_of(tmp_path / "validation")) == ["0-a-large-orange-star/6.png"]
    assert "has no images of step 2, 4: other prompts or settings were drawn there" in capfd.readouterr().out
    workspace.train(tmp_path, train=STEPS, validation=DRAWN)
    assert files_of(tmp_path / "validation") == files_of(whole / "validation")


def test_a_damaged_image_is_left_out_and_named(workspace, whole, tmp_path, capfd):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    (image,) = (tmp_path / "resume").glob("*/images/step-00000004/1.png")
    os.truncate(image, 100)
    workspace.train(tmp_path, train=STEPS, validation=DRAWN)
    assert sorted(files_of(tmp_path / "validation")) == [
        f"{folder}/{step}.png" for folder in FOLDERS for step in (2, 6)
    ]
    assert "has no images of step 4" in capfd.readouterr().out


def test_without_prompts_the_folder_is_empty(workspace, tmp_path):
    workspace.train(tmp_path, train={"max_steps": 1})
    assert list((tmp_path / "validation").iterdir()) == []
    assert not list((tmp_path / "resume").glob("*/images"))


def test_held_out_captions_name_the_folders(hinted, tmp_path):
    asked = {"num_held_out": 2, "num_inference_steps": 2}
    hinted.train(tmp_path, train={"max_steps": 1}, validation=asked)
    captions, _ = held_out_pictures(
        LatentShards(hinted.latents, "validation", encoders_fingerprint(hinted.base)), (), 2
    )
    assert sorted(files_of(tmp_path / "validation")) == sorted(f"{name}/1.png" for name in folder_names(captions))


def test_folder_names_are_safe_and_differ():
    prompts = ["a cat", "A cat?", "../../etc/passwd", "猫", "Übergröße, café", "", "x" * 300, "CON", "a\n\tb "]
    assert folder_names(prompts) == [
        "0-a-cat", "1-a-cat", "2-etc-passwd", "3", "4-ubergroe-cafe", "5", f"6-{'x' * 58}", "7-con", "8-a-b",
    ]  # fmt: skip
