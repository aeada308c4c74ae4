"""Conditions: read beside the images from every kind of source, checked against them, stored and cropped with them."""

import csv
import io
import struct
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import GifImagePlugin, Image

from sdtrain.data import shards
from sdtrain.data.conditions import CONDITIONS
from sdtrain.data.images import BadImage, decode_rgb, draw_crop, square_pixels
from sdtrain.data.shards import read_dataset
from sdtrain.dataset import build_dataset
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.manifests import SPLITS, DatasetManifest
from sdtrain.params.schema import DatasetParams
from tests.unit.test_dataset import jsonl, write_files, write_parquet, write_tar

NUM = 12
HINT = CONDITIONS["hint"]
UNLISTED = "not listed in the metadata, hidden, or of an unknown type"


def noise(seed: int, width: int = 8, height: int = 6, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def as_file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def hint_of(index: int) -> Image.Image:
    return noise(100 + index, mode="L")


TRIPLES = [(f"{n:02}", as_file(noise(n)), as_file(hint_of(n)), f"image number {n}") for n in range(NUM)]
"""Stem, image, hint and caption of what every kind of source holds here."""


def listed(folder: Path) -> dict:
    rows = [
        {"file_name": f"{stem}.png", "conditioning_image_file_name": f"hints/{stem}.png", "text": text}
        for stem, _, _, text in TRIPLES
    ]
    write_files(folder, {f"{stem}.png": image for stem, image, _, _ in TRIPLES})
    write_files(folder, {f"hints/{stem}.png": hint for stem, _, hint, _ in TRIPLES})
    write_files(folder, {"metadata.jsonl": jsonl(rows)})
    return {"source": "imagefolder", "condition_columns": {"hint": "conditioning_image"}}


def beside(folder: Path) -> dict:
    """Without metadata, and with hints of another type than the images."""
    write_files(folder, {f"sub/{stem}.png": image for stem, image, _, _ in TRIPLES})
    write_files(folder, {f"sub/{stem}.txt": text for stem, _, _, text in TRIPLES})
    hints = {f"hints/sub/{stem}.bmp": as_file(hint_of(n), "BMP") for n, (stem, *_) in enumerate(TRIPLES)}
    write_files(folder, hints)
    return {"source": "imagefolder", "condition_columns": {"hint": "hints/*.bmp"}}


def listed_and_beside(folder: Path) -> dict:
    """The metadata lists the images alone; the hints lie among them."""
    rows = [{"file_name": f"{stem}.png", "text": text} for stem, _, _, text in TRIPLES]
    write_files(folder, {f"{stem}.png": image for stem, image, _, _ in TRIPLES})
    write_files(folder, {f"{stem}_hint.png": hint for stem, _, hint, _ in TRIPLES})
    write_files(folder, {"metadata.jsonl": jsonl(rows)})
    return {"source": "imagefolder", "condition_columns": {"hint": "*_hint.png"}}


def in_parquet(folder: Path) -> dict:
    write_parquet(
        folder / "a.parquet",
        image=[{"bytes": image, "path": f"{stem}.png"} for stem, image, _, _ in TRIPLES],
        edges=[{"bytes": hint, "path": f"edges-{stem}.png"} for stem, _, hint, _ in TRIPLES],
        text=[text for *_, text in TRIPLES],
    )
    return {"source": "parquet", "condition_columns": {"hint": "edges"}}


def in_parquet_as_bytes(folder: Path) -> dict:
    columns = zip(*TRIPLES, strict=True)
    write_parquet(
        folder / "a.parquet", **dict(zip(("stem", "image", "edges", "text"), map(list, columns), strict=True))
    )
    return {"source": "parquet", "condition_columns": {"hint": "edges"}}


def in_tars(folder: Path) -> dict:
    for name, triples in (("a.tar", TRIPLES[:7]), ("b.tar", TRIPLES[7:])):
        members = {}
        for stem, image, hint, text in triples:
            members |= {f"{stem}.png": image, f"{stem}.hint.png": hint, f"{stem}.txt": text}
        write_tar(folder / name, members)
    options = {"image_column": "png", "caption_column": "txt", "condition_columns": {"hint": "hint.png"}}
    return {"source": "webdataset", **options}


def in_tars_by_another_ending(folder: Path) -> dict:
    """Datasets takes such members for bytes."""
    members = {}
    for stem, image, hint, text in TRIPLES:
        members |= {f"{stem}.png": image, f"{stem}.edges": hint, f"{stem}.txt": text}
    write_tar(folder / "a.tar", members)
    options = {"image_column": "png", "caption_column": "txt", "condition_columns": {"hint": "edges"}}
    return {"source": "webdataset", **options}


SOURCES = {
    listed: "hints/{}.png",
    beside: "hints/sub/{}.bmp",
    listed_and_beside: "{}_hint.png",
    in_parquet: "edges-{}.png",
    in_parquet_as_bytes: "edges",
    in_tars: "{}.hint.png",
    in_tars_by_another_ending: "edges",
}
"""How each source says where a hint is from."""


@dataclass
class Built:
    """A data set read back."""

    folder: Path
    rows: list[dict]
    inputs: list[dict]
    manifest: DatasetManifest

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        """Each input's name with `kept`, or with the reason why it was dropped."""
        return [(line["input"], line["reason"] if line["outcome"] == "dropped" else "kept") for line in self.inputs]

    @property
    def held_out(self) -> set[str]:
        return {row["caption"] for row in read_dataset(self.folder, "validation")}

    def bytes_by_file(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def build(tmp_path, make_params):
    """A function that builds a data set from fields of the section `dataset` and reads it back."""
    shipped = make_params().dataset.model_dump() | {"path": str(tmp_path / "in"), "validation_fraction": 0.5}

    def build(name: str = "out", **fields) -> Built:
        out = tmp_path / name
        build_dataset(DatasetParams.model_validate(shipped | fields), 0, out, tmp_path / "metrics.json")
        with (out / "inputs.csv").open(newline="", encoding="utf-8") as file:
            inputs = list(csv.DictReader(file))
        rows = [row for split in DatasetManifest.read(out).splits for row in read_dataset(out, split)]
        return Built(out, rows, inputs, DatasetManifest.read(out))

    return build


# ---------------------------------------------------------------- every kind of source


@pytest.mark.parametrize(("write", "origin"), SOURCES.items())
def test_every_source_gives_each_image_its_hint(write, origin, tmp_path, build):
    built = build(**write(tmp_path / "in"))
    assert {outcome for _, outcome in built.outcomes} == {"kept"}
    assert [line["hint"] for line in built.inputs] == [origin.format(stem) for stem, *_ in TRIPLES]
    assert {row["caption"] for row in built.rows} == {text for *_, text in TRIPLES}
    for row in built.rows:
        index = int(row["caption"].split()[-1])
        assert np.array_equal(np.asarray(decode_rgb(row["image"])), np.asarray(noise(index)))
        hint = Image.open(io.BytesIO(row["hint"]))
        assert hint.mode == "L"
        assert np.array_equal(np.asarray(hint), np.asarray(hint_of(index)))
    assert built.manifest.model_dump()["conditions"] == {"hint": {"channels": 1}}


def test_every_source_gives_the_same_rows_and_split(tmp_path, build):
    """By decoded pixels, however the hints are stored; and the split is that of the images without hints."""
    splits = set()
    for write in SOURCES:
        folder = tmp_path / write.__name__
        built = build(**write(folder), path=str(folder))
        splits.add(tuple(frozenset(row["id"] for row in read_dataset(built.folder, split)) for split in SPLITS))
        plain = build(**{**write(folder), "condition_columns": {}}, path=str(folder)) if write is listed else built
        assert plain.held_out == built.held_out
    assert len(splits) == 1


@pytest.mark.parametrize("world", ["shapes", "free_shapes"])
def test_generated_scenes_have_outlines(world, build):
    built = build(source="generated", num_scenes=20, world=world, condition_columns={"hint": "outline"})
    assert {line["hint"] for line in built.inputs} == {"outline"}
    assert built.manifest.conditions["hint"].channels == 1
    for row in built.rows:
        hint = Image.open(io.BytesIO(row["hint"]))
        assert (hint.mode, hint.size) == ("L", (64, 64))
        assert 40 < (np.asarray(hint) > 128).sum() < 600


def test_the_record_of_generated_scenes_names_another_world(build):
    fields = {"source": "generated", "num_scenes": 20, "new_fraction": 0.5}
    assert build(**fields).manifest.source == {"generated": 20}
    free = build(**fields, world="free_shapes")
    assert free.manifest.source == {"generated": 20, "world": "free_shapes", "new_fraction": 0.5}
    words = {word for row in free.rows for word in row["caption"].split()}
    assert not words & {"small", "large", "top", "bottom", "left", "right", "center"}
    assert all(row["caption"].endswith(" background") for row in free.rows)


def test_without_conditions_nothing_changes(build):
    """Ids, order and split as version 1 of the format has always had them."""
    built = build(source="generated", num_scenes=40)
    assert {name: split.ids_sha256 for name, split in built.manifest.splits.items()} == {
        "train": "32100804140a32fbf53ee9e7601a5a25daeca0735acc011a1d3f43770d308ffd",
        "validation": "2d44741b24c64cc6dabe5436434a86957b1e762a69bcbebbfac1749d54384708",
    }
    assert built.manifest.fingerprint == "b6c81070ce4991c2536524108486214f204474937d60947635e7bdc0236c8666"
    assert (built.folder / "inputs.csv").read_text().startswith("input,outcome,reason,id\n")
    columns = pq.read_schema(built.folder / "train-00000.parquet").names
    assert columns == ["id", "image", "caption", "width", "height"]


@pytest.mark.parametrize("write", [listed, beside, in_tars])
@pytest.mark.parametrize("max_train_samples", [None, 3])
def test_num_workers_change_no_byte(write, max_train_samples, tmp_path, build):
    options = write(tmp_path / "in") | {"max_train_samples": max_train_samples}
    built = [build(f"out{num}", num_workers=num, **options) for num in (0, 3)]
    assert built[0].bytes_by_file() == built[1].bytes_by_file()
    assert len(built[0].inputs) == NUM


# ---------------------------------------------------------------- ids and fingerprint


def test_ids_and_fingerprint_follow_the_hints_pixels(tmp_path, build):
    options = listed(tmp_path / "in")
    first = build(**options)
    write_files(
        tmp_path / "in/hints", {"03.png": as_file(hint_of(3).convert("RGB")), "04.png": as_file(hint_of(4), "BMP")}
    )
    stored_otherwise = build(**options)
    assert stored_otherwise.manifest.fingerprint == first.manifest.fingerprint
    assert stored_otherwise.inputs == first.inputs
    write_files(tmp_path / "in/hints", {"03.png": as_file(noise(50, mode="L"))})
    other = build(**options)
    assert [a["id"] == b["id"] for a, b in zip(first.inputs, other.inputs, strict=True)] == [n != 3 for n in range(NUM)]
    assert other.held_out == first.held_out
    assert other.manifest.fingerprint != first.manifest.fingerprint
    plain = build(**options | {"condition_columns": {}})
    assert not {row["id"] for row in plain.rows} & {row["id"] for row in first.rows}


def test_one_hint_in_colour_makes_three_channels(tmp_path, build):
    options = beside(tmp_path / "in")
    write_files(tmp_path / "in/hints/sub", {"05.bmp": as_file(noise(5), "BMP")})
    assert build(**options).manifest.conditions["hint"].channels == 3


# ---------------------------------------------------------------- what is dropped, noted or refused


def exif_damaged() -> bytes:
    """A JPEG on its side (8 x 6 once upright) whose XResolution is the rational -1/0."""
    entries = struct.pack("<HHHLHHHHLL", 2, 0x0112, 3, 1, 6, 0, 0x011A, 10, 1, 8 + 2 + 2 * 12 + 4)
    exif = b"II*\0" + struct.pack("<L", 8) + entries + b"\0\0\0\0" + struct.pack("<ll", -1, 0)
    return as_file(noise(0, 6, 8), "JPEG", exif=b"Exif\0\0" + exif)


def test_rows_without_a_usable_hint_are_dropped_by_a_countable_reason(tmp_path, build):
    options = listed(tmp_path / "in")
    rows = [
        {"file_name": f"{stem}.png", "conditioning_image_file_name": f"hints/{stem}.png", "text": text}
        for stem, _, _, text in TRIPLES
    ]
    rows[0]["conditioning_image_file_name"] = None
    write_files(tmp_path / "in", {"metadata.jsonl": jsonl(rows)})
    for stem in ("00", "01"):
        (tmp_path / f"in/hints/{stem}.png").unlink()
    odd = {"02": b"no image", "03": TRIPLES[3][2][:50], "04": as_file(noise(4, 6, 8)), "05": as_file(noise(5, 9, 9))}
    odd["06"] = as_file(Image.fromarray(np.full((6, 8), 7.5, dtype=np.float32)), "TIFF")
    odd["07"] = exif_damaged()
    write_files(tmp_path / "in/hints", {f"{stem}.png": data for stem, data in odd.items()})
    built = build(**options)
    assert built.outcomes[:7] == [
        ("00.png", "hint is missing"),
        ("01.png", "hint file is missing"),
        ("02.png", "hint can't be decoded: cannot identify image file"),
        ("03.png", "hint can't be decoded: image file is truncated"),
        ("04.png", "hint size differs: 6x8, image 8x6"),
        ("05.png", "hint size differs: 9x9, image 8x6"),
        ("06.png", "hint float grey outside 0..1: 7.5..7.5"),
    ]
    assert built.manifest.dropped == {
        "hint can't be decoded": 2,
        "hint file is missing": 1,
        "hint float grey outside 0..1": 1,
        "hint is missing": 1,
        "hint size differs": 2,
    }
    assert [line["hint"] for line in built.inputs[:3]] == ["", "hints/01.png", "hints/02.png"]
    assert built.inputs[7]["outcome"] in SPLITS
    assert built.inputs[7]["reason"] == "hint EXIF is damaged: argument out of range"
    assert built.manifest.noted == {"hint EXIF is damaged": 1}


def test_notes_on_an_image_and_on_its_hint_are_counted_apart(tmp_path, build):
    options = listed(tmp_path / "in")
    write_files(tmp_path / "in", {"07.png": exif_damaged(), "hints/07.png": exif_damaged()})
    built = build(**options)
    assert built.inputs[7]["reason"] == (
        "EXIF is damaged: argument out of range; hint EXIF is damaged: argument out of range"
    )
    assert built.manifest.noted == {"EXIF is damaged": 1, "hint EXIF is damaged": 1}
    assert read_json(built.folder.with_name("metrics.json"))["num_damaged_exif"] == 1


def test_a_hint_beside_an_image_may_be_missing(tmp_path, build):
    options = beside(tmp_path / "in")
    (tmp_path / "in/hints/sub/04.bmp").unlink()
    (tmp_path / "in/sub/05.png").unlink()  # its hint is no image all the same
    built = build(**options)
    assert len(built.inputs) == NUM - 1
    assert built.outcomes[4] == ("sub/04.png", "hint file is missing")
    assert built.manifest.dropped == {"hint file is missing": 1}


@pytest.mark.parametrize("write", [beside, listed_and_beside])
def test_a_hint_beside_no_image_is_no_input(write, tmp_path, build):
    options = write(tmp_path / "in")
    write_files(tmp_path / "in", {"hints/none.bmp": TRIPLES[0][2], "none_hint.png": TRIPLES[0][2]})
    other = {beside: ("none_hint.png", "caption is missing"), listed_and_beside: ("hints/none.bmp", UNLISTED)}[write]
    assert [found for found in build(**options).outcomes if found[1] != "kept"] == [other]


def test_rows_of_a_table_without_a_hint_are_dropped(tmp_path, build):
    hints = [{"bytes": hint, "path": None} for _, _, hint, _ in TRIPLES]
    hints[2], hints[3] = None, {"bytes": None, "path": None}
    images, texts = [image for _, image, _, _ in TRIPLES], [text for *_, text in TRIPLES]
    write_parquet(tmp_path / "in/a.parquet", image=images, edges=hints, text=texts)
    built = build(source="parquet", condition_columns={"hint": "edges"})
    assert built.manifest.dropped == {"hint is missing": 2}
    assert [line["hint"] for line in built.inputs[1:5]] == ["edges", "", "", "edges"]


def test_members_of_a_tar_without_a_hint_are_dropped(tmp_path, build):
    options = in_tars(tmp_path / "in")
    write_tar(tmp_path / "in/b.tar", {"x.png": as_file(noise(20)), "x.txt": "x"})
    assert build(**options).outcomes[7:] == [("row 7 x.png", "hint is missing")]


def test_images_that_are_neither_listed_nor_hints_are_counted(tmp_path, build):
    options = listed(tmp_path / "in")
    write_files(tmp_path / "in", {"hints/extra.png": as_file(noise(1)), "extra.png": as_file(noise(2))})
    assert build(**options).outcomes[NUM:] == [("extra.png", UNLISTED), ("hints/extra.png", UNLISTED)]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_too_little_memory_for_a_hint_names_it(num_workers, tmp_path, build, monkeypatch):
    def load(image):
        raise MemoryError

    options = listed(tmp_path / "in")
    write_files(tmp_path / "in/hints", {"01.png": as_file(hint_of(1), "GIF")})
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "load", load)
    with pytest.raises(
        InputError, match=r"^01\.png: not enough memory to decode this hint; lower dataset\.num_workers"
    ):
        build(**options, num_workers=num_workers)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_column_that_is_not_asked_for_is_not_decoded(tmp_path, build):
    options = listed(tmp_path / "in")
    write_files(tmp_path / "in/hints", {"01.png": "no image"})
    assert build(**options | {"condition_columns": {}}).outcomes[:NUM] == [
        (f"{stem}.png", "kept") for stem, *_ in TRIPLES
    ]


def misordered(folder: Path) -> dict:
    """Datasets gives `file_name` to the first column of files, and the images become the hints."""
    options = listed(folder)
    rows = [
        {"conditioning_image_file_name": f"hints/{stem}.png", "file_name": f"{stem}.png", "text": text}
        for stem, _, _, text in TRIPLES
    ]
    write_files(folder, {"metadata.jsonl": jsonl(rows)})
    return options


ERRORS = [
    (
        in_parquet,
        {"condition_columns": {"hint": "edge"}},
        "dataset.condition_columns.hint = 'edge': no such column; there are image, edges, text; nearest is 'edges'",
    ),
    (
        listed,
        {"condition_columns": {"hint": "conditioning"}},
        "dataset.condition_columns.hint = 'conditioning': no such column; there are image, conditioning_image, text; "
        "nearest is 'conditioning_image'",
    ),
    (
        in_tars,
        {"condition_columns": {"hint": "0.hint.png"}},
        "dataset.condition_columns.hint = '0.hint.png': no such column; there are ",
    ),
    (
        in_parquet,
        {"condition_columns": {"hint": "text"}, "caption_column": "edges"},
        "dataset.source = 'parquet': no usable image; dropped: {'caption is not text': 12}",
    ),
    (
        None,
        {"source": "generated", "condition_columns": {"hint": "edges"}},
        "dataset.condition_columns.hint = 'edges': no such column; there are outline; nearest is 'outline'",
    ),
    (in_parquet, {"condition_columns": {"hint": "*.png"}}, "dataset.condition_columns.hint = '*.png': no such column"),
    *(
        (
            beside,
            {"condition_columns": {"hint": pattern}},
            f"dataset.condition_columns.hint = '{pattern}': expected files in dataset.path with one * for the image's "
            "path without its suffix, such as 'hints/*.png'",
        )
        for pattern in ("hints/*/*.png", "../hints/*.png", "hints/../../*.png", "/hints/*.png")
    ),
    (
        beside,
        {"condition_columns": {"hint": "edges/*.png"}},
        "dataset.source = 'imagefolder': no usable image; dropped: {'caption is missing': 12, "
        "'hint file is missing': 12}",
    ),
    (
        misordered,
        {},
        "dataset.path = '{path}': file_name must stand before conditioning_image_file_name in the metadata",
    ),
    (
        in_parquet,
        {"group_column": "txt"},
        "dataset.group_column = 'txt': no such column; there are image, edges, text; nearest is 'text'",
    ),
    (in_parquet, {"group_column": "edges"}, "dataset.group_column = 'edges': doesn't hold texts or numbers: "),
]


@pytest.mark.parametrize(("write", "changes", "fault"), ERRORS)
def test_error_names_the_fault_and_leaves_nothing(write, changes, fault, tmp_path, build):
    options = write(tmp_path / "in") if write else {}
    with pytest.raises(InputError) as caught:
        build(**options | changes)
    assert fault.replace("{path}", str(tmp_path / "in")) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}


