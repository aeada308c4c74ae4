"""What a training step sees depends on (seed, step, position) alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from sdtrain.batches import BatchMaker

CPU = torch.device("cpu")
NULL = torch.full((4,), -1)


class Shards:
    """Stands in for LatentShards: row i has mean i, a spread of `std`, and the mirror's mean is -i."""

    def __init__(self, num_rows: int, std: float = 0.0, has_flipped: bool = False) -> None:
        self.num_rows, self.has_flipped = num_rows, has_flipped
        self.logvar = 2 * np.log(std) if std else -60.0

    def __len__(self) -> int:
        return self.num_rows

    def read(self, index: int, *names: str) -> tuple[torch.Tensor, ...]:
        shape = (1, 2, 2)
        values = {
            "mean": torch.full(shape, float(index)),
            "mean_flipped": torch.full(shape, -float(index)),
            "logvar": torch.full(shape, self.logvar),
            "logvar_flipped": torch.full(shape, self.logvar),
            "input_ids": torch.full((4,), index),
        }
        return tuple(values[name] for name in names)


def maker(shards, batch_size=6, seed=0, caption_dropout=0.0, scaling_factor=1.0):
    return BatchMaker(shards, seed, batch_size, 1000, scaling_factor, caption_dropout, NULL)


def rows_of(batch) -> list[int]:
    return [round(value) for value in batch.latents[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("split", [[6], [3, 3], [1, 2, 3]])
def test_a_step_is_the_same_however_it_is_split(split):
    batches = maker(Shards(20, std=0.5, has_flipped=True), caption_dropout=0.3)
    whole = batches.make(7, range(6), CPU)
    starts = np.cumsum([0, *split])
    parts = [batches.make(7, range(a, b), CPU) for a, b in pairwise(starts)]
    for name in ("latents", "noise", "timesteps", "input_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_every_epoch_visits_every_picture_once_in_a_new_order():
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


def test_the_posterior_is_drawn_anew_at_every_visit():
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


def test_mirrors_and_dropped_captions_come_at_their_rates():
    batches = maker(Shards(10, has_flipped=True), batch_size=50, caption_dropout=0.2)
    made = [batches.make(step, range(50), CPU) for step in range(80)]
    latents = torch.cat([batch.latents[:, 0, 0, 0] for batch in made])
    flipped = (latents < 0).sum() / (latents != 0).sum()
    assert flipped.item() == pytest.approx(0.5, abs=3 * (0.25 / 3600) ** 0.5)
    dropped = (torch.cat([batch.input_ids for batch in made]) == -1).all(dim=1).float().mean()
    assert dropped.item() == pytest.approx(0.2, abs=3 * (0.16 / 4000) ** 0.5)


def test_without_mirrors_or_dropout_there_are_none():
    batches = maker(Shards(10), batch_size=50)
    made = batches.make(0, range(50), CPU)
    assert (made.latents > -1e-6).all()
    assert (made.input_ids >= 0).all()
