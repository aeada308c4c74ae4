"""The data gate: from every kind of source to shards, with every input accounted for."""

import csv
import io
import json
import multiprocessing
import os
import struct
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import GifImagePlugin, Image

from sdtrain import dataset
from sdtrain.data import scenes
from sdtrain.data.images import decode_rgb
from sdtrain.data.shards import read_dataset
from sdtrain.dataset import build_dataset
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.manifests import SPLITS, TEST
from sdtrain.params.schema import DatasetParams

NUM = 12
UNLISTED = "not listed in the metadata, hidden, or of an unknown type"
UNDECODABLE = "can't be decoded: cannot identify image file"


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def image(index: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(index)).save(buffer, format=format)
    return buffer.getvalue()


PAIRS = [(f"{index:02}", image(index), f"image number {index}") for index in range(NUM)]
"""Stem, bytes and caption of the images that every kind of source holds here."""


def write_files(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def write_tar(path: Path, files: dict[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def write_parquet(path: Path, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def jsonl(rows: list[dict]) -> str:
    return "\n".join(map(json.dumps, rows))


def with_jsonl(folder: Path) -> dict:
    rows = [{"file_name": f"{stem}.png", "text": text} for stem, _, text in PAIRS]
    write_files(folder, {f"{stem}.png": data for stem, data, _ in PAIRS} | {"metadata.jsonl": jsonl(rows)})
    return {"source": "imagefolder"}


def with_csv(folder: Path) -> dict:
    lines = ["file_name,text", *(f"{stem}.png,{text}" for stem, _, text in PAIRS)]
    write_files(folder, {f"{stem}.png": data for stem, data, _ in PAIRS} | {"metadata.csv": "\n".join(lines)})
    return {"source": "imagefolder"}


def with_txt(folder: Path) -> dict:
    write_files(folder, {f"sub/{stem}.png": data for stem, data, _ in PAIRS})
    write_files(folder, {f"sub/{stem}.txt": f"{text}\n" for stem, _, text in PAIRS})
    return {"source": "imagefolder"}


def with_parquet(folder: Path) -> dict:
    structs = [{"bytes": data, "path": f"{stem}.png"} for stem, data, _ in PAIRS]
    texts = [text for _, _, text in PAIRS]
    write_parquet(folder / "a.parquet", image=structs[:5], text=texts[:5])
    write_parquet(folder / "b.parquet", image=structs[5:], text=texts[5:])
    return {"source": "parquet"}


def with_parquet_of_bytes(folder: Path) -> dict:
    columns = {"photo": [data for _, data, _ in PAIRS], "said": [text for _, _, text in PAIRS]}
    write_parquet(folder / "a.parquet", **columns)
    return {"source": "parquet", "image_column": "photo", "caption_column": "said"}


def with_webdataset(folder: Path) -> dict:
    for name, pairs in (("a.tar", PAIRS[:7]), ("b.tar", PAIRS[7:])):
        write_tar(
            folder / name,
            {f"{s}.{kind}": value for s, data, text in pairs for kind, value in (("png", data), ("txt", text))},
        )
    return {"source": "webdataset", "image_column": "png", "caption_column": "txt"}


FORMATS = [with_jsonl, with_csv, with_txt, with_parquet, with_parquet_of_bytes, with_webdataset]


@dataclass
class Built:
    """A data set read back: rows by split, and the lines of inputs.csv."""

    folder: Path
    rows: dict[str, list[dict]]
    inputs: list[dict]
    metrics: dict

    @property
    def captions(self) -> set[str]:
        return {row["caption"] for split in SPLITS for row in self.rows[split]}

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        """Each input's name with `kept`, or with the reason why it was dropped."""
        return [(line["input"], line["reason"] if line["outcome"] == "dropped" else "kept") for line in self.inputs]

    def ids(self, split: str) -> set[str]:
        return {row["id"] for row in self.rows[split]}

    def bytes_by_file(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def build(tmp_path, make_params):
    """A function that builds a data set from params of the section `dataset`, checks its accounts and reads it back."""

    def build(seed: int = 0, name: str = "out", **dataset) -> Built:
        params = make_params(dataset={"path": str(tmp_path / "in"), "validation_fraction": 0.5, **dataset}).dataset
        out, metrics = tmp_path / name, tmp_path / "metrics.json"
        build_dataset(params, seed, out, metrics)
        with (out / "inputs.csv").open(newline="", encoding="utf-8") as file:
            inputs = list(csv.DictReader(file))
        splits = (*SPLITS, TEST) if params.test_fraction else SPLITS
        built = Built(out, {split: list(read_dataset(out, split)) for split in splits}, inputs, read_json(metrics))
        for split in splits:
            assert [row["id"] for row in built.rows[split]] == [x["id"] for x in inputs if x["outcome"] == split]
        nums = {f"num_{split}": len(built.rows[split]) for split in splits}
        assert built.metrics == {
            "num_inputs": len(inputs),
            **nums,
            "num_dropped": len(inputs) - sum(nums.values()),
            "num_damaged_exif": sum(x["reason"].startswith("EXIF is damaged: ") for x in inputs),
        }
        assert not [x for x in inputs if x["outcome"] == "dropped" and not x["reason"]]
        assert sum(read_json(out / "manifest.json")["dropped"].values()) == built.metrics["num_dropped"]
        assert list(read_json(out / "manifest.json")["splits"]) == list(splits)
        return built

    return build


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_its_images_and_captions(write, tmp_path, build):
    built = build(**write(tmp_path / "in"))
    rows = [row for split in SPLITS for row in built.rows[split]]
    assert {row["caption"] for row in rows} == {text for _, _, text in PAIRS}
    assert len(rows) == len({row["id"] for row in rows}) == NUM
    for row in rows:
        assert np.array_equal(np.asarray(decode_rgb(row["image"])), pixels(int(row["caption"].split()[-1])))
        assert (row["width"], row["height"]) == (8, 6)


def test_every_format_gives_the_same_split(tmp_path, build):
    splits = set()
    for write in FORMATS:
        folder = tmp_path / write.__name__
        built = build(**write(folder), path=str(folder))
        splits.add(tuple(frozenset(row["id"] for row in built.rows[split]) for split in SPLITS))
    assert len(splits) == 1


def test_generated_scenes(build):
    built = build(source="generated", path="data/images", num_scenes=40, new_fraction=0.5)
    assert built.outcomes == [(f"row {index}", "kept") for index in range(40)]
    for row in built.rows["train"]:
        scene = scenes.measure(decode_rgb(row["image"]))
        assert f"{scene.color} {scene.shape}" in row["caption"]


@pytest.mark.parametrize(("fraction", "new"), [(0.0, 0), (1.0, 40)])
def test_new_fraction_of_generated_scenes(build, fraction, new):
    built = build(source="generated", path="data/images", num_scenes=40, new_fraction=fraction)
    measured = [scenes.measure(decode_rgb(row["image"])) for split in SPLITS for row in built.rows[split]]
    assert sum(bool(scene.new_concepts) for scene in measured) == new


def test_generated_scenes_are_a_function_of_the_seed(build):
    built = [
        build(seed, f"out{n}", source="generated", path="data/images", num_scenes=10).bytes_by_file()
        for n, seed in enumerate([3, 3, 4])
    ]
    assert built[0] == built[1] != built[2]


def test_every_input_of_a_folder_with_jsonl_is_accounted_for(tmp_path, build):
    with_jsonl(tmp_path / "in")
    rows = [{"file_name": f"{stem}.png", "text": text} for stem, _, text in PAIRS]
    rows += [
        {"file_name": "broken.png", "text": "broken"},
        {"file_name": "empty.jpg", "text": "an empty file"},
        {"file_name": "gone.png", "text": "a file that isn't there"},
        {"file_name": "z0.png", "text": " \n"},
        {"file_name": "z1.png", "text": None},
        {"file_name": "z2.png"},
    ]
    write_files(tmp_path / "in", {f"z{n}.png": image(20 + n) for n in range(3)})
    write_files(tmp_path / "in", {"broken.png": "no image", "empty.jpg": b"", "metadata.jsonl": jsonl(rows)})
    write_files(tmp_path / "in", {"sub/extra.PNG": image(30), ".hidden.png": image(31), "notes.md": "no input"})
    assert build(source="imagefolder").outcomes == [
        *((f"{stem}.png", "kept") for stem, _, _ in PAIRS),
        ("broken.png", UNDECODABLE),
        ("empty.jpg", UNDECODABLE),
        ("gone.png", "file is missing"),
        ("z0.png", "caption is empty"),
        ("z1.png", "caption is missing"),
        ("z2.png", "caption is missing"),
        (".hidden.png", UNLISTED),
        ("sub/extra.PNG", UNLISTED),
    ]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are text always")
def test_an_image_whose_name_is_no_text_is_accounted_for(tmp_path, build):
    with_jsonl(tmp_path / "in")
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.png")).write_bytes(image(20))
    assert build(source="imagefolder").outcomes[NUM:] == [(r"caf\udce9.png", UNLISTED)]


def test_every_input_of_a_folder_with_csv_is_accounted_for(tmp_path, build):
    with_csv(tmp_path / "in")
    lines = [f"{stem}.png,zwölf" for stem, _, _ in PAIRS[2:10]]
    lines = ["file_name,text", '00.png,"one, two"', "01.png,", *lines, "gone.png,gone"]
    write_files(tmp_path / "in", {"metadata.csv": "\n".join(lines)})
    built = build(source="imagefolder")
    assert built.outcomes == [
        ("00.png", "kept"),
        ("01.png", "caption is missing"),
        *((f"{stem}.png", "kept") for stem, _, _ in PAIRS[2:10]),
        ("gone.png", "file is missing"),
        *((f"{stem}.png", UNLISTED) for stem, _, _ in PAIRS[10:]),
    ]
    assert built.captions == {"one, two", "zwölf"}


def test_every_input_of_a_folder_with_txt_is_accounted_for(tmp_path, build):
    with_txt(tmp_path / "in")
    write_files(tmp_path / "in", {"a.png": image(20), "b.png": image(21), "b.txt": " \n", "c.png": "", "c.txt": "c"})
    write_files(tmp_path / "in", {".hidden.png": image(22), ".hidden.txt": "hidden", "alone.txt": "no input"})
    assert build(source="imagefolder").outcomes == [
        ("a.png", "caption is missing"),
        ("b.png", "caption is empty"),
        ("c.png", UNDECODABLE),
        *((f"sub/{stem}.png", "kept") for stem, _, _ in PAIRS),
        (".hidden.png", UNLISTED),
    ]


def test_every_input_of_parquet_is_accounted_for(tmp_path, build):
    images = [{"bytes": data, "path": f"{stem}.png"} for stem, data, _ in PAIRS]
    texts = [text for _, _, text in PAIRS]
    odd = [{"bytes": b"no image", "path": "x.png"}, {"bytes": None, "path": None}, None, images[0], images[1]]
    write_parquet(tmp_path / "in/a.parquet", image=images + odd, text=[*texts, "x", "y", "z", "", None])
    assert build(source="parquet").outcomes == [
        *((f"row {index} {index:02}.png", "kept") for index in range(NUM)),
        ("row 12 x.png", UNDECODABLE),
        ("row 13", "image is missing"),
        ("row 14", "image is missing"),
        ("row 15 00.png", "caption is empty"),
        ("row 16 01.png", "caption is missing"),
    ]


def test_every_input_of_webdataset_is_accounted_for(tmp_path, build):
    options = with_webdataset(tmp_path / "in")
    odd = {"x.png": image(20), "y.png": "no image", "y.txt": "y", "z.txt": "z", "w.png": image(21), "w.txt": " "}
    good = {f"{s}.{kind}": value for s, data, text in PAIRS[7:] for kind, value in (("png", data), ("txt", text))}
    write_tar(tmp_path / "in/b.tar", good | odd)
    assert build(**options).outcomes == [
        *((f"row {index} {index:02}.png", "kept") for index in range(NUM)),
        ("row 12 x.png", "caption is missing"),
        ("row 13 y.png", UNDECODABLE),
        ("row 14", "image is missing"),
        ("row 15 w.png", "caption is empty"),
    ]


def test_captions_that_are_no_text_are_dropped(tmp_path, build):
    images = [data for _, data, _ in PAIRS]
    write_parquet(tmp_path / "in/a.parquet", image=images, text=list(range(NUM)))
    with pytest.raises(InputError, match=r"no usable image; dropped: \{'caption is not text': 12\}"):
        build(source="parquet")


def test_names_that_sound_like_splits_are_ordinary_images(tmp_path, build):
    names = ["test", "train/a", "validation/b", "dev-1", "eval"]
    write_files(tmp_path / "in", {f"{name}.png": image(index) for index, name in enumerate(names)})
    write_files(tmp_path / "in", {f"{name}.txt": name for name in names})
    assert build(source="imagefolder").outcomes == [(f"{name}.png", "kept") for name in sorted(names)]


@pytest.mark.parametrize("write", [with_txt, with_parquet, with_webdataset])
def test_a_path_may_hold_brackets(write, tmp_path, build):
    folder = tmp_path / "photos [2026] *"
    assert build(**write(folder), path=str(folder)).metrics["num_dropped"] == 0


@pytest.mark.parametrize("write", [with_jsonl, with_txt])
def test_a_path_may_be_a_link_or_relative(write, tmp_path, build, monkeypatch):
    options = write(tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    plain = build(**options)
    assert build(**options, path="in").inputs == plain.inputs
    assert build(**options, path="link").inputs == plain.inputs


@pytest.mark.parametrize("name", ["a.parquet", "b.parquet"])
def test_a_path_may_be_one_file(name, tmp_path, build):
    with_parquet(tmp_path / "in")
    built = build(source="parquet", path=str(tmp_path / "in" / name))
    assert len(built.inputs) == {"a.parquet": 5, "b.parquet": 7}[name]


def test_several_metadata_files_are_read_in_the_order_of_names(tmp_path, build):
    for index in range(6):  # Datasets alone reads them in the order of a set
        row = {"file_name": "x.png", "text": f"image {index}"}
        write_files(tmp_path / "in" / f"d{index}", {"x.png": image(index), "metadata.jsonl": jsonl([row])})
    assert build(source="imagefolder").outcomes == [(f"d{index}/x.png", "kept") for index in range(6)]


def test_metadata_without_captions_leaves_them_to_txt_files(tmp_path, build):
    with_txt(tmp_path / "in")
    rows = [{"file_name": f"sub/{stem}.png", "author": "someone"} for stem, _, _ in PAIRS[:8]]
    write_files(tmp_path / "in", {"metadata.jsonl": jsonl(rows)})
    built = build(source="imagefolder")
    assert built.captions == {text for _, _, text in PAIRS[:8]}
    assert built.outcomes[8:] == [(f"sub/{stem}.png", UNLISTED) for stem, _, _ in PAIRS[8:]]


def test_white_space_of_captions_is_collapsed(tmp_path, build):
    with_txt(tmp_path / "in")
    write_files(tmp_path / "in", {"sub/00.txt": "  a\tphoto \r\n of  it \n"})
    assert "a photo of it" in build(source="imagefolder").captions


def test_transparent_images_get_the_background(tmp_path, build):
    with_txt(tmp_path / "in")
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(tmp_path / "in/sub/00.png")
    built = build(source="imagefolder", alpha_background="#0a141e")
    [row] = [row for split in SPLITS for row in built.rows[split] if row["caption"] == PAIRS[0][2]]
    assert decode_rgb(row["image"]).getcolors() == [(48, (10, 20, 30))]


def rotated_with_damaged_exif(index: int) -> bytes:
    """A JPEG that lies on its side and whose XResolution is the rational -1/0."""
    entries = struct.pack("<HHHLHHHHLL", 2, 0x0112, 3, 1, 6, 0, 0x011A, 10, 1, 8 + 2 + 2 * 12 + 4)
    exif = b"II*\0" + struct.pack("<L", 8) + entries + b"\0\0\0\0" + struct.pack("<ll", -1, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels(index)).save(buffer, format="JPEG", exif=b"Exif\0\0" + exif)
    return buffer.getvalue()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_images_with_damaged_exif_are_kept_upright_and_counted(num_workers, tmp_path, build, capsys):
    with_txt(tmp_path / "in")
    names = ["03", "07"]
    write_files(tmp_path / "in/sub", {f"{name}.png": rotated_with_damaged_exif(int(name)) for name in names})
    built = build(source="imagefolder", num_workers=num_workers)
    noted = {line["input"]: line["reason"] for line in built.inputs if line["reason"]}
    assert noted == {f"sub/{name}.png": "EXIF is damaged: argument out of range" for name in names}
    sizes = {row["caption"]: (row["width"], row["height"]) for split in SPLITS for row in built.rows[split]}
    assert sizes == {text: (6, 8) if stem in names else (8, 6) for stem, _, text in PAIRS}
    assert built.metrics["num_damaged_exif"] == 2
    assert read_json(built.folder / "manifest.json")["noted"] == {"EXIF is damaged": 2}
    assert "kept with a note: {'EXIF is damaged': 2}" in capsys.readouterr().out


def test_odd_images_are_dropped_with_a_countable_reason(tmp_path, build, monkeypatch):
    def load(image):
        raise AttributeError(f"a {image.format} without end")

    with_txt(tmp_path / "in")
    Image.fromarray(np.float32([[0, 7.5]])).save(tmp_path / "in/sub/00.tiff")
    (tmp_path / "in/sub/00.png").unlink()
    write_files(tmp_path / "in/sub", {"01.png": image(1, "GIF")})
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "load", load)
    built = build(source="imagefolder")
    assert built.outcomes[:2] == [
        ("sub/00.tiff", "float grey outside 0..1: 0..7.5"),
        ("sub/01.png", "can't be decoded: a GIF without end"),
    ]
    dropped = read_json(built.folder / "manifest.json")["dropped"]
    assert dropped == {"float grey outside 0..1": 1, "can't be decoded": 1}


@pytest.mark.parametrize("num_workers", [0, 3])
def test_too_little_memory_names_the_image_and_drops_nothing(num_workers, tmp_path, build, monkeypatch):
    def load(image):
        raise MemoryError

    with_txt(tmp_path / "in")
    write_files(tmp_path / "in/sub", {"01.png": image(1, "GIF")})
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "load", load)
    with pytest.raises(InputError, match=r"^sub/01\.png: not enough memory to decode this image; lower dataset.num_w"):
        build(source="imagefolder", num_workers=num_workers)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.mark.parametrize("fractions", [{}, {"validation_fraction": 0.3, "test_fraction": 0.4}])
def test_copies_of_an_image_land_on_one_side(tmp_path, build, fractions):
    for index in range(6):
        for copy, format in enumerate(["png", "bmp", "tiff", "png"]):
            name = f"{index}-{copy}"
            write_files(tmp_path / "in", {f"{name}.{format}": image(index, format), f"{name}.txt": f"{index} {name}"})
    built = build(source="imagefolder", **fractions)
    sides = [{row["caption"].split()[0] for row in rows} for rows in built.rows.values()]
    assert built.metrics["num_dropped"] == 0
    assert len(built.inputs) == len({line["id"] for line in built.inputs}) == 24
    assert sum(map(len, sides)) == len(set.union(*sides)) == 6


def test_every_seed_and_every_crowd_holds_out_the_same_images(tmp_path, build):
    options = with_txt(tmp_path / "in") | {"validation_fraction": 0.3, "test_fraction": 0.4}
    first, other_seed = build(0, **options), build(1, **options)
    write_files(tmp_path / "in", {"a.png": image(50), "a.txt": "another"})
    more = build(0, **options)
    for split in ("validation", TEST):
        assert other_seed.ids(split) == first.ids(split)
        assert more.ids(split) >= first.ids(split)


def test_a_test_split_takes_from_the_training_images_alone(build):
    def built(validation: float, test: float) -> Built:
        fractions = {"validation_fraction": validation, "test_fraction": test}
        return build(source="generated", path="data/images", num_scenes=200, **fractions)

    plain, some, more, fewer = built(0.2, 0.0), built(0.2, 0.1), built(0.2, 0.3), built(0.1, 0.3)
    assert plain.ids("validation") == some.ids("validation") == more.ids("validation") > fewer.ids("validation")
    assert some.ids(TEST) < more.ids(TEST) == fewer.ids(TEST)
    for tested in (some, more):
        assert tested.ids("train") | tested.ids(TEST) == plain.ids("train")
        assert not tested.ids("train") & tested.ids(TEST)
    for ids, fraction in ((more.ids("validation"), 0.2), (some.ids(TEST), 0.1), (more.ids(TEST), 0.3)):
        assert abs(len(ids) - 200 * fraction) < 3 * (200 * fraction * (1 - fraction)) ** 0.5


def test_without_a_test_split_nothing_says_so(build):
    built = build(source="generated", path="data/images", num_scenes=10)
    assert "test" not in {*built.metrics, *read_json(built.folder / "manifest.json")["splits"]}
    assert not list(built.folder.glob("test*"))


def test_max_train_samples_counts_training_images_beside_a_test_split(tmp_path, build):
    options = with_txt(tmp_path / "in") | {"validation_fraction": 0.3, "test_fraction": 0.4}
    some, whole = build(**options, max_train_samples=2), build(**options)
    assert len(whole.rows["train"]) > len(some.rows["train"]) == 2
    assert some.ids(TEST) <= whole.ids(TEST)


@pytest.mark.parametrize("write", [with_jsonl, with_webdataset])
@pytest.mark.parametrize("max_train_samples", [None, 3])
def test_num_workers_change_no_byte(write, max_train_samples, tmp_path, build):
    options = write(tmp_path / "in")
    if write is with_jsonl:
        write_files(tmp_path / "in", {"03.png": "broken", "extra.png": image(20)})
    built = [
        build(name=f"out{num}", num_workers=num, max_train_samples=max_train_samples, **options).bytes_by_file()
        for num in (0, 3)
    ]
    assert built[0] == built[1]


def test_max_train_samples(tmp_path, build):
    options = with_txt(tmp_path / "in")
    whole = build(**options)
    some = build(**options, max_train_samples=3)
    assert len(whole.rows["train"]) > len(some.rows["train"]) == 3
    assert some.captions < whole.captions
    assert len(some.inputs) == NUM
    assert {line["reason"] for line in some.inputs} == {"", "beyond max_train_samples"}


def test_max_train_samples_above_the_number_of_images_takes_all(tmp_path, build):
    options = with_txt(tmp_path / "in")
    assert build(**options, max_train_samples=1000).captions == {text for _, _, text in PAIRS}


def test_max_train_samples_are_drawn_from_the_seed(tmp_path, build):
    options = with_txt(tmp_path / "in")
    taken = [
        tuple(row["id"] for row in build(seed, **options, max_train_samples=3).rows["train"]) for seed in (0, 0, 1)
    ]
    assert taken[0] == taken[1] != taken[2]


def test_fingerprint_follows_the_rows(tmp_path, build):
    def fingerprint(**changes) -> str:
        return read_json(build(**options, **changes).folder / "manifest.json")["fingerprint"]

    options = with_txt(tmp_path / "in")
    first = fingerprint()
    assert fingerprint(num_workers=2) == first
    assert fingerprint(validation_fraction=0.2) != first
    write_files(tmp_path / "in", {"sub/00.txt": "another caption"})
    assert fingerprint() != first


def garbage(name: str):
    def write(folder: Path) -> None:
        write_files(folder, {name: "neither this nor that"})

    return write


def numbers_for_images(folder: Path) -> None:
    write_parquet(folder / "a.parquet", image=list(range(3)), text=["a", "b", "c"])


def broken_images(folder: Path) -> None:
    write_files(folder, {"a.png": "", "a.txt": "a", "b.png": "broken", "b.txt": "b", "c.png": image(0)})


def metadata_without_rows(folder: Path) -> None:
    write_files(folder, {"a.png": image(0), "metadata.jsonl": ""})


ERRORS = [
    (None, {"source": "parquet"}, "dataset.path = '{path}': no such file or folder"),
    (Path.mkdir, {"source": "imagefolder"}, "dataset.path = '{path}': the folder has no images (.avif, .bmp, "),
    (with_parquet, {"source": "imagefolder"}, "dataset.path = '{path}': the folder has no images"),
    (with_parquet, {"source": "webdataset"}, "dataset.path = '{path}': the folder has no .tar files"),
    (with_txt, {"source": "parquet"}, "dataset.path = '{path}': the folder has no .parquet files"),
    (
        with_parquet,
        {"caption_column": "texts"},
        "dataset.caption_column = 'texts': no such column; there are image, text; nearest is 'text'",
    ),
    (
        with_parquet,
        {"image_column": "img"},
        "dataset.image_column = 'img': no such column; there are image, text; nearest is 'image'",
    ),
    (
        with_webdataset,
        {"image_column": "jpg"},
        "dataset.image_column = 'jpg': no such column; there are png, txt, __key__, __url__; nearest is 'png'",
    ),
    (
        with_jsonl,
        {"caption_column": "caption"},
        "dataset.caption_column = 'caption': no such column in '{path}'; its metadata has image, text, and there is ",
    ),
    (numbers_for_images, {"source": "parquet"}, "dataset.image_column = 'image': doesn't hold images: "),
    (garbage("a.parquet"), {"source": "parquet"}, "dataset.path = '{path}': can't be read as parquet: "),
    (garbage("a.tar"), {"source": "webdataset"}, "dataset.path = '{path}': can't be read as webdataset: "),
    (metadata_without_rows, {"source": "imagefolder"}, "dataset.path = '{path}': can't be read as imagefolder: "),
    (
        broken_images,
        {"source": "imagefolder"},
        "dataset.source = 'imagefolder': no usable image; dropped: {\"can't be decoded\": 2, 'caption is missing': 1}",
    ),
    (
        with_txt,
        {"validation_fraction": 1e-9},
        "dataset.validation_fraction = 1e-09: leaves no validation image of 12; raise it, or add images",
    ),
    (
        with_txt,
        {"validation_fraction": 0.999999},
        "dataset.validation_fraction = 0.999999: leaves no train image of 12; lower it, or add images",
    ),
    (
        with_txt,
        {"test_fraction": 1e-9},
        "dataset.test_fraction = 1e-09: leaves no test image of 12; raise it, set it to 0, or add images",
    ),
    (
        with_txt,
        {"test_fraction": 0.499999},
        "dataset.validation_fraction = 0.5, dataset.test_fraction = 0.499999: leave no train image of 12; lower one, "
        "or add images",
    ),
]


@pytest.mark.parametrize(("write", "changes", "fault"), ERRORS)
def test_error_names_the_fault_and_touches_nothing(write, changes, fault, tmp_path, build):
    options = (write and write(tmp_path / "in")) or {}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "older.txt").write_text("older")
    with pytest.raises(InputError) as caught:
        build(**options | changes)
    assert fault.replace("{path}", str(tmp_path / "in")) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} - {"in"} == {"out"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["older.txt"]


def test_an_error_leaves_no_folder(tmp_path, build):
    with pytest.raises(InputError):
        build(source="imagefolder")
    assert list(tmp_path.iterdir()) == []


def build_until_killed(params: DatasetParams, out: Path) -> None:
    """Build, but die at the first image, by when Datasets has filled its cache."""
    dataset.clean_image = lambda *_: os._exit(9)
    build_dataset(params, 0, out, out.with_name("metrics.json"))


def test_what_a_killed_run_left_is_gone_after_the_next(tmp_path, build, make_params):
    options = with_parquet(tmp_path / "in")
    params = make_params(dataset={"path": str(tmp_path / "in"), "validation_fraction": 0.5, **options}).dataset
    killed = multiprocessing.get_context("spawn").Process(target=build_until_killed, args=(params, tmp_path / "out"))
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    assert any(path.is_file() for path in (tmp_path / "out.scratch.partial").rglob("*"))
    write_files(tmp_path, {"tmpab12_xyz.partial/cache.arrow": "of an older version, which drew a random name"})
    others = {"tmp-mine.partial", "tmpab12_xy.partial", "other.scratch.partial", "tmpab12_xyz"}
    write_files(tmp_path, {f"{name}/file": "not ours" for name in others})
    build(**options)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "metrics.json", *others}


def test_success_replaces_an_older_data_set(tmp_path, build):
    options = with_parquet(tmp_path / "in")
    write_files(tmp_path / "out", {"older.txt": "older"})
    assert {path.name for path in build(**options).folder.iterdir()} == {
        "inputs.csv",
        "manifest.json",
        "train-00000.parquet",
        "validation-00000.parquet",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "metrics.json"}