def test_a_column_of_numbers_holds_no_hints(tmp_path, build):
    write_parquet(tmp_path / "in/a.parquet", image=[as_file(noise(0))], edges=[1], text=["a"])
    with pytest.raises(InputError, match=r"^dataset\.condition_columns\.hint = 'edges': doesn't hold images: "):
        build(source="parquet", condition_columns={"hint": "edges"})


# ---------------------------------------------------------------- groups


def test_rows_of_a_group_stay_in_one_split(tmp_path, build):
    images, texts = [as_file(noise(n)) for n in range(60)], [f"image {n}" for n in range(60)]
    objects = [f"object {n % 15}" for n in range(60)]
    columns = {"image": images, "text": texts, "object": objects, "number": [n % 15 for n in range(60)]}
    write_parquet(tmp_path / "in/a.parquet", **columns)
    plain = build(source="parquet").held_out
    for column, test_fraction in (("object", 0.0), ("number", 0.0), ("object", 0.2)):
        built = build(source="parquet", group_column=column, test_fraction=test_fraction)
        sides = [
            {int(row["caption"].split()[1]) % 15 for row in read_dataset(built.folder, split)}
            for split in built.manifest.splits
        ]
        assert len(sides) == 2 + (test_fraction > 0)
        assert sum(map(len, sides)) == len(set.union(*sides)) == 15
        assert built.held_out != plain
    assert {row["id"] for row in built.rows} == {row["id"] for row in build(source="parquet").rows}


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_row_without_a_group_is_split_by_its_pixels(nothing, tmp_path, build):
    images, texts = [as_file(noise(n)) for n in range(40)], [f"image {n}" for n in range(40)]
    groups = [float(n % 3) if n % 2 else nothing for n in range(40)]
    write_parquet(tmp_path / "in/a.parquet", image=images, text=texts, group=groups)
    without = {text for text in texts if int(text.split()[1]) % 2 == 0}
    held_out = build(source="parquet", group_column="group").held_out
    assert held_out & without == build(source="parquet").held_out & without
    assert 0 < len(held_out & without) < 20


