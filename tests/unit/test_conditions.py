"""Conditions: read from every kind of source, gated and cropped with their image."""

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from sdtrain.data import scenes
from sdtrain.data.conditions import clean_condition, condition_pixels, read_hint
from sdtrain.data.edges import canny_edges
from sdtrain.data.images import BadImage, square_pixels
from sdtrain.data.shards import read_dataset
from sdtrain.dataset import build_dataset
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.manifests import DatasetManifest
from sdtrain.params.schema import DatasetParams
from tests.conftest import shrunk_tree

NUM = 24


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def picture(number: int, size: tuple[int, int] = (20, 12)) -> bytes:
    return png(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def hint(number: int, size: tuple[int, int] = (20, 12)) -> bytes:
    return png(np.random.default_rng(1000 + number).integers(0, 256, size[::-1], dtype=np.uint8))


def build(folder: Path, source: str, columns: dict, **changes) -> Path:
    tree = shrunk_tree(dataset={"source": source, "path": str(folder), "validation_fraction": 0.3, **changes})[
        "dataset"
    ]
    params = DatasetParams.model_validate({**tree, "condition_columns": columns, "num_workers": 2})
    out = folder.parent / "out"
    build_dataset(params, 0, out, folder.parent / "metrics.json")
    return out


def outcomes(out: Path) -> list[dict]:
    with (out / "inputs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows(out: Path) -> dict[str, dict]:
    return {row["caption"]: row for split in ("train", "validation") for row in read_dataset(out, split)}


def write_parquet(folder: Path) -> dict:
    features = datasets.Features(
        image=datasets.Image(), conditioning_image=datasets.Image(), text=datasets.Value("string")
    )
    table = {
        "image": [{"bytes": picture(i), "path": None} for i in range(NUM)],
        "conditioning_image": [{"bytes": hint(i), "path": None} for i in range(NUM)],
        "text": [f"caption {i}" for i in range(NUM)],
    }
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "rows.parquet")
    return {"hint": "conditioning_image"}


def write_tars(folder: Path) -> dict:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for i in range(NUM):
            for suffix, data in (("png", picture(i)), ("hint.png", hint(i)), ("txt", f"caption {i}".encode())):
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return {"hint": "hint.png"}


def write_listed_folder(folder: Path) -> dict:
    (folder / "hints").mkdir()
    lines = []
    for i in range(NUM):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / "hints" / f"{i}.png").write_bytes(hint(i))
        names = {"file_name": f"{i}.png", "conditioning_image_file_name": f"hints/{i}.png"}
        lines.append(json.dumps({**names, "text": f"caption {i}", "number": i}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"hint": "conditioning_image"}


def write_plain_folder(folder: Path) -> dict:
    """Captions and hints beside the images, in folders of classes."""
    for i in range(NUM):
        place = folder / f"class{i % 2}"
        (folder / "hints" / place.name).mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True)
        (place / f"{i}.png").write_bytes(picture(i))
        (place / f"{i}.txt").write_text(f"caption {i}")
        (folder / "hints" / place.name / f"{i}.png").write_bytes(hint(i))
    return {"hint": "hints/*.png"}


def write_folder_with_patterns(folder: Path) -> dict:
    """Listed images, whose hints the metadata doesn't list."""
    write_listed_folder(folder)
    lines = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(NUM)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"hint": "hints/*.png"}


WRITERS = [
    ("parquet", write_parquet),
    ("webdataset", write_tars),
    ("imagefolder", write_listed_folder),
    ("imagefolder", write_plain_folder),
    ("imagefolder", write_folder_with_patterns),
]


