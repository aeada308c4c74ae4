"""Metrics between sets of features: closed forms, values by hand, reference implementations, and their uncertainty.

`tests/golden/set_metrics.json` holds what other libraries give for the float64 sets of `golden_sets`. Of torch-fidelity
these are `kid_features_to_metric` (one subset of all 60), `fid_statistics_to_metric` and `prc_features_to_metric`, and
at the commit the arithmetic of `mind_features_to_metric` (64 projections, rng_seed 0); of torchmetrics `poly_mmd` and
`_compute_fid`; of prdc `compute_prdc`; of cmmd-pytorch `mmd`, 1000 times the biased MMD². Neighbourhoods are of k = 3.
They were run once; torchvision, which torch-fidelity imports and these functions don't use, was an empty module.
"""

import json
import tracemalloc

import numpy as np
import pytest
import torch

from sdtrain.evaluation import set_metrics as module
from sdtrain.evaluation.set_metrics import (
    against_other_halves,
    differs_from_real,
    frechet_distance,
    interval,
    mind,
    mmd_polynomial,
    mmd_rbf,
    precision_recall_density_coverage,
    set_metrics,
)
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "set_metrics.json").read_text())
FAR = 2.0
"""A shift that any metric notices."""


def golden_sets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(7))
    real = rng.standard_normal((60, 6))
    return real, 0.8 * rng.standard_normal((60, 6)) + np.linspace(-0.5, 1, 6)


def gaussian(rng: np.random.Generator, num: int, mean: float = 0.0, std: float = 1.0, d: int = 4) -> np.ndarray:
    return rng.standard_normal((num, d)) * std + mean


def all_metrics(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    return set_metrics(real, fake, k=3, num_projections=32, seed=0)


def mean_of(measure, draws: int) -> tuple[float, float]:
    """Mean and its standard error of a measure of a generator, over `draws` draws."""
    values = np.array([measure(np.random.default_rng(draw)) for draw in range(draws)])
    return values.mean(), values.std(ddof=1) / draws**0.5


# ---------------------------------------------------------------- reference implementations


@pytest.mark.parametrize("library", ["torch-fidelity 0.4.0", "torchmetrics 1.9.0"])
def test_polynomial_mmd_and_frechet_distance_are_those_of(library):
    real, fake = golden_sets()
    assert mmd_polynomial(real, fake) == pytest.approx(GOLDEN[library]["mmd_polynomial"], rel=1e-12)
    assert frechet_distance(real, fake) == pytest.approx(GOLDEN[library]["frechet_distance"], rel=1e-12)


@pytest.mark.parametrize("library", ["torch-fidelity 0.4.0", "prdc 0.2"])
def test_neighbourhoods_are_those_of(library):
    found = precision_recall_density_coverage(*golden_sets(), k=3)._asdict()
    assert {name: found[name] for name in GOLDEN[library] if name in found} == pytest.approx(
        {name: value for name, value in GOLDEN[library].items() if name in found}
    )


def test_mind_is_that_of_torch_fidelity_along_its_directions():
    directions = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).double().numpy()
    found = module._mind_along(*golden_sets(), module.unit_length(directions))
    assert found == pytest.approx(GOLDEN["torch-fidelity a51aa64"]["mind"], rel=1e-6)


def test_rbf_mmd_is_that_of_cmmd_without_its_bias():
    real, fake = golden_sets()
    bias = 0.0
    for x in (real, fake):
        pairs = [np.exp(-((a - b) @ (a - b)) / 200) for i, a in enumerate(x) for b in x[:i]]
        bias += (1 - np.mean(pairs)) / len(x)
    assert 1000 * (mmd_rbf(real, fake) + bias) == pytest.approx(GOLDEN["cmmd-pytorch 49fb717"]["mmd_rbf"], rel=1e-9)


# ---------------------------------------------------------------- MMD


def test_mmds_by_hand():
    x, y = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])
    assert mmd_polynomial(x, y) == 1 + 1 - 2 * (1 + 1 + 1 + 27) / 4
    across = (1 + np.exp(-2) + 2 * np.exp(-0.5)) / 4
    assert mmd_rbf(x, y, sigma=1.0) == pytest.approx(np.exp(-0.5) + np.exp(-2) - 2 * across)