def test_an_image_folders_metadata_may_name_groups(tmp_path, build):
    rows = [
        {"file_name": f"{stem}.png", "text": text, "object": n // 3} for n, (stem, _, _, text) in enumerate(TRIPLES)
    ]
    write_files(
        tmp_path / "in", {f"{stem}.png": image for stem, image, _, _ in TRIPLES} | {"metadata.jsonl": jsonl(rows)}
    )
    built = build(source="imagefolder", group_column="object")
    outcome = [line["outcome"] for line in built.inputs]
    assert [len(set(outcome[n : n + 3])) for n in range(0, NUM, 3)] == [1] * 4


# ---------------------------------------------------------------- cleaning a hint


GREY = hint_of(0)
TRANSPARENT = Image.merge("LA", [GREY, noise(1, mode="L")])
PALETTE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8), mode="P")
PALETTE.putpalette([5 * n // 3 for n in range(144)])


@pytest.mark.parametrize(
    ("image", "mode", "values"),
    [
        (GREY, "L", np.asarray(GREY)),
        (GREY.convert("1"), "L", np.asarray(GREY.convert("1").convert("L"))),
        (GREY.convert("RGB"), "RGB", np.asarray(GREY)),
        (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "L", np.asarray(GREY)),
        (noise(2), "RGB", np.asarray(noise(2))),
        (PALETTE, "RGB", np.asarray(PALETTE.convert("RGB"))),
    ],
    ids=["grey", "two values", "grey as RGB", "16 bits", "RGB", "palette"],
)
def test_hints_keep_the_channels_of_their_file(image, mode, values):
    found = HINT.clean(as_file(image), (8, 6))
    stored = Image.open(io.BytesIO(found.data))
    assert stored.mode == mode
    assert found.channels == (1 if values.ndim == 2 else 3)
    expected = values if mode == "L" or values.ndim == 3 else np.stack([values] * 3, axis=-1)
    assert np.array_equal(np.asarray(stored), expected)
    assert found.sha256 == HINT.clean(as_file(Image.fromarray(values)), (8, 6)).sha256


def test_plain_hints_keep_their_bytes():
    for data in (as_file(GREY, "JPEG"), as_file(GREY), as_file(noise(2), "BMP")):
        assert HINT.clean(data, (8, 6)).data is data


def test_transparent_hints_get_black_behind_them():
    found = HINT.clean(as_file(TRANSPARENT), (8, 6))
    values = np.asarray(Image.open(io.BytesIO(found.data)))
    grey, alpha = (np.asarray(band).astype(float) for band in TRANSPARENT.split())
    assert values.shape == (6, 8)
    assert np.abs(values - grey * alpha / 255).max() <= 1
    see_through = Image.new("RGBA", (8, 6), (200, 100, 50, 0))
    assert not np.asarray(Image.open(io.BytesIO(HINT.clean(as_file(see_through), (8, 6)).data))).any()


def test_hints_are_turned_upright_by_their_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = HINT.clean(as_file(GREY, exif=exif), (6, 8))
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(found.data))), np.asarray(GREY.transpose(Image.Transpose.ROTATE_270))
    )
    with pytest.raises(BadImage, match=r"^size differs: 6x8, image 8x6$"):
        HINT.clean(as_file(GREY, exif=exif), (8, 6))


