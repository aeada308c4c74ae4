"""`data/samples`: images to compare, and `samples.json`, which says of each what it shows.

- `grid.png`: all of the first guidance scale in one image, `grid-guidance-<scale>.png` those of each further scale.
- `images/`: every image by itself, under names that are the same in every run.
- `samples.json`: `drawn`, a `DrawnImage` for each that a model drew, and `given`, a `GivenImage` for each condition and
  truth beside them.

The grid's rows count from 0. What a row asks is the same in every run on the same data and params, and so is its noise:
the first image of a row has the same seed under every model, its second the next one.
"""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from sdtrain.ground.files import write_json
from sdtrain.ground.records import check_record, read_record

IMAGES, GRID = "images", "grid.png"
LIST = "samples.json"
_STAGE = "sample"


class _Record(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class _Image(_Record):
    file: str
    """Below the folder, e.g. `images/00-trained-guidance4-seed0.png`."""
    prompt: NonNegativeInt
    """The grid's row."""
    text: str
    """The prompt or the held-out caption; of lit scenes without the words that tell the light."""
    item: str | None
    """The held-out image's id, or the lit scene's number, as in `metrics/values.parquet`; None of `sample.prompts`."""
    light: str | None
    """Of lit scenes, the light that it shows; None of conditions, and of all other images."""


class DrawnImage(_Image):
    """What a model drew."""

    model: str
    """`base`, `trained`, or a checkpoint's name."""
    seed: int
    guidance_scale: float


class GivenImage(_Image):
    """What a model was given, or the truth."""

    name: str
    """A condition's, such as `hint`; or `truth`."""


class Samples(_Record):
    """Of `samples.json`."""

    drawn: list[DrawnImage]
    given: list[GivenImage]

    @property
    def texts(self) -> list[str]:
        """What each row is drawn from."""
        return list({image.prompt: image.text for image in self.drawn}.values())

    @property
    def models(self) -> list[str]:
        """Whose images there are, in the grid's order."""
        return list(dict.fromkeys(image.model for image in self.drawn))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the list of a folder.

        Raises:
            InputError: it is missing or broken; names the file.
        """
        return read_record(folder / LIST, cls, _STAGE)

    @classmethod
    def parse(cls, tree: object, name: str) -> Self:
        """The list of a JSON tree; an `InputError` begins with `name`."""
        return check_record(tree, cls, name, _STAGE)

    def write(self, folder: Path) -> None:
        """Write it to its folder."""
        write_json(folder / LIST, self.model_dump(mode="json"))


def scale_text(guidance_scale: float) -> str:
    """A guidance scale as file names have it, e.g. `4` or `7.5`; another one for each scale."""
    return repr(guidance_scale).removesuffix(".0")