def test_rbf_mmd_of_gaussians_has_its_closed_form():
    """E exp(-‖x-y‖²/2σ²) is (σ²/v)^(d/2) · exp(-‖δ‖²/2v), v = σ² + both variances."""
    d, shift, std, sigma = 3, 0.7, 1.5, 2.0

    def expected(variances: float, gap: float) -> float:
        v = sigma**2 + variances
        return (sigma**2 / v) ** (d / 2) * np.exp(-d * gap**2 / (2 * v))

    closed = expected(2, 0) + expected(2 * std**2, 0) - 2 * expected(1 + std**2, shift)
    mean, error = mean_of(lambda rng: mmd_rbf(gaussian(rng, 40, d=d), gaussian(rng, 60, shift, std, d=d), sigma), 300)
    assert abs(mean - closed) < 4 * error
    assert error < closed / 20


def test_polynomial_mmd_of_gaussians_has_its_closed_form():
    """From the moments of x·y, x ~ N(a, I), y ~ N(b, I): with s = a·b, E(x·y)² = d + ‖a‖² + ‖b‖² + s² and
    E(x·y)³ = s³ + 3s(‖a‖² + ‖b‖² + d + 2)."""
    d, shift = 4, 0.8

    def expected(a: np.ndarray, b: np.ndarray) -> float:
        s, squares = a @ b, a @ a + b @ b
        return 1 + 3 * s / d + 3 * (d + squares + s**2) / d**2 + (s**3 + 3 * s * (squares + d + 2)) / d**3

    a, b = np.zeros(d), np.full(d, shift)
    closed = expected(a, a) + expected(b, b) - 2 * expected(a, b)
    mean, error = mean_of(lambda rng: mmd_polynomial(gaussian(rng, 40), gaussian(rng, 60, shift)), 300)
    assert abs(mean - closed) < 4 * error
    assert error < closed / 20


@pytest.mark.parametrize("metric", [mmd_polynomial, mmd_rbf])
def test_mmds_of_one_distribution_are_zero_on_average(metric):
    mean, error = mean_of(lambda rng: metric(gaussian(rng, 10), gaussian(rng, 15)), 500)
    assert abs(mean) < 4 * error


def test_mmds_of_a_set_and_its_copy_by_hand():
    """Pairs of an image and its copy count between the sets, but not within one, so it is below 0."""
    x = np.array([[0.0], [1.0]])
    assert mmd_polynomial(x, x) == pytest.approx(2 * (1 - (1 + 8 + 2) / 4))
    assert mmd_rbf(x, x, sigma=2.0) == pytest.approx(np.exp(-1 / 8) - 1)


# ---------------------------------------------------------------- Fréchet distance