@pytest.mark.parametrize(
    ("hint", "image", "fits"),
    [
        ((64, 48), (64, 48), True),
        ((128, 96), (64, 48), True),
        ((64, 48), (1024, 768), True),
        ((100, 33), (1000, 333), True),
        ((100, 34), (1000, 333), True),  # rounded up
        ((100, 35), (1000, 333), False),
        ((1000, 333), (100, 34), True),
        ((512, 341), (3000, 2000), True),
        ((512, 342), (3000, 2000), True),
        ((512, 343), (3000, 2000), False),
        ((64, 64), (128, 96), False),
        ((48, 64), (64, 48), False),
    ],
)
def test_a_hint_has_its_images_aspect_ratio_within_a_pixel(hint, image, fits):
    data = as_file(Image.new("L", hint))
    if fits:
        HINT.clean(data, image)
    else:
        with pytest.raises(BadImage, match=f"^size differs: {hint[0]}x{hint[1]}, image {image[0]}x{image[1]}$"):
            HINT.clean(data, image)


# ---------------------------------------------------------------- cropping it with its image


@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("size", [(50, 32), (32, 61), (40, 40)])
def test_a_hint_is_cropped_with_its_image(size, center_crop):
    """A hint that is the image at twice its size lands on the image's own pixels."""
    smooth = noise(3, 7, 6).resize(size, Image.Resampling.BICUBIC)
    hint = as_file(smooth.resize((2 * size[0], 2 * size[1]), Image.Resampling.NEAREST))
    assert HINT.clean(hint, size).channels == 3
    crop = draw_crop(size, 32, center_crop, 0, "b")
    assert crop.left + crop.top > 0 or size == (40, 40)
    square = HINT.crop(hint, crop, 3)
    assert (square.shape, square.dtype) == ((3, 32, 32), np.uint8)
    image = (square_pixels(smooth, 32, center_crop, 0, "b") + 1) * 127.5
    right = np.abs(image - square).mean()
    assert right < 3
    shifted = [np.abs(np.roll(image, 1, axis=axis) - square).mean() for axis in (1, 2)]
    assert min(shifted) > 2 * right + 3


