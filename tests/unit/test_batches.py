"""What a training step sees depends on (seed, step, position) alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from sdtrain.data.batches import BatchMaker
from sdtrain.params.load import check_params
from tests.conftest import shrunk_tree

CPU = torch.device("cpu")
NULL = torch.full((4,), -1)


class Shards:
    """Stands in for LatentShards: row i has mean i, a spread of `std`, and the flipped image's mean is -i."""

    def __init__(self, num_rows: int, std: float = 0.0, has_flipped: bool = False) -> None:
        self.num_rows, self.has_flipped = num_rows, has_flipped
        self.logvar = 2 * np.log(std) if std else -60.0

    def __len__(self) -> int:
        return self.num_rows

    def check_columns(self, columns: dict) -> None:
        assert not columns

    def read(self, index: int, *names: str, flipped: bool = False) -> dict[str, torch.Tensor]:
        shape = (1, 2, 2)
        values = {
            "mean": torch.full(shape, -float(index) if flipped else float(index)),
            "logvar": torch.full(shape, self.logvar),
            "input_ids": torch.full((4,), index),
        }
        return {name: values[name] for name in names}


def maker(shards, batch_size=6, scaling_factor=1.0, **changes):
    train = {**shrunk_tree()["train"], "caption_dropout": 0.0, "batch_size": batch_size, "micro_batch_size": 1}
    params = check_params(shrunk_tree(train={**train, **changes})).train
    return BatchMaker(shards, params, num_train_timesteps=1000, scaling_factor=scaling_factor, null_ids=NULL)


def rows_of(batch) -> list[int]:
    return [round(value) for value in batch.latents[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("split", [[6], [3, 3], [1, 2, 3]])
def test_a_step_is_the_same_however_it_is_split(split):
    batches = maker(
        Shards(20, std=0.5, has_flipped=True),
        caption_dropout=0.3,
        noise_offset=0.1,
        input_perturbation=0.1,
        timestep_sampling="stratified",
    )
    whole = batches.make(7, range(6), CPU)
    starts = np.cumsum([0, *split])
    parts = [batches.make(7, range(a, b), CPU) for a, b in pairwise(starts)]
    for name in ("latents", "noise", "input_noise", "timesteps", "input_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_every_epoch_visits_every_image_once_in_a_new_order():
    batches = maker(Shards(21), batch_size=6)
    stream = [row for step in range(7) for row in rows_of(batches.make(step, range(6), CPU))]
    first, second = stream[:21], stream[21:42]
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second


def test_steps_may_be_drawn_in_any_order():
    batches = maker(Shards(9, std=0.3))
    late = batches.make(40, range(6), CPU)
    batches.make(0, range(6), CPU)
    assert torch.equal(batches.make(40, range(6), CPU).latents, late.latents)


def test_the_posterior_is_drawn_again_at_every_visit():
    batches = maker(Shards(1, std=0.5), batch_size=4)
    draws = torch.cat([batches.make(step, range(4), CPU).latents.flatten(1) for step in range(500)])
    assert len(draws.unique(dim=0)) == 2000
    assert draws.std().item() == pytest.approx(0.5, rel=0.03)


def test_latents_are_scaled_once():
    assert maker(Shards(8), scaling_factor=0.18215).make(0, range(6), CPU).latents.max() < 8 * 0.18215


def test_noise_is_standard_normal_and_timesteps_are_uniform():
    batches = maker(Shards(5), batch_size=50)
    made = [batches.make(step, range(50), CPU) for step in range(100)]
    noise = torch.cat([batch.noise for batch in made])
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    timesteps = torch.cat([batch.timesteps for batch in made])
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert (counts - 500).abs().max() < 4 * 500**0.5


def test_flips_and_dropped_captions_come_at_their_rates():
    batches = maker(Shards(10, has_flipped=True), batch_size=50, caption_dropout=0.2)
    made = [batches.make(step, range(50), CPU) for step in range(80)]
    latents = torch.cat([batch.latents[:, 0, 0, 0] for batch in made])
    flipped = (latents < 0).sum() / (latents != 0).sum()
    assert flipped.item() == pytest.approx(0.5, abs=3 * (0.25 / 3600) ** 0.5)
    dropped = (torch.cat([batch.input_ids for batch in made]) == -1).all(dim=1).float().mean()
    assert dropped.item() == pytest.approx(0.2, abs=3 * (0.16 / 4000) ** 0.5)


def test_without_flips_or_dropout_there_are_none():
    batches = maker(Shards(10), batch_size=50)
    made = batches.make(0, range(50), CPU)
    assert (made.latents > -1e-6).all()
    assert (made.input_ids >= 0).all()


def test_noise_offset_shifts_whole_channels_of_the_target():
    plain = maker(Shards(6)).make(3, range(6), CPU)
    offset = maker(Shards(6), noise_offset=0.5).make(3, range(6), CPU)
    shift = offset.noise - plain.noise
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6)
    assert torch.equal(offset.input_noise, offset.noise)
    assert len(set(shift[:, 0, 0, 0].tolist())) == 6


def test_noise_offset_has_its_strength():
    batches, plain = maker(Shards(600), batch_size=600, noise_offset=0.1), maker(Shards(600), batch_size=600)
    shift = (batches.make(0, range(600), CPU).noise - plain.make(0, range(600), CPU).noise)[:, 0, 0, 0]
    assert shift.std().item() == pytest.approx(0.1, rel=0.1)


def test_input_perturbation_leaves_the_target_alone():
    plain = maker(Shards(600), batch_size=600).make(0, range(600), CPU)
    perturbed = maker(Shards(600), batch_size=600, input_perturbation=0.1).make(0, range(600), CPU)
    assert torch.equal(perturbed.noise, plain.noise)
    assert (perturbed.input_noise - perturbed.noise).std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(plain.input_noise, plain.noise)


@pytest.mark.parametrize("batch_size", [2, 6, 32])
def test_stratified_timesteps_take_one_from_each_stratum(batch_size):
    batches = maker(Shards(40), batch_size=batch_size, timestep_sampling="stratified")
    for step in range(20):
        timesteps = batches.make(step, range(batch_size), CPU).timesteps
        gaps = torch.diff(timesteps.sort().values).tolist()
        assert all(0 <= t < 1000 for t in timesteps.tolist())
        assert max(gaps, default=0) - min(gaps, default=0) <= 1, "an evenly spaced grid, rounded down"
        edges = torch.arange(batch_size) * 1000 / batch_size
        inside = timesteps.sort().values - edges
        assert inside.min() >= -1, "rounding down may move one below its stratum"
        assert inside.max() < 1000 / batch_size


def test_stratified_timesteps_cover_the_schedule_evenly_in_the_long_run():
    batches = maker(Shards(40), batch_size=4, timestep_sampling="stratified")
    timesteps = torch.cat([batches.make(step, range(4), CPU).timesteps for step in range(500)])
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert counts.min() > 150
    assert counts.max() < 250


def test_each_row_has_a_seed_of_its_own_whatever_the_split():
    batches = maker(Shards(20))
    effective = batches.make(7, range(6), CPU).seeds
    assert effective == batches.make(7, range(2), CPU).seeds + batches.make(7, range(2, 6), CPU).seeds
    assert len({*effective, *batches.make(8, range(6), CPU).seeds}) == 12