def exactly(mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """A set whose own mean and covariance are these."""
    x = np.random.default_rng(seed).standard_normal((50, len(mean)))
    x -= x.mean(axis=0)
    white = np.linalg.qr(x)[0] * 49**0.5
    return white @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """The trace of a root of a 2×2 matrix M is √(tr M + 2√det M)."""
    first, second = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    product = first @ second
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    closed = 3**2 + 4**2 + np.trace(first + second) - 2 * root
    x, y = exactly(np.zeros(2), first, seed=0), exactly(np.array([3.0, 4.0]), second, seed=1)
    assert frechet_distance(x, y) == pytest.approx(closed, rel=1e-12)


def test_frechet_distance_to_itself_is_zero_even_where_features_are_constant_or_equal():
    x = gaussian(np.random.default_rng(0), 50)
    x[:, 1], x[:, 2] = 5.0, x[:, 0]
    assert abs(frechet_distance(x, x[::-1])) < 1e-12


def test_frechet_distance_needs_five_images_per_feature():
    rng = np.random.default_rng(0)
    assert frechet_distance(gaussian(rng, 20), gaussian(rng, 20)) is not None
    assert frechet_distance(gaussian(rng, 19), gaussian(rng, 20)) is None
    assert frechet_distance(gaussian(rng, 20), gaussian(rng, 19)) is None


# ---------------------------------------------------------------- MIND


def test_mind_by_hand():
    """In one dimension all directions agree: 3 · the mean squared difference of sorted values."""
    assert mind(np.array([[1.0], [0.0]]), np.array([[1.0], [3.0]]), 5, 0) == pytest.approx(3 * (1 + 4) / 2)


def test_mind_of_a_set_and_its_copy_is_zero():
    x = gaussian(np.random.default_rng(0), 30)
    assert mind(x, x[::-1], 5, 0) == 0


def test_mind_of_shifted_gaussians_is_three_times_the_squared_shift():
    x, shift = gaussian(np.random.default_rng(0), 30, d=8), np.linspace(-1, 2, 8)
    closed = 3 * shift @ shift
    assert mind(x, x + shift, 4000, 0) == pytest.approx(closed, rel=4 * (2 / 4000) ** 0.5)
    assert mind(x, x + shift, 20, 0) == mind(x, x + shift, 20, 0) != mind(x, x + shift, 20, 1)


# ---------------------------------------------------------------- neighbourhoods


def test_neighbourhoods_by_hand():
    """Real ones reach 1, 1, 1 and 8; generated ones 3.5, 3.5, 1 and 1."""
    real, fake = np.array([[0.0], [1], [2], [10]]), np.array([[0.5], [4], [30], [31]])
    found = precision_recall_density_coverage(real, fake, k=1)
    assert found == (2 / 4, 3 / 4, (2 + 1) / 4, 3 / 4)


def test_density_and_coverage_of_one_distribution_have_their_closed_forms():
    num, k = 20, 3
    missed = np.prod([(num - i) / (2 * num - i) for i in range(1, k + 1)])

    def found(rng: np.random.Generator) -> np.ndarray:
        return np.array(precision_recall_density_coverage(gaussian(rng, num) ** 3, gaussian(rng, num) ** 3, k))

    for index, closed in ((2, 1.0), (3, 1 - missed)):
        mean, error = mean_of(lambda rng, index=index: found(rng)[index], 400)
        assert abs(mean - closed) < 4 * error


def test_a_copy_overlaps_in_all():
    x = gaussian(np.random.default_rng(0), 30)
    found = precision_recall_density_coverage(x, x[::-1], k=3)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert 1 <= found.density <= 4 / 3  # ties at the third neighbour may round either way


def test_a_dropped_mode_costs_coverage_and_a_wild_one_costs_precision():
    rng = np.random.default_rng(0)
    real = np.concatenate([gaussian(rng, 50), gaussian(rng, 50, mean=20)])
    one_mode, wild = gaussian(rng, 100), np.concatenate([real[::2] + 0.1, gaussian(rng, 50, mean=-40)])
    dropped, astray = (precision_recall_density_coverage(real, fake, k=5) for fake in (one_mode, wild))
    assert dropped.precision > 0.9 > 0.5 >= dropped.coverage
    assert astray.precision == 0.5 < 0.9 < astray.coverage


# ---------------------------------------------------------------- all of them


def test_neither_the_order_of_images_nor_the_chunks_matter(monkeypatch):
    real, fake = golden_sets()
    once = all_metrics(real, fake)
    assert all_metrics(real[::-1], np.roll(fake, 7, axis=0)) == pytest.approx(once, rel=1e-9)
    monkeypatch.setattr(module, "_NUM_ROWS", 7)
    assert all_metrics(real, fake) == pytest.approx(once, rel=1e-9)
    assert len(once) == 8


def test_the_report_scales_mmds_and_takes_directions_only_for_rbf():
    real, fake = golden_sets()
    values = all_metrics(real, fake)
    assert values["mmd_polynomial"] == 1000 * mmd_polynomial(real, fake)
    longer = all_metrics(real, fake * 3)
    assert longer["mmd_rbf"] == pytest.approx(values["mmd_rbf"])
    assert longer["mmd_polynomial"] != pytest.approx(values["mmd_polynomial"])


def test_no_matrix_of_all_pairs_is_held():
    rng = np.random.default_rng(0)
    real, fake = gaussian(rng, 3000), gaussian(rng, 3000)
    tracemalloc.start()
    mmd_rbf(real, fake)
    precision_recall_density_coverage(real, fake, k=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 3000 * 8


# ---------------------------------------------------------------- intervals and the floor


def test_the_spread_over_halves_is_the_standard_error_of_a_mean():
    rng = np.random.default_rng(0)
    fake = gaussian(rng, 300, std=2.0, d=1)
    low, high = interval(against_other_halves(lambda real, fake: {"mean": fake.mean()}, fake, fake, 2000, 0)["mean"])
    assert low + high == pytest.approx(2 * fake.mean(), abs=0.02)
    assert (high - low) / 2 == pytest.approx(1.96 * fake.std(ddof=1) / 300**0.5, rel=0.05)


def test_halves_hold_no_image_twice_nor_the_one_of_the_same_caption():
    seen = []

    def measure(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
        seen.append((real[:, 0], fake[:, 0]))
        return {"none": 0.0}

    real = np.arange(21.0)[:, None]
    against_other_halves(measure, real, real + 100, num_halves=3, seed=0)
    assert [len({*other, *(half - 100)}) for other, half in seen] == [20] * 3
    assert len({tuple(half) for _, half in seen}) == 3
    first = seen.copy()
    seen.clear()
    against_other_halves(measure, real, real, num_halves=3, seed=0)
    assert all((half + 100 == of_model).all() for (_, half), (_, of_model) in zip(seen, first, strict=True))


def halves_of(real: np.ndarray, fake: np.ndarray, num_halves: int = 30, seed: int = 0) -> dict[str, np.ndarray]:
    return against_other_halves(all_metrics, real, fake, num_halves, seed)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_intervals_hold_the_expectation_of_halves(shift):
    """Of 80 intervals, 95 % of which should hold it, at least 86 %."""
    num = 60

    def draw(*place: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(place)
        return gaussian(rng, num), gaussian(rng, num, shift)

    found = [halves_of(*draw(0, trial), seed=trial) for trial in range(80)]
    pairs = (draw(1, trial) for trial in range(400))
    values = [all_metrics(real[: num // 2], fake[num // 2 :]) for real, fake in pairs]
    for name in values[0]:
        expected = np.mean([value[name] for value in values])
        intervals = [interval(one[name]) for one in found]
        assert np.mean([low <= expected <= high for low, high in intervals]) >= 0.86, name


def test_differences_of_models_on_the_same_images_are_paired():
    rng = np.random.default_rng(0)
    real, fake = gaussian(rng, 100), gaussian(rng, 100, FAR)
    worse, better = (halves_of(real, fake + extra, 40)["mmd_polynomial"] for extra in (0.05, 0.0))
    (low, high), (apart_low, apart_high) = interval(worse - better), interval(worse)
    assert low > 0
    assert high - low < (apart_high - apart_low) / 5


def test_a_metric_that_halves_are_too_small_for_is_missing():
    rng = np.random.default_rng(0)
    real, fake = gaussian(rng, 30), gaussian(rng, 30)
    assert "frechet_distance" in all_metrics(real, fake)
    assert "frechet_distance" not in halves_of(real, fake, 5)


def test_the_floor_tells_other_images_and_copies_from_real_ones():
    rng = np.random.default_rng(0)
    real = gaussian(rng, 200)
    floor = against_other_halves(all_metrics, real, real, 40, 0)

    def verdicts(images: np.ndarray) -> dict[str, bool | None]:
        values = against_other_halves(all_metrics, real, images, 40, 0)
        return {name: differs_from_real(values[name], floor[name], 200) for name in floor}

    assert set(verdicts(gaussian(rng, 200)).values()) == {False}
    assert set(verdicts(gaussian(rng, 200, FAR)).values()) == {True}
    copied = verdicts(np.roll(real, 100, axis=0))
    assert {name for name in copied if copied[name]} >= {"mind", "coverage"}


def test_images_that_share_captions_with_the_real_ones_are_at_the_floor_unless_they_meet_them():
    """Most of what they show is the caption's, as of a model that draws what it is told."""
    rng = np.random.default_rng(0)
    captions = gaussian(rng, 200)
    real, fake = (captions + gaussian(rng, 200, std=0.3) for _ in range(2))
    floor, apart = (against_other_halves(all_metrics, real, images, 40, 0) for images in (real, fake))
    orders = [np.random.default_rng(number).permutation(200)[:100] for number in range(40)]
    together = [all_metrics(real[half], fake[half]) for half in orders]
    assert not any(differs_from_real(apart[name], floor[name], 200) for name in floor)
    for name in ("mind", "coverage"):
        assert differs_from_real(np.array([found[name] for found in together]), floor[name], 200)


def test_few_images_get_no_verdict():
    values, floor = np.ones(10), np.zeros(10)
    assert differs_from_real(values, floor, 199) is None
    assert differs_from_real(values, floor, 200) is True