def test_random_crops_differ_between_images_and_seeds():
    crops = {draw_crop((200, 32), 32, False, seed, name) for seed in (0, 1) for name in ("a", "b")}
    assert len(crops) == 4
    assert {(crop.width, crop.height, crop.top) for crop in crops} == {(200, 32, 0)}


def test_resizing_a_hint_does_not_ring():
    values = np.zeros((40, 40), dtype=np.uint8)
    values[:, 20:] = 200
    square = HINT.crop(as_file(Image.fromarray(values)), draw_crop((80, 80), 16, True, 0, ""), 1)
    assert square.shape == (1, 16, 16)
    assert set(np.unique(square)) == {0, 200}


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_hints_have_as_many_channels_as_asked_for(channels):
    crop = draw_crop((8, 6), 6, True, 0, "")
    squares = [HINT.crop(as_file(image), crop, channels) for image in (GREY, GREY.convert("RGB"))]
    assert np.array_equal(squares[0], np.stack([np.asarray(GREY)[:, 1:7]] * channels))
    assert np.array_equal(squares[0], squares[1])


def test_hub_like_tables_of_datasets_itself(tmp_path, build):
    """As `push_to_hub` writes them, with features of Datasets in the file."""
    features = datasets.Features(
        {"image": datasets.Image(), "edges": datasets.Image(), "text": datasets.Value("string")}
    )
    rows = {
        "image": [{"bytes": image, "path": None} for _, image, _, _ in TRIPLES],
        "edges": [{"bytes": hint, "path": None} for _, _, hint, _ in TRIPLES],
        "text": [text for *_, text in TRIPLES],
    }
    (tmp_path / "in").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "in/a.parquet")
    built = build(source="parquet", condition_columns={"hint": "edges"})
    assert len(built.rows) == NUM
    assert {line["hint"] for line in built.inputs} == {"edges"}


@pytest.mark.parametrize(("with_hints", "num_rows"), [(False, 4), (True, 3)])
def test_hints_count_for_the_size_of_a_shard(with_hints, num_rows, tmp_path, build, monkeypatch):
    monkeypatch.setattr(shards, "_BATCH_ROWS", 1)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 800)
    options = in_parquet(tmp_path / "in")
    assert {(len(image), len(hint)) for _, image, hint, _ in TRIPLES} == {(218, 122)}
    built = build(**options if with_hints else options | {"condition_columns": {}})
    files = built.folder.glob("*.parquet")
    assert max(pq.read_metadata(path).num_rows for path in files) == num_rows