@pytest.mark.parametrize(("source", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_every_source_gives_each_image_its_own_hint(tmp_path, source, write):
    folder = tmp_path / "in"
    folder.mkdir()
    columns = write(folder)
    names = {"webdataset": {"image_column": "png", "caption_column": "txt"}}.get(source, {})
    out = build(folder, source, columns, **names)
    found = rows(out)
    assert len(found) == NUM
    for i in range(NUM):
        row = found[f"caption {i}"]
        assert Image.open(io.BytesIO(row["hint"])).tobytes() == Image.open(io.BytesIO(hint(i))).tobytes()
        assert Image.open(io.BytesIO(row["image"])).tobytes() == Image.open(io.BytesIO(picture(i))).tobytes()
    assert DatasetManifest.read(out).conditions["hint"].channels == 1
    table = outcomes(out)
    assert len(table) == NUM, "hints are no inputs of their own"
    assert all(row["hint"] for row in table)
    if write is write_plain_folder:
        assert {(row["input"], row["hint"]) for row in table} >= {("class1/3.png", "hints/class1/3.png")}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (None, "hint is missing"),
        (b"", "hint can't be decoded: "),
        (hint(0)[:60], "hint can't be decoded: "),
        (hint(0, (12, 20)), "hint size differs: 12x20, image 20x12"),
        (hint(0, (40, 30)), "hint size differs: 40x30, image 20x12"),
    ],
)
def test_a_bad_hint_drops_its_image_and_is_counted(tmp_path, broken, reason):
    folder = tmp_path / "in"
    folder.mkdir()
    columns = write_plain_folder(folder)
    file = folder / "hints" / "class1" / "5.png"
    file.unlink()
    if broken is not None:
        file.write_bytes(broken)
    out = build(folder, "imagefolder", columns)
    (dropped,) = [row for row in outcomes(out) if row["outcome"] == "dropped"]
    assert dropped["input"] == "class1/5.png"
    assert dropped["reason"].startswith(reason)
    assert read_json(out / "manifest.json")["dropped"] == {dropped["reason"].split(":")[0]: 1}


def test_a_larger_hint_of_the_same_shape_is_kept(tmp_path):
    assert clean_condition(hint(0, (41, 25)), (20, 12)).is_grey
    with pytest.raises(BadImage, match=r"size differs: 41x28, image 20x12"):
        clean_condition(hint(0, (41, 28)), (20, 12))


def test_colours_are_kept_where_one_hint_has_some(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    columns = write_plain_folder(folder)
    (folder / "hints" / "class0" / "0.png").write_bytes(picture(7))
    out = build(folder, "imagefolder", columns)
    assert DatasetManifest.read(out).conditions["hint"].channels == 3
    row = rows(out)["caption 0"]
    pixels = condition_pixels(row, "hint", 3, 12, True, 0)
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(picture(7))))[:, 4:16].transpose(2, 0, 1))


def test_ids_and_fingerprint_follow_the_hints(tmp_path):
    found = []
    for number, change in enumerate((False, True)):
        folder = tmp_path / str(number) / "in"
        folder.mkdir(parents=True)
        columns = write_plain_folder(folder)
        if change:
            (folder / "hints" / "class0" / "0.png").write_bytes(hint(500))
        out = build(folder, "imagefolder", columns)
        ids = {caption: row["id"] for caption, row in rows(out).items()}
        found.append((ids, DatasetManifest.read(out).fingerprint))
    (first, second), (one, other) = zip(*found, strict=True)
    assert [caption for caption in first if first[caption] != second[caption]] == ["caption 0"]
    assert one != other


