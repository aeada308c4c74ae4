"""How far a set of generated images is from a set of real ones, as arithmetic on their features.

A set is an array [N, d], a feature vector per image (`features.py`). All is computed in float64, in chunks of pairs.
What only a fault of ours can break, such as sets of different d, is an assert.

**Halves.** Every metric is taken between random halves, drawn without replacement: real images of one half of the
captions, generated ones of the other, so that no image meets the real one of its caption. Its value is the mean over
halvings. A bootstrap instead draws images twice, and such twins are each other's neighbours at distance 0, which shifts
every metric here. For a statistic that acts like a mean over images, the spread over random halves is the standard
error of the mean over halvings (the delete-half jackknife: Shao and Wu 1989, "A general theory for jackknife variance
estimation"); where the images of a caption are alike, it is larger than that. The metrics but the two MMDs depend on
the number of images: compare values at equal numbers only.

**The floor.** Real images in the place of the generated ones: what a perfect model would get, at the same number of
images and so with the same bias.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sdtrain.ground import randomness

Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]
"""From the features of real and of generated images, both [N, d], to values by name."""

MIN_VERDICT_IMAGES = 200
"""With fewer, the floor is too wide for a verdict to mean much."""
RANGES = {
    "frechet_distance": (0, np.inf), "mind": (0, np.inf), "density": (0, np.inf),
    "precision": (0, 1), "recall": (0, 1), "coverage": (0, 1),
}  # fmt: skip
"""Outside which a metric can't be; an unbiased MMD² can be anything."""
_MIN_IMAGES_PER_FEATURE = 5
"""Below it the covariances' own errors make up most of a Fréchet distance."""
_MMD_SCALE = 1000
"""CMMD's, which makes an MMD² readable; KID is usually given in the same unit."""
_NUM_ROWS = 512
"""Rows of a matrix of all pairs that are held at once."""


# ---------------------------------------------------------------- metrics


def set_metrics(real: np.ndarray, fake: np.ndarray, k: int, num_projections: int, seed: int) -> dict[str, float]:
    """All metrics of this module, by name; `frechet_distance` only where it is defined.

    `mmd_polynomial` and `mmd_rbf` are 1000 · MMD². The RBF kernel sees features at unit length: its bandwidth of 10 is
    CMMD's, whose features are. Both sets must have the same number of images.
    """
    frechet = frechet_distance(real, fake)
    return {
        "mmd_polynomial": _MMD_SCALE * mmd_polynomial(real, fake),
        "mmd_rbf": _MMD_SCALE * mmd_rbf(unit_length(real), unit_length(fake)),
        **({} if frechet is None else {"frechet_distance": frechet}),
        "mind": mind(real, fake, num_projections, seed),
        **precision_recall_density_coverage(real, fake, k)._asdict(),
    }


