"""Which images the held-out loss asks about."""

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.ground.randomness import generator


class Shards:
    """Ten class folders of 48 held-out images, in the order of their paths."""

    chosen = LatentShards.chosen

    def __init__(self) -> None:
        rng = generator(0, "test ids")
        self.ids = [f"{label}-{rng.integers(2**60):x}" for label in range(10) for _ in range(48)]


def held_out(max_samples: int) -> HeldOut:
    sizes = {"num_train_timesteps": 1000, "num_timesteps": 2, "batch_size": 4}
    return HeldOut(Shards(), 1.0, max_samples=max_samples, **sizes)


def test_every_class_of_a_sorted_split_is_asked_about():
    chosen = held_out(48).ids
    counts = [sum(name.startswith(f"{label}-") for name in chosen) for label in range(10)]
    assert sum(counts) == 48
    assert min(counts) >= 1, counts


def test_more_samples_add_to_fewer_and_all_keep_their_order():
    assert set(held_out(48).ids) < set(held_out(96).ids)
    assert held_out(1000).ids == Shards().ids
