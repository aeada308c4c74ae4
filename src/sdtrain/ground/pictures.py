"""`data/evaluation`: images to look at beside the metrics, PNG files of up to 256 px a side, and two lists of them.

- `worst.json`: the held-out images with the highest loss, highest first, a `Worst` each.
- `neighbors.json`: a `Neighbors`: the drawn images that are most like a copy of a training image, each beside it.
"""

from pydantic import BaseModel, ConfigDict, FiniteFloat

WORST, NEIGHBORS = "worst.json", "neighbors.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Worst(_Record):
    """A held-out image with a high loss."""

    item: str
    """Its id."""
    text: str
    """Its caption, as the model sees it."""
    image: str
    """Its file below the folder."""
    loss_base: FiniteFloat
    loss_trained: FiniteFloat


class Pair(_Record):
    """A drawn image and the training image that is nearest to it."""

    text: str
    """What it was drawn from."""
    item: str
    """The training image's id."""
    sample: str
    """The drawn image's file."""
    train: str
    """The training image's file."""
    distance: FiniteFloat
    ratio: FiniteFloat
    """The distance over that to the nearest held-out image of another caption; 0 of a copy."""


class Neighbors(_Record):
    """What the trained model drew, compared with all training images."""

    features: str | None
    """The image encoder; null if there is none."""
    num_samples: int
    """How many images were compared."""
    threshold: FiniteFloat | None
    """The ratio below which one is a near copy; null where too few images are held out."""
    pairs: list[Pair]
    """Lowest ratio first; none if images weren't compared with training images."""