def mmd_polynomial(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD² with the kernel (x·y/d + 1)³, of sets [N, d] and [M, d]: KID, without its subsets.

    Bińkowski et al. 2018, "Demystifying MMD GANs"; the estimator is Gretton et al. 2012, eq. 3. It can be negative. It
    is unbiased for independent sets; where y_i is drawn from x_i's caption, it is lowered by 2/N of the amount by which
    the mean kernel of these pairs exceeds that of the others.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        base = a @ b.T / a.shape[1] + 1
        return base * base * base

    return _mmd(*_checked(x, y), kernel)


def mmd_rbf(x: np.ndarray, y: np.ndarray, sigma: float = 10.0) -> float:
    """Unbiased MMD² with the kernel exp(-‖x-y‖²/2σ²), of sets [N, d] and [M, d].

    1000 times this, on CLIP's embeddings at unit length, is CMMD (Jayasumana et al. 2024, "Rethinking FID") without the
    bias of its reference code, which adds (1-k̄)/N for each set, k̄ the mean kernel of its pairs. As `mmd_polynomial` it
    can be negative.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(_squared_distances(a, b) / (-2 * sigma**2))

    return _mmd(*_checked(x, y), kernel)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float | None:
    """Squared Fréchet distance of Gaussians fitted to sets [N, d] and [M, d]; None where N or M is below 5·d.

    ‖μ₁-μ₂‖² + tr(Σ₁+Σ₂-2(Σ₁Σ₂)^½), FID's formula (Heusel et al. 2017), covariances over N-1. With sets A and B centred
    and scaled so that Σ₁ = AᵀA and Σ₂ = BᵀB, the trace of the root is the nuclear norm of ABᵀ, a sum of singular values
    that needs no root, where one of Σ₁Σ₂ would lose half the digits. Even at 5·d it is biased upwards: mind the floor.
    """
    x, y = _checked(x, y)
    if min(len(x), len(y)) < _MIN_IMAGES_PER_FEATURE * x.shape[1]:
        return None
    gap = x.mean(axis=0) - y.mean(axis=0)
    a, b = (np.linalg.qr((z - z.mean(axis=0)) / (len(z) - 1) ** 0.5, mode="r") for z in (x, y))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(gap @ gap + (a * a).sum() + (b * b).sum() - 2 * nuclear)


def mind(x: np.ndarray, y: np.ndarray, num_projections: int, seed: int) -> float:
    """Monge Inception Distance on any features, of two sets [N, d]: 3d times the squared sliced 2-Wasserstein distance.

    Berthet et al. 2026, "MIND", arXiv 2605.06797: over random directions u, the mean squared difference of the sorted
    u·x and the sorted u·y. The factor 3d makes it 3·‖δ‖² between a distribution and itself shifted by δ. Equal seeds
    give equal directions, so their noise, a relative √(2/num_projections) of such a shift, cancels in comparisons.
    """
    x, y = _checked(x, y)
    directions = randomness.generator(seed, "directions").standard_normal((num_projections, x.shape[1]))
    return _mind_along(x, y, unit_length(directions))


class Neighbourhoods(NamedTuple):
    """Shares of images in 0..1, but for the density, which is 1 between sets of one distribution and can exceed it."""

    precision: float
    """Of generated images that lie in a real one's neighbourhood: fidelity, easily fooled by outliers."""
    recall: float
    """Of real images that lie in a generated one's neighbourhood: diversity."""
    density: float
    """The number of real neighbourhoods in which a generated image lies, over k: fidelity."""
    coverage: float
    """Of real images with a generated one in their neighbourhood: diversity."""


def precision_recall_density_coverage(real: np.ndarray, fake: np.ndarray, k: int) -> Neighbourhoods:
    """Overlap of two sets [N, d], where a neighbourhood reaches to the k-th nearest image of the same set.

    Kynkäänniemi et al. 2019, "Improved precision and recall metric"; Naeem et al. 2020, "Reliable fidelity and
    diversity metrics". Neighbourhoods shrink as N grows, so both sets must have the same size. For independent sets of
    any one distribution the density's expectation is 1, the coverage's 1 - Π_{i=1..k} (N-i)/(2N-i).
    """
    real, fake = _checked(real, fake)
    assert len(real) == len(fake), f"sets must have the same size, got {len(real)} and {len(fake)}"
    assert 1 <= k < len(real), f"k = {k} neighbours of {len(real)} images"
    real_reach, fake_reach = _squared_reach(real, k), _squared_reach(fake, k)
    num_around = np.zeros(len(fake), dtype=np.int64)
    num_recalled = num_covered = 0
    for rows in _chunks(real):
        distances = _squared_distances(real[rows], fake)
        inside = distances <= real_reach[rows, None]
        num_around += inside.sum(axis=0)
        num_covered += inside.any(axis=1).sum()
        num_recalled += (distances <= fake_reach).any(axis=1).sum()
    return Neighbourhoods(
        precision=float((num_around > 0).mean()),
        recall=float(num_recalled / len(real)),
        density=float(num_around.mean() / k),
        coverage=float(num_covered / len(real)),
    )


# ---------------------------------------------------------------- intervals and the floor


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval over images of a metric's expectation, from its values between halves, or from their differences.

    The values are `against_other_halves`'s. A difference of two models is paired, if both come from the same halvings:
    what they owe to the same images, real or of the same prompts and seeds, cancels. It doesn't know a metric's range.
    """
    half_width = 1.959964 * values.std(ddof=1)
    return float(values.mean() - half_width), float(values.mean() + half_width)


def against_other_halves(
    measure: Measure, real: np.ndarray, images: np.ndarray, num_halves: int, seed: int
) -> dict[str, np.ndarray]:
    """A measure's values between random halves of the images and the real ones at all other places, by name.

    Both sets are [N, d], values float64 [num_halves]. Of the real images themselves they are the floor. A metric that
    isn't defined on halves is missing.
    """
    return _by_name([measure(real[other], images[half]) for half, other in _halves(real, images, num_halves, seed)])


def differs_from_real(values: np.ndarray, floor: np.ndarray, num_images: int) -> bool | None:
    """Whether a metric tells images from real ones, by `against_other_halves` of both; None for too few images.

    It does if its mean lies outside the middle 95 % of the floor: above for distances, below for shares. On the other
    side images are closer to the real ones than other real ones are, as copies are. In the module's simulation it told
    0 to 1.5 % of equal distributions apart; of those shifted by 0.3 standard deviations in the widest feature, 33 to
    44 % by the distances and 1 % at most by the others. False doesn't mean equal: compare models by their difference.
    """
    if num_images < MIN_VERDICT_IMAGES:
        return None
    low, high = np.percentile(floor, [2.5, 97.5])
    return not low <= values.mean() <= high


def _halves(x: np.ndarray, y: np.ndarray, num_halves: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of a random half, and of the other half; of an odd number one is left out."""
    assert len(x) == len(y), f"sets must have the same size, got {len(x)} and {len(y)}"
    size = len(x) // 2
    for number in range(num_halves):
        order = randomness.generator(seed, "halves", number).permutation(len(x))
        yield order[:size], order[size : 2 * size]


def _by_name(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


# ---------------------------------------------------------------- arithmetic


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as float64."""
    assert x.ndim == y.ndim == 2, f"sets are [N, d], got {x.shape} and {y.shape}"
    assert x.shape[1] == y.shape[1], f"sets must have the same features, got {x.shape} and {y.shape}"
    assert min(len(x), len(y)) >= 2, f"a set needs two images, got {len(x)} and {len(y)}"
    assert all(np.isfinite(z).all() for z in (x, y)), "features must be finite"
    return x.astype(np.float64), y.astype(np.float64)


def _chunks(x: np.ndarray) -> Iterator[slice]:
    return (slice(start, start + _NUM_ROWS) for start in range(0, len(x), _NUM_ROWS))


def _mmd(x: np.ndarray, y: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    across = sum(kernel(x[rows], y).sum() for rows in _chunks(x)) / (len(x) * len(y))
    return float(_mean_within(x, kernel) + _mean_within(y, kernel) - 2 * across)


def _mean_within(x: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """Mean kernel of a set's pairs of different images."""
    total = 0.0
    for rows in _chunks(x):
        block = kernel(x[rows], x)
        total += block.sum() - np.trace(block, offset=rows.start)
    return total / (len(x) * (len(x) - 1))


def _mind_along(x: np.ndarray, y: np.ndarray, directions: np.ndarray) -> float:
    """MIND of two sets [N, d] along unit vectors [num_projections, d]."""
    assert len(x) == len(y), f"sets must have the same size, got {len(x)} and {len(y)}"
    total = 0.0
    for rows in _chunks(directions):
        along = [np.sort(z @ directions[rows].T, axis=0) for z in (x, y)]
        total += ((along[0] - along[1]) ** 2).sum()
    return float(3 * x.shape[1] * total / (len(x) * len(directions)))


def _squared_reach(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance from each image to the k-th nearest other one of its set, [N]."""
    reach = np.empty(len(x))
    for rows in _chunks(x):
        distances = _squared_distances(x[rows], x)
        reach[rows] = np.partition(distances, k, axis=1)[:, k]  # the nearest, 0, is the image itself
    return reach


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """‖a-b‖² of all pairs, [len(a), len(b)]."""
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)
    return np.maximum(squares - 2 * (a @ b.T), 0)


def unit_length(x: np.ndarray) -> np.ndarray:
    """Each row [N, d] divided by its length, float64."""
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
