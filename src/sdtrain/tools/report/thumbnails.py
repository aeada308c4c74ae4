"""The report's images: each once, small, and together within a size."""

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sdtrain.tools.report.recorded import Folder

MAX_SIDE_PX = 256
"""Of a thumbnail, at most; images are held at this size."""
_SMALL_PX = 128
"""Images of up to this size are shown with their pixels as squares."""


@dataclass(frozen=True)
class Level:
    """How much is kept of the images."""

    side_px: int
    quality: int
    """WebP's, 0 to 100."""


LEVELS = [Level(256, 90), Level(256, 75), Level(256, 60), Level(192, 60), Level(128, 60), Level(96, 50)]
"""Tried in this order, until the images are small enough: first quality falls, then size."""


@dataclass(frozen=True)
class Picture:
    """An image of the report; equal images are one."""

    id: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        return max(self.width, self.height) <= _SMALL_PX


class Gallery:
    """All images of a report."""

    def __init__(self) -> None:
        self._pictures: dict[str, Picture] = {}
        self._images: dict[str, Image.Image] = {}

    def add(self, file: Path) -> Picture | None:
        """Take in an image; None if the file is no image that can be read."""
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        if digest not in self._pictures:
            picture = Picture(f"i{len(self._pictures)}", *image.size)
            self._pictures[digest], self._images[picture.id] = picture, image
        return self._pictures[digest]

    def find(self, folder: Folder, name: str) -> Picture | None:
        """Take in an image of a folder; None if it isn't there."""
        return self.add(folder.files[name]) if name in folder.files else None

    def difference(self, first: Picture, second: Picture) -> float | None:
        """Mean absolute difference of the pixels of two thumbnails, 0 to 1; None if their sizes differ."""
        pixels = [np.asarray(self._images[picture.id], dtype=np.float64) for picture in (first, second)]
        return None if pixels[0].shape != pixels[1].shape else float(np.abs(pixels[0] - pixels[1]).mean() / 255)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Width and height by id."""
        return {picture: image.size for picture, image in self._images.items()}

    def encoded(self, picture: str, level: Level) -> str:
        """An image by its id, as a data URI of WebP."""
        image, file = self._images[picture].copy(), io.BytesIO()
        image.thumbnail((level.side_px, level.side_px), Image.Resampling.LANCZOS)
        image.save(file, "WEBP", quality=level.quality)
        return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