def test_a_group_stays_in_one_split(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_listed_folder(folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [{**line, "object": f"object {i // 4}"} for i, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = build(folder, "imagefolder", {"hint": "conditioning_image"}, group_column="object")
    splits = {}
    for row in outcomes(out):
        number = int(row["input"].removesuffix(".png"))
        splits.setdefault(number // 4, set()).add(row["outcome"])
    assert all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {"train", "validation"}


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (
            {"hint": "conditoning_image"},
            {},
            r"dataset.condition_columns.hint = 'conditoning_image': no such column; there are .*; nearest is "
            r"'conditioning_image'",
        ),
        ({"hint": "number"}, {}, r"dataset.condition_columns.hint = 'number': doesn't hold images"),
        ({}, {"group_column": "objekt"}, r"dataset.group_column = 'objekt': no such column; there are "),
        ({"hint": "*.png"}, {}, r"dataset.condition_columns = {'hint': '\*.png'}: matches every image in "),
    ],
)  # fmt: skip
def test_a_wrong_column_is_refused(tmp_path, columns, changes, message):
    folder = tmp_path / "in"
    folder.mkdir()
    write_listed_folder(folder)
    with pytest.raises(InputError, match=message):
        build(folder, "imagefolder", columns, **changes)
    assert not (tmp_path / "out").exists()


def test_the_generated_world_has_outlines_only(tmp_path):
    tree = shrunk_tree()["dataset"]
    params = DatasetParams.model_validate({**tree, "condition_columns": {"hint": "edges"}})
    with pytest.raises(InputError, match=r"condition_columns.hint = 'edges': no such column; 'generated' has outline"):
        build_dataset(params, 0, tmp_path / "out", tmp_path / "metrics.json")


def test_outlines_lie_on_the_shapes(tmp_path):
    tree = shrunk_tree(dataset={"world": "free_shapes"})["dataset"]
    params = DatasetParams.model_validate({**tree, "condition_columns": {"hint": "outline"}, "new_fraction": 1.0})
    build_dataset(params, 0, tmp_path / "out", tmp_path / "metrics.json")
    for row in read_dataset(tmp_path / "out", "train"):
        assert not any(word in row["caption"] for word in ("large", "small", "left", "right", "center"))
        mask = scenes.object_mask(Image.open(io.BytesIO(row["image"])))
        edge = np.asarray(Image.open(io.BytesIO(row["hint"]))).astype(float) / 255
        assert edge.max() > 0.5
        assert (edge * mask).sum() > 0.8 * edge.sum(), "inside the shape"
    assert DatasetManifest.read(tmp_path / "out").source == {
        "generated": 60, "world": "free_shapes", "new_fraction": 1.0
    }  # fmt: skip


def test_a_free_place_is_inside_and_of_every_size():
    rng = np.random.default_rng(0)
    placements = [scenes.place_freely(rng) for _ in range(500)]
    radii = [place.radius for place in placements]
    assert min(radii) < 10
    assert max(radii) > 16.3
    centers = np.array([place.center for place in placements])
    assert centers.min() > 11
    assert centers.max() < 53
    assert np.ptp(centers, axis=0).min() > 35
    for shape, place in zip(list(scenes.SHAPES) * 20, placements, strict=False):
        covered = scenes.coverage(scenes.Scene("red", shape, "large", "in the center", "blue"), place)
        assert covered[0].max() == covered[-1].max() == covered[:, 0].max() == covered[:, -1].max() == 0, shape


def test_overlap_counts_areas():
    one, other = np.zeros((4, 4)), np.zeros((4, 4))
    one[:2], other[1:3] = 1, 0.5
    assert scenes.iou(one, other) == pytest.approx(2 / 10)
    assert scenes.iou(one, one) == 1
    assert scenes.iou(np.zeros((4, 4)), np.zeros((4, 4))) == 0


def test_a_rendered_scene_lies_where_it_was_placed():
    rng = np.random.default_rng(5)
    overlaps = []
    for _ in range(100):
        scene, place = scenes.draw_scene(rng, new=bool(rng.random() < 0.5)), scenes.place_freely(rng)
        mask = scenes.object_mask(scenes.render(scene, place))
        overlaps.append(scenes.iou(mask, scenes.coverage(scene, place)))
    assert min(overlaps) > 0.75
    assert np.mean(overlaps) > 0.95


@pytest.mark.parametrize("center_crop", [True, False])
def test_a_hint_shares_its_images_crop(center_crop):
    """A hint that is the image, at twice its size, lands on the image's own pixels; shifted by a pixel it doesn't."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (10, 16), dtype=np.uint8)).resize(
        (160, 100), Image.Resampling.BICUBIC
    )
    image, double = coarse.convert("RGB"), coarse.resize((320, 200), Image.Resampling.BICUBIC)
    row = {"id": "abc", "width": 160, "height": 100, "hint": png(np.asarray(double))}
    square = square_pixels(image, 64, center_crop, seed=3, sample_id="abc")
    ours = condition_pixels(row, "hint", 1, 64, center_crop, seed=3)[0] / 127.5 - 1
    assert np.abs(ours - square[0]).mean() < 0.02
    assert np.abs(ours[:, 1:] - square[0][:, :-1]).mean() > 0.06


def test_edges_are_binary_vary_their_thresholds_and_follow_the_id():
    rng = np.random.default_rng(0)
    image = np.asarray(
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    )
    pixels = image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    drawn = [canny_edges(pixels, 0, f"id {number}") for number in range(8)]
    assert {value for edges in drawn for value in np.unique(edges)} == {0, 255}
    assert drawn[0].shape == (1, 64, 64)
    assert len({edges.tobytes() for edges in drawn}) > 1
    assert np.array_equal(drawn[0], canny_edges(pixels, 0, "id 0"))
    flat = canny_edges(np.zeros((3, 64, 64), dtype=np.float32), 0, "id")
    assert not flat.any()


def test_a_hint_from_a_file_becomes_the_drawn_square(tmp_path):
    Image.fromarray(np.repeat(np.arange(0, 200, dtype=np.uint8)[None], 100, 0)).save(tmp_path / "hint.png")
    found = np.asarray(read_hint(tmp_path / "hint.png", 100))
    assert found.shape == (100, 100, 3)
    assert found[0, 0, 0] == 50
    assert found[0, -1, 0] == 149
    (tmp_path / "hint.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"hint.png: can't be decoded"):
        read_hint(tmp_path / "hint.png", 100)
