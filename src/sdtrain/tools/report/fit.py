"""Makes the page small enough: first the images' quality falls, then their size, then there are fewer of them."""

from collections.abc import Callable
from dataclasses import dataclass

from sdtrain.ground.errors import InputError
from sdtrain.tools.report.matrix import Matrix
from sdtrain.tools.report.others import Found, Prompt
from sdtrain.tools.report.thumbnails import LEVELS, Gallery, Level

_IMAGE_BYTES = 100
"""What an image costs beside its data."""
_NOTE_BYTES = 1000
"""For the sentence on what was reduced."""
_MB = 1_000_000


@dataclass
class Shown:
    """The images of a page; in each list what is worth least comes last."""

    matrix: Matrix
    prompts: list[Prompt]
    found: list[Found]
    num_left_out: int = 0
    """Rows and pairs."""

    def ids(self) -> list[str]:
        """Of all images, each once."""
        pictures = [picture for row in self.matrix.rows for picture in (*row.given.values(), *row.cells) if picture]
        pictures += [picture for prompt in self.prompts for track in prompt.tracks for picture in track.steps.values()]
        for found in self.found:
            pictures += [picture for _, picture in found.worst]
            pictures += [picture for _, *pair in found.pairs for picture in pair]
        return list(dict.fromkeys(picture.id for picture in pictures))

    def leave_out(self) -> bool:
        """Leave out the last of the longest list, so that something of each stays as long as it can."""
        lists: list[list] = [self.matrix.rows, self.prompts]
        lists += [part for found in self.found for part in (found.pairs, found.worst)]
        longest = max(lists, key=len)
        if not longest:
            return False
        longest.pop()
        self.num_left_out += 1
        return True


def fit(shown: Shown, gallery: Gallery, max_mb: int, render: Callable[[dict[str, str], str], str]) -> str:
    """The page, at most `max_mb` · 10⁶ bytes; of `shown` may be left out what doesn't fit.

    Args:
        render: the page of these images' data URIs, and a sentence on how they were reduced.

    Raises:
        InputError: it doesn't fit even without images.
    """
    bare = len(render({}, "").encode(errors="replace")) + _NOTE_BYTES
    room = max_mb * _MB - bare
    if room < 0:
        raise InputError(f"--max-mb {max_mb}: the page has {bare / _MB:.1f} MB without any image; allow more")
    for level in LEVELS:
        images = _encoded(shown.ids(), gallery, level, room)
        if _size(images, shown.ids()) <= room:
            break
    while _size(images, shown.ids()) > room and shown.leave_out():
        pass
    page = render({picture: images[picture] for picture in shown.ids()}, _note(level, shown.num_left_out, max_mb))
    assert len(page.encode(errors="replace")) <= max_mb * _MB, "the page outgrew what was planned"
    return page


def _encoded(ids: list[str], gallery: Gallery, level: Level, room: int) -> dict[str, str]:
    """All at the last level; at others no more than shows that they don't fit."""
    images: dict[str, str] = {}
    size = 0
    for picture in ids:
        images[picture] = gallery.encoded(picture, level)
        size += len(images[picture]) + _IMAGE_BYTES
        if size > room and level != LEVELS[-1]:
            break
    return images


def _size(images: dict[str, str], ids: list[str]) -> int:
    return sum(len(images[picture]) + _IMAGE_BYTES for picture in ids if picture in images)


def _note(level: Level, num_left_out: int, max_mb: int) -> str:
    note = (
        f"Images are thumbnails: WebP of quality {level.quality}, at most {level.side_px} px. The originals are in "
        "each run's data/samples, plots/validation and data/evaluation."
    )
    reduced = []
    if level != LEVELS[0]:
        reduced.append(f"reduced from quality {LEVELS[0].quality} and {LEVELS[0].side_px} px")
    if num_left_out:
        reduced.append(f"{num_left_out} rows or images left out, those of the matrix that changed least first")
    return f"{note} To stay within {max_mb} MB they are {', and '.join(reduced)}." if reduced else note
