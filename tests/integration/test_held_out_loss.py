"""The questions of the held-out loss, asked of a real model."""

import pytest
import torch
from accelerate.state import AcceleratorState

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.models.parts import tokenize
from sdtrain.training.devices import build_accelerator
from sdtrain.training.trainer import build_trainer

SIZES = {"num_train_timesteps": 1000, "num_timesteps": 4, "max_samples": 3}


@pytest.fixture(scope="module")
def trainer(workspace, tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    params = workspace.make_params()
    return build_trainer(params, workspace.files(tmp_path_factory.mktemp("run")), build_accelerator(params.train))


@pytest.fixture
def shards(workspace):
    return LatentShards(workspace.latents, "validation", encoders_fingerprint(workspace.base))


def asked(trainer, shards, batch_size=12, **questions):
    held_out = HeldOut(shards, trainer.parts.vae.config.scaling_factor, batch_size=batch_size, **SIZES)
    return held_out.losses(trainer.method, trainer.scheduler, **questions)


@pytest.mark.parametrize(("batch_size", "num_captions"), [(12, [3]), (9, [2, 1]), (5, [1, 1, 1])])
def test_each_caption_is_encoded_once(trainer, shards, batch_size, num_captions):
    encoded = []
    hook = trainer.parts.text_encoder.register_forward_pre_hook(
        lambda module, arguments, keywords: encoded.append(arguments[0]), with_kwargs=True
    )
    try:
        losses = asked(trainer, shards, batch_size)
    finally:
        hook.remove()
    assert losses.shape == (3, 4)
    assert [len(ids) for ids in encoded] == num_captions


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_rounding_only(trainer, shards, batch_size):
    torch.testing.assert_close(asked(trainer, shards, batch_size), asked(trainer, shards), rtol=1e-5, atol=1e-7)


def test_a_caption_that_says_nothing_guides_nowhere(trainer, shards, monkeypatch):
    null_ids = tokenize(trainer.parts.tokenizer, [""])[0]
    read = LatentShards.read

    def read_first_without(self, index, *names, flipped=False):
        found = read(self, index, *names, flipped=flipped)
        return found | ({"input_ids": null_ids} if "input_ids" in found and self.ids[index] == held_out.ids[0] else {})

    for batch_size in (1, 3):
        held_out = HeldOut(shards, trainer.parts.vae.config.scaling_factor, batch_size=batch_size, **SIZES)
        captioned = held_out.guidance_magnitudes(trainer.method, trainer.scheduler, null_ids)
        assert captioned.min() > 0.01
        with monkeypatch.context() as patch:
            patch.setattr(LatentShards, "read", read_first_without)
            found = held_out.guidance_magnitudes(trainer.method, trainer.scheduler, null_ids)
        torch.testing.assert_close(found[1:], captioned[1:], rtol=1e-4, atol=0)
        assert found[0] < 1e-5


def test_the_loss_without_text_is_that_of_empty_captions(trainer, shards, monkeypatch):
    null_ids = tokenize(trainer.parts.tokenizer, [""])[0]
    without = asked(trainer, shards, null_ids=null_ids)
    assert (without - asked(trainer, shards)).abs().min() > 1e-6
    read = LatentShards.read

    def read_without(self, index, *names, flipped=False):
        found = read(self, index, *names, flipped=flipped)
        return found | ({"input_ids": null_ids} if "input_ids" in found else {})

    monkeypatch.setattr(LatentShards, "read", read_without)
    torch.testing.assert_close(without, asked(trainer, shards), rtol=1e-5, atol=1e-7)
