"""IC-Light's conditions, from every kind of source to the latent cache: foregrounds, masks, light maps."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain import precompute
from sdtrain.base import resolve_base
from sdtrain.data import lit_scenes
from sdtrain.data.conditions import CONDITIONS, area_mean, on_grey, read_condition
from sdtrain.data.degradations import degraded
from sdtrain.data.images import BadImage, decode_rgb, draw_crop, square_pixels
from sdtrain.data.shards import Column, LatentShards, held_out_pictures, read_dataset
from sdtrain.dataset import build_dataset
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.manifests import SPLITS, DatasetManifest, encoders_fingerprint
from sdtrain.models.parts import load_vae
from sdtrain.params.schema import DatasetParams
from sdtrain.precompute import precompute_latents
from tests.unit.test_conditions import as_file, noise
from tests.unit.test_dataset import jsonl, write_files, write_parquet, write_tar

NUM = 8
SIZE = (96, 64)
ALL = {name: name for name in ("hint", "foreground", "background", "mask", "light", "light_1", "relit_1", "relit_2")}
LATENT_KINDS = ("foreground", "background", "relit_1", "relit_2")


def npy(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def hdr(values: np.ndarray) -> bytes:
    """A Radiance file without compression: a value is mantissa * 2^(exponent - 136), in 8 bits each (Ward 1991)."""
    exponents = np.frexp(values.max(axis=2))[1]
    mantissas = np.floor(values / np.exp2(exponents - 8.0)[..., None])
    pixels = np.concatenate([mantissas, exponents[..., None] + 128], axis=2).astype(np.uint8)
    height, width = values.shape[:2]
    return b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n" + f"-Y {height} +X {width}\n".encode() + pixels.tobytes()


def light_of(index: int) -> np.ndarray:
    """Values up to 255, which 8 bits of mantissa hold exactly, float32 [2, 4, 3]."""
    values = np.random.default_rng(300 + index).integers(0, 128, (2, 4, 3)).astype(np.float32)
    values[..., index % 3] += 128
    return values


# ---------------------------------------------------------------- light maps from every kind of source


IMAGES = [(f"{n:02}", as_file(noise(n)), f"image number {n}") for n in range(NUM)]


def in_a_folder(folder: Path) -> None:
    write_files(folder, {f"{stem}.png": image for stem, image, _ in IMAGES})


def listed(folder: Path) -> dict:
    in_a_folder(folder)
    write_files(folder, {f"lights/{stem}.npy": npy(light_of(n)) for n, (stem, *_) in enumerate(IMAGES)})
    rows = [{"file_name": f"{s}.png", "light_file_name": f"lights/{s}.npy", "text": text} for s, _, text in IMAGES]
    write_files(folder, {"metadata.jsonl": jsonl(rows)})
    return {"source": "imagefolder", "condition_columns": {"light": "light"}}


def in_the_metadata(folder: Path) -> dict:
    in_a_folder(folder)
    rows = [
        {"file_name": f"{stem}.png", "sky": light_of(n).tolist(), "text": text}
        for n, (stem, _, text) in enumerate(IMAGES)
    ]
    write_files(folder, {"metadata.jsonl": jsonl(rows)})
    return {"source": "imagefolder", "condition_columns": {"light": "sky"}}


def beside(folder: Path) -> dict:
    in_a_folder(folder)
    write_files(folder, {f"{stem}.txt": text for stem, _, text in IMAGES})
    write_files(folder, {f"lights/{stem}.hdr": hdr(light_of(n)) for n, (stem, *_) in enumerate(IMAGES)})
    return {"source": "imagefolder", "condition_columns": {"light": "lights/*.hdr"}}


def npy_beside(folder: Path) -> dict:
    beside(folder)
    write_files(folder, {f"{stem}_light.npy": npy(light_of(n)) for n, (stem, *_) in enumerate(IMAGES)})
    return {"source": "imagefolder", "condition_columns": {"light": "*_light.npy"}}


def as_lists(folder: Path) -> dict:
    _, images, texts = map(list, zip(*IMAGES, strict=True))
    write_parquet(folder / "a.parquet", image=images, text=texts, sky=[light_of(n).tolist() for n in range(NUM)])
    return {"source": "parquet", "condition_columns": {"light": "sky"}}


def as_arrays(folder: Path) -> dict:
    """As Datasets itself writes arrays of one shape."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "sky": datasets.Array3D((2, 4, 3), "float32"),
        }
    )
    rows = {
        "image": [{"bytes": image, "path": None} for _, image, _ in IMAGES],
        "text": [text for *_, text in IMAGES],
        "sky": [light_of(n) for n in range(NUM)],
    }
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "a.parquet")
    return {"source": "parquet", "condition_columns": {"light": "sky"}}


def as_bytes(folder: Path) -> dict:
    _, images, texts = map(list, zip(*IMAGES, strict=True))
    write_parquet(folder / "a.parquet", image=images, text=texts, sky=[npy(light_of(n)) for n in range(NUM)])
    return {"source": "parquet", "condition_columns": {"light": "sky"}}


def in_tars(folder: Path, suffix: str = "npy", write: Callable[[np.ndarray], bytes] = npy) -> dict:
    members = {}
    for n, (stem, image, text) in enumerate(IMAGES):
        members |= {f"{stem}.png": image, f"{stem}.sky.{suffix}": write(light_of(n)), f"{stem}.txt": text}
    write_tar(folder / "a.tar", members)
    options = {"image_column": "png", "caption_column": "txt", "condition_columns": {"light": f"sky.{suffix}"}}
    return {"source": "webdataset", **options}


def hdr_in_tars(folder: Path) -> dict:
    return in_tars(folder, "hdr", hdr)


SOURCES = {
    listed: "lights/{}.npy",
    in_the_metadata: "sky",
    beside: "lights/{}.hdr",
    npy_beside: "{}_light.npy",
    as_lists: "sky",
    as_arrays: "sky",
    as_bytes: "sky",
    in_tars: "sky.npy",
    hdr_in_tars: "sky.hdr",
}
"""How each source says where a light is from."""


@dataclass
class Built:
    """A data set read back."""

    folder: Path
    rows: list[dict]
    inputs: list[dict]
    manifest: DatasetManifest

    @property
    def reasons(self) -> list[str]:
        return [line["reason"] for line in self.inputs]


@pytest.fixture
def build(tmp_path, make_params):
    """A function that builds a data set from fields of the section `dataset` and reads it back."""
    shipped = make_params().dataset.model_dump() | {"path": str(tmp_path / "in"), "validation_fraction": 0.5}

    def build(name: str = "dataset", **fields) -> Built:
        out = tmp_path / name
        build_dataset(DatasetParams.model_validate(shipped | fields), 0, out, tmp_path / "metrics.json")
        with (out / "inputs.csv").open(newline="", encoding="utf-8") as file:
            inputs = list(csv.DictReader(file))
        rows = [row for split in SPLITS for row in read_dataset(out, split)]
        return Built(out, rows, inputs, DatasetManifest.read(out))

    return build


@pytest.mark.parametrize(("write", "origin"), SOURCES.items())
def test_every_source_gives_each_image_its_light_unclipped(write, origin, tmp_path, build):
    built = build(**write(tmp_path / "in"))
    assert [line["light"] for line in built.inputs] == [origin.format(stem) for stem, *_ in IMAGES]
    assert len(built.rows) == NUM
    for row in built.rows:
        stored = np.load(io.BytesIO(row["light"]), allow_pickle=False)
        assert stored.dtype == np.float32
        assert np.array_equal(stored, light_of(int(row["caption"].split()[-1])))
    assert built.manifest.model_dump(mode="json")["conditions"] == {"light": {"shape": [2, 4, 3]}}


def test_every_source_gives_the_same_ids(tmp_path, build):
    ids = [{row["id"] for row in build(**write(tmp_path / write.__name__), path=str(tmp_path / write.__name__)).rows}
           for write in SOURCES]  # fmt: skip
    assert all(found == ids[0] for found in ids)


def test_a_table_row_without_a_light_is_dropped(tmp_path, build):
    lights = [light_of(n).tolist() for n in range(NUM)]
    lights[2] = None
    _, images, texts = map(list, zip(*IMAGES, strict=True))
    write_parquet(tmp_path / "in/a.parquet", image=images, text=texts, sky=lights)
    built = build(source="parquet", condition_columns={"light": "sky"})
    assert built.manifest.dropped == {"light is missing": 1}


@pytest.mark.parametrize("column", ["number", "numbers"])
def test_a_column_of_other_things_holds_no_light(column, tmp_path, build):
    _, images, texts = map(list, zip(*IMAGES, strict=True))
    others = {"number": list(range(NUM)), "numbers": [[1.0, 2.0]] * NUM}
    write_parquet(tmp_path / "in/a.parquet", image=images, text=texts, **others)
    fault = {
        "number": r"^dataset\.condition_columns\.light = 'number': doesn't hold light maps: ",
        "numbers": r"dropped: \{'light has another shape': 8\}",
    }[column]
    with pytest.raises(InputError, match=fault):
        build(source="parquet", condition_columns={"light": column})


def test_a_column_of_lists_holds_no_images(tmp_path, build):
    options = as_lists(tmp_path / "in") | {"condition_columns": {"background": "sky"}}
    with pytest.raises(InputError, match=r"^dataset\.condition_columns\.background = 'sky': doesn't hold images: "):
        build(**options)


# ---------------------------------------------------------------- what is dropped


BAD_LIGHTS = {
    b"no light": "light can't be decoded: neither a .npy nor a Radiance .hdr file",
    npy(light_of(0))[:90]: "light can't be decoded: EOF",
    npy(np.array([[{}]]), allow_pickle=True): "light can't be decoded: Object arrays",
    hdr(light_of(0))[:70]: "light can't be decoded: a damaged .hdr file",
    npy(light_of(0).astype(np.uint8)): "light isn't floats: uint8",
    npy(light_of(0)[..., 0]): "light has another shape: 2x4, expected height x width x 3",
    npy(np.float64([[[1, 1, 1e300]] * 4] * 2)): "light isn't finite",
    npy(np.float16([[[1, 1, np.nan]] * 4] * 2)): "light isn't finite",
    npy(np.float32([[[1, 1, -0.5]] * 4] * 2)): "light is negative: -0.5",
    npy(light_of(0)[:1]): "light shape differs: 1x4x3, first row 2x4x3",
}  # fmt: skip


def test_rows_without_a_usable_light_are_dropped_by_a_countable_reason(tmp_path, build):
    folder = tmp_path / "in"
    files = [npy(light_of(0)), *BAD_LIGHTS]
    write_files(folder, {f"{n:02}.png": as_file(noise(n)) for n in range(14)} | {f"{n:02}.txt": "x" for n in range(14)})
    write_files(folder, {f"lights/{n:02}.npy": data for n, data in enumerate(files)})
    write_files(folder, {f"lights/{n}.npy": npy(light_of(n)) for n in (11, 12)})
    built = build(source="imagefolder", condition_columns={"light": "lights/*.npy"}, num_workers=2)
    assert [built.reasons[n] for n in (0, 11, 12, 13)] == ["", "", "", "light file is missing"]
    for reason, expected in zip(built.reasons[1:], BAD_LIGHTS.values(), strict=False):
        assert reason.startswith(expected)
    assert built.manifest.dropped == {
        "light can't be decoded": 4,
        "light file is missing": 1,
        "light has another shape": 1,
        "light is negative": 1,
        "light isn't finite": 2,
        "light isn't floats": 1,
        "light shape differs": 1,
    }


def test_a_light_s_part_is_no_more_than_the_light(tmp_path, build):
    lights = [light_of(n) for n in range(NUM)]
    parts = [light * (np.arange(4) < 2)[:, None].astype(np.float32) for light in lights]
    parts[1], parts[2], parts[3] = lights[1] + np.float32(3), parts[2][:1], lights[3] + np.float32(0.5)
    _, images, texts = map(list, zip(*IMAGES, strict=True))
    columns = {"sky": [light.tolist() for light in lights], "some": [part.tolist() for part in parts]}
    write_parquet(tmp_path / "in/a.parquet", image=images, text=texts, **columns)
    built = build(source="parquet", condition_columns={"light": "sky", "light_1": "some"})
    assert built.reasons[:4] == ["", "light_1 exceeds light: by 3", "light_1 shape differs: 1x4x3, light 2x4x3", ""]


GREY = noise(3, mode="L")
CUT_OUT = Image.merge("RGBA", [*noise(4).split(), GREY])
BAD_IMAGES = {
    "mask": {
        as_file(Image.new("L", (8, 6))): "is empty: its lightest pixel has 0 of 255",
        as_file(Image.fromarray(np.eye(6, 8, dtype=np.uint8))): "is empty: its lightest pixel has 1 of 255",
        as_file(Image.new("RGBA", (8, 6), (255, 255, 255, 0))): "is empty: its lightest pixel has 0 of 255",
        as_file(Image.new("L", (6, 8), 255)): "size differs: 6x8, image 8x6",
        as_file(GREY)[:60]: "can't be decoded: image file is truncated",
    },
    "foreground": {
        as_file(Image.new("RGBA", (8, 6), (255, 255, 255, 0))): "is transparent: its most opaque pixel has 0 of 255",
        as_file(CUT_OUT.resize((8, 8))): "size differs: 8x8, image 8x6",
    },
    "background": {b"": "can't be decoded: cannot identify image file"},
    "relit_1": {as_file(noise(1, 9, 3)): "size differs: 9x3, image 8x6"},
}


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [(name, data, reason) for name, cases in BAD_IMAGES.items() for data, reason in cases.items()],
)
def test_unusable_images_are_refused(name, data, reason):
    with pytest.raises(BadImage) as caught:
        CONDITIONS[name].clean(data, (8, 6))
    assert str(caught.value) == reason


def test_an_empty_mask_drops_its_row(tmp_path, build):
    masks = [as_file(Image.new("L", (8, 6), 255 * (n != 3))) for n in range(NUM)]
    _, images, texts = map(list, zip(*IMAGES, strict=True))
    write_parquet(tmp_path / "in/a.parquet", image=images, text=texts, object=masks)
    built = build(source="parquet", condition_columns={"mask": "object"})
    assert built.manifest.dropped == {"mask is empty": 1}
    assert built.manifest.model_dump()["conditions"] == {"mask": {"channels": 1}}


# ---------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("size", "block"), [((64, 128), (2, 4)), ((32, 64), (1, 2)), ((32, 32), (1, 1)), ((16, 64), None), ((1, 5), None)]
)
def test_large_maps_are_reduced_by_area(size, block):
    values = np.random.default_rng(0).uniform(0, 50, (*size, 3))
    found = CONDITIONS["light"].clean(npy(values), (8, 6))
    stored = np.load(io.BytesIO(found.data))
    expected = values
    if block:
        rows, columns = block
        expected = values.reshape(32, rows, 32, columns, 3).mean(axis=(1, 3))
    assert found.map_shape == stored.shape == expected.shape
    np.testing.assert_allclose(stored, expected.astype(np.float32), rtol=1e-6)


def test_a_negative_value_is_found_before_the_map_is_reduced():
    values = np.ones((64, 64, 3))
    values[5, 5, 0] = -0.1
    with pytest.raises(BadImage, match=r"^is negative: -0.1$"):
        CONDITIONS["light"].clean(npy(values), (8, 6))


def test_foregrounds_keep_their_alpha_channel():
    data = as_file(CUT_OUT)
    found = CONDITIONS["foreground"].clean(data, (8, 6))
    assert (found.data, found.channels) == (data, 4)
    palette = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8), mode="P")
    palette.putpalette([5 * n // 3 for n in range(144)])
    stored = Image.open(io.BytesIO(CONDITIONS["foreground"].clean(as_file(palette, transparency=7), (8, 6)).data))
    assert stored.mode == "RGBA"
    assert (np.asarray(stored)[..., 3] == np.where(np.asarray(palette) == 7, 0, 255)).all()


def test_an_opaque_foreground_is_one_without_alpha():
    plain, opaque = noise(4), noise(4).convert("RGBA")
    found = [CONDITIONS["foreground"].clean(as_file(image), (8, 6)) for image in (plain, opaque)]
    assert [cleaned.channels for cleaned in found] == [3, 3]
    assert found[0].sha256 == found[1].sha256
    assert found[0].sha256 != CONDITIONS["foreground"].clean(as_file(CUT_OUT), (8, 6)).sha256


@pytest.mark.parametrize(
    ("mask", "values"),
    [
        (GREY, np.asarray(GREY)),
        (noise(5), np.asarray(noise(5).convert("L"))),
        (Image.merge("LA", [Image.new("L", (8, 6), 255), GREY]), np.asarray(GREY)),
        (GREY.point(lambda value: 255 * (value > 99)).convert("1"), 255 * (np.asarray(GREY) > 99)),
    ],
    ids=["grey", "colours", "alpha on black", "two values"],
)
def test_masks_become_grey(mask, values):
    found = CONDITIONS["mask"].clean(as_file(mask), (8, 6))
    stored = Image.open(io.BytesIO(found.data))
    assert (stored.mode, found.channels) == ("L", 1)
    assert np.array_equal(np.asarray(stored), values)


# ---------------------------------------------------------------- on grey, and at the latents' size


def test_grey_is_exactly_zero_under_the_mask():
    foreground = np.uint8([[[200, 127, 0]], [[0, 127, 255]], [[10, 20, 30]]])
    mask = np.uint8([[[0, 255, 51]]])
    found = on_grey(foreground, mask)
    assert (found[:, 0, 0] == 0).all()
    assert found[0, 0, 1] == 0
    assert found[2, 0, 1] == np.float32(-107 / 127)
    np.testing.assert_allclose(found[:, 0, 2], [-127 / 127 / 5, 128 / 127 / 5, -97 / 127 / 5], rtol=1e-6)
    assert on_grey(np.uint8([[[255]], [[0]], [[127]]])).tolist() == [[[np.float32(128 / 127)]], [[-1]], [[0]]]


def test_alpha_is_the_mask_where_there_is_none():
    foreground = np.random.default_rng(0).integers(0, 256, (4, 5, 5), dtype=np.uint8)
    other = np.random.default_rng(1).integers(0, 256, (1, 5, 5), dtype=np.uint8)
    assert np.array_equal(on_grey(foreground), on_grey(foreground[:3], foreground[3:]))
    # With both, what either hides is hidden: colours behind transparent parts mean nothing.
    assert np.array_equal(on_grey(foreground, other), on_grey(foreground[:3], np.minimum(foreground[3:], other)))


def test_a_mask_is_averaged_over_each_latents_pixels():
    mask = np.zeros((1, 4, 4), dtype=np.uint8)
    mask[0, 0, 0], mask[0, :2, 2:], mask[0, 3] = 255, 255, 51
    np.testing.assert_allclose(area_mean(mask, 2), [[[0.25, 1], [0.1, 0.1]]], rtol=1e-6)


def test_resizing_a_cut_out_shows_no_hidden_colour_and_keeps_grey():
    """The hidden colour is green; at half size an edge pixel is half object, half grey."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[..., 1] = 255
    pixels[:, 31:] = [200, 50, 50, 255]
    crop = draw_crop((64, 64), 32, True, 0, "")
    found = on_grey(CONDITIONS["foreground"].crop(as_file(Image.fromarray(pixels)), crop, 4)) * 127 + 127
    assert np.abs(found[:, :, 16:] - np.array([200, 50, 50]).reshape(3, 1, 1)).max() < 0.01
    assert (found[:, :, :15] == 127).all()
    np.testing.assert_allclose(found[:, 5, 15], 127 + (np.array([200, 50, 50]) - 127) / 2, atol=1)


# ---------------------------------------------------------------- the cache


@pytest.fixture(scope="session")
def base(tmp_path_factory, make_params, root) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    params = make_params(base={"path": str(root / "data" / "builtin")})
    resolve_base(params.base, params.seed, out=folder)
    return folder


@dataclass
class Cached:
    """A data set and its latents; rows by the images' number."""

    built: Built
    folder: Path
    shards: dict[str, LatentShards]
    metrics: dict

    def place(self, number: int) -> tuple[str, int, dict]:
        """Split, index and row of the data set."""
        for split in SPLITS:
            for index, row in enumerate(read_dataset(self.built.folder, split)):
                if int(row["caption"].split()[-1]) == number:
                    return split, index, row
        raise AssertionError(f"no image number {number}")

    def read(self, number: int, *names: str, flipped: bool = False) -> dict[str, torch.Tensor]:
        split, index, _ = self.place(number)
        return self.shards[split].read(index, *names, flipped=flipped)


@pytest.fixture
def cache(tmp_path, base, build, make_params):
    """A function from columns of a table, each with a file for every image, to the cache of its data set."""

    def cache(
        columns: dict[str, list[bytes]], name: str = "out", seed: int = 0, derived: dict | None = None, **settings
    ) -> Cached:
        folder = tmp_path / name
        texts, groups = [f"image number {n}" for n in range(NUM)], [n // 2 for n in range(NUM)]
        write_parquet(folder / "in/a.parquet", text=texts, group=groups, **columns)
        given = {name: name for name in columns if name != "image"}
        options = {"source": "parquet", "path": str(folder / "in"), "group_column": "group", "condition_columns": given}
        built = build(f"{name}/dataset", **options)
        changes = {"derived_conditions": derived or {}, "batch_size": 3, **settings}
        params = make_params().precompute.model_copy(update=changes)
        precompute_latents(params, seed, base, built.folder, folder / "latents", folder / "metrics.json")
        shards = {split: LatentShards(folder / "latents", split, encoders_fingerprint(base)) for split in SPLITS}
        return Cached(built, folder / "latents", shards, read_json(folder / "metrics.json"))

    return cache


def smooth(seed: int, mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    return noise(seed, 6, 4, mode).resize(size, Image.Resampling.BICUBIC)


def disk(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]]
    distance = np.hypot(x - size[0] * (0.3 + 0.05 * number), y - size[1] / 2)
    return Image.fromarray((np.clip(24.5 - distance, 0, 1) * 255).round().astype(np.uint8))


def full(size: tuple[int, int] = SIZE) -> dict[str, list[Image.Image | np.ndarray]]:
    """Every condition of every image."""
    rgb = {name: [smooth(100 * place + n, size=size) for n in range(NUM)] for place, name in enumerate(LATENT_KINDS, 1)}
    lights = [light_of(n) for n in range(NUM)]
    return {
        "image": [smooth(n, size=size) for n in range(NUM)],
        "hint": [smooth(900 + n, size=size) for n in range(NUM)],
        "mask": [disk(n, size) for n in range(NUM)],
        "light": lights,
        "light_1": [light * np.float32(0.25) for light in lights],
        **rgb,
    }


def as_files(columns: dict[str, list[Image.Image | np.ndarray]], mirrored: bool = False) -> dict[str, list[bytes]]:
    def file(value: Image.Image | np.ndarray) -> bytes:
        if isinstance(value, np.ndarray):
            return npy(value[:, ::-1] if mirrored else value)
        return as_file(value.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else value)

    return {name: [file(value) for value in values] for name, values in columns.items()}


def cropped(image: Image.Image, row: dict, seed: int, resolution: int = 64) -> np.ndarray:
    """Of an image that has the picture's size, whose shorter side is the resolution: [H, W, ...]."""
    crop = draw_crop((row["width"], row["height"]), resolution, False, seed, row["id"])
    return np.asarray(image)[crop.top : crop.top + resolution, crop.left : crop.left + resolution]


def encode(base: Path, pixels: np.ndarray) -> torch.Tensor:
    """The posterior's mean of float [H, W, 3], float32 [4, h, w]."""
    with torch.inference_mode():
        return load_vae(base).encode(torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).latent_dist.mean[0]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)  # float16, and other batches


@pytest.mark.parametrize("seed", [0, 1])
def test_all_conditions_are_cropped_with_their_image(seed, cache, base):
    """At random places, each compared with what its formula gives of the image's own crop."""
    columns = full()
    cached = cache(as_files(columns), seed=seed, center_crop=False, random_flip=False)
    lefts = set()
    for number in range(NUM):
        _, _, row = cached.place(number)
        lefts.add(draw_crop(SIZE, 64, False, seed, row["id"]).left)
        square = {
            name: cropped(values[number], row, seed)
            for name, values in columns.items()
            if isinstance(values[0], Image.Image)
        }
        found = cached.read(number, "mean", *ALL)
        mask = square["mask"] / 255
        close(found["mean"], encode(base, square["image"] / 127.5 - 1))
        close(found["foreground"], encode(base, (square["foreground"] - 127.0) * mask[..., None] / 127))
        close(found["background"], encode(base, square["background"] / 127 - 1))
        for name in ("relit_1", "relit_2"):
            close(found[name], encode(base, square[name] / 127.5 - 1))
        expected = torch.from_numpy(mask.reshape(8, 8, 8, 8).mean(axis=(1, 3)))[None].float()
        torch.testing.assert_close(found["mask"], expected, rtol=1e-3, atol=1e-6)
        assert np.array_equal(found["hint"].permute(1, 2, 0), square["hint"])
        for name in ("light", "light_1"):
            assert np.array_equal(found[name], columns[name][number])
            assert found[name].dtype == torch.float32
    assert len(lefts) > 3


def test_conditions_are_resized_as_their_image_is(cache, base):
    """Of another size than the resolution. A background's pixels are /127 - 1, so only a picture has its latents."""
    images = [as_file(smooth(n, size=(150, 100))) for n in range(NUM)]
    cached = cache({"image": images, "background": images, "relit_1": images}, center_crop=False)
    for number in range(NUM):
        _, _, row = cached.place(number)
        found = cached.read(number, "mean", "background", "relit_1")
        pixels = square_pixels(decode_rgb(row["image"]), 64, False, 0, row["id"]).transpose(1, 2, 0)
        close(found["relit_1"], found["mean"])
        close(found["background"], encode(base, (pixels + 1) * 127.5 / 127 - 1))
        assert (found["background"] - found["mean"]).abs().max() > 0.02


def test_conditions_are_modes_and_no_draws(cache, base):
    """The same in every run and for every seed."""
    columns = as_files(full((64, 64)))
    runs = [cache(columns, f"run{number}", seed=seed) for number, seed in enumerate((0, 0, 1))]
    for number in range(NUM):
        found = [run.read(number, *LATENT_KINDS) for run in runs]
        for name in LATENT_KINDS:
            assert torch.equal(found[0][name], found[1][name])
            assert torch.equal(found[0][name], found[2][name])


def test_a_flipped_row_is_the_row_of_mirrored_inputs(cache):
    columns = full((64, 64))
    plain = cache(as_files(columns), "plain", random_flip=True)
    mirrored = cache(as_files(columns, mirrored=True), "mirrored", random_flip=True)
    for number in range(NUM):
        for flipped in (False, True):
            found = plain.read(number, "mean", *ALL, flipped=flipped)
            expected = mirrored.read(number, "mean", *ALL, flipped=not flipped)
            for name in ("mean", *LATENT_KINDS):
                close(found[name], expected[name])
            for name in ("hint", "mask", "light", "light_1"):
                assert torch.equal(found[name], expected[name]), name
        same = plain.read(number, *ALL)
        other = plain.read(number, *ALL, flipped=True)
        assert not any(torch.equal(same[name], other[name]) for name in ALL)
        assert (other["foreground"] - same["foreground"].flip(-1)).abs().mean() > 0.02, "latents can't be flipped"


def test_columns_have_the_shapes_that_methods_ask_for(cache):
    cached = cache(as_files(full()), random_flip=True)
    latents, mask, light = Column((4, 8, 8), flips=True), Column((1, 8, 8)), Column((2, 4, 3))
    asked = {**dict.fromkeys(LATENT_KINDS, latents), "mask": mask, "light": light, "light_1": light}
    for shards in cached.shards.values():
        shards.check_columns(asked | {"hint": Column((3, 64, 64), dtype="uint8")})
        with pytest.raises(
            InputError, match=r"a row of column 'light' has shape \(2, 4, 3\), the training method needs \(1, 5, 3\)"
        ):
            shards.check_columns({"light": Column((1, 5, 3))})
        assert {name: value.dtype for name, value in shards.read(0, *asked).items()} == dict.fromkeys(
            asked, torch.float32
        )
    kinds = {name: (found.kind, found.shape) for name, found in cached.shards["train"].manifest.conditions.items()}
    assert kinds == {
        "hint": ("pixels", (3, 64, 64)),
        **dict.fromkeys(LATENT_KINDS, ("latents", (4, 8, 8))),
        "mask": ("mask", (1, 8, 8)),
        "light": ("light", (2, 4, 3)),
        "light_1": ("light", (2, 4, 3)),
    }


def test_held_out_conditions_are_images_or_tensors(cache):
    shards = cache(as_files(full())).shards["validation"]
    captions, conditions = held_out_pictures(shards, ["hint", "foreground", "light"], 2)
    assert list(conditions) == ["hint", "foreground", "light"]
    for place, caption in enumerate(captions):
        row = shards.read(shards.captions.index(caption), *conditions)
        assert np.array_equal(np.asarray(conditions["hint"][place]), row["hint"].permute(1, 2, 0))
        for name in ("foreground", "light"):
            assert torch.equal(conditions[name][place], row[name])


def test_a_broken_shard_is_named_by_its_condition(cache):
    """A column of another shape than the manifest has."""
    cached = cache(as_files(full()), random_flip=True)
    tree = json.loads((cached.folder / "manifest.json").read_text())
    tree["conditions"]["foreground"]["shape"] = [4, 8, 9]
    (cached.folder / "manifest.json").write_text(json.dumps(tree))
    fingerprint = cached.shards["train"].manifest.encoders_fingerprint
    with pytest.raises(InputError, match=r"tensor foreground has shape \[\d, 4, 8, 8\], expected \[\d, 4, 8, 9\]"):
        LatentShards(cached.folder, "train", fingerprint)


# ---------------------------------------------------------------- derived, blank and refused


def cut_outs(size: tuple[int, int] = SIZE) -> list[Image.Image]:
    return [Image.merge("RGBA", [*smooth(200 + n, size=size).split(), disk(n, size)]) for n in range(NUM)]


def test_the_foregrounds_alpha_is_its_mask(cache):
    """As with masks of their own; a foreground without alpha among others is the object all over."""
    images, foregrounds = full()["image"], cut_outs()
    foregrounds[5] = foregrounds[5].convert("RGB")
    masks = [disk(n) for n in range(NUM)]
    masks[5] = Image.new("L", SIZE, 255)
    columns = {"image": images, "foreground": foregrounds}
    derived = cache(as_files(columns), "derived", derived={"mask": "alpha"}, random_flip=True)
    alone = cache(as_files(columns), "alone", random_flip=True)
    given = cache(as_files(columns | {"mask": masks}), "given", random_flip=True)
    assert derived.built.manifest.conditions["foreground"].channels == 4
    for number in range(NUM):
        for flipped in (False, True):
            found = derived.read(number, "foreground", "mask", flipped=flipped)
            for name, values in given.read(number, "foreground", "mask", flipped=flipped).items():
                close(found[name], values)
            close(found["foreground"], alone.read(number, "foreground", flipped=flipped)["foreground"])
    assert (derived.read(5, "mask")["mask"] == 1).all()


def test_masks_cannot_be_made_of_foregrounds_without_alpha(cache, tmp_path):
    columns = {"image": full()["image"], "foreground": [image.convert("RGB") for image in cut_outs()]}
    with pytest.raises(
        InputError,
        match=r"^precompute\.derived_conditions\.mask = 'alpha': no foreground of the data set is transparent",
    ):
        cache(as_files(columns), derived={"mask": "alpha"})
    assert not list((tmp_path / "out").glob("latents*"))


def test_a_degraded_foreground_is_made_of_the_cropped_picture_and_its_mask(cache, base):
    columns = {name: full()[name] for name in ("image", "mask")}
    cached = cache(as_files(columns), derived={"foreground": "degraded"}, center_crop=False, random_flip=True)
    for number in range(NUM):
        _, _, row = cached.place(number)
        mask = cropped(columns["mask"][number], row, 0) / np.float32(255)
        pixels = square_pixels(decode_rgb(row["image"]), 64, False, 0, row["id"])
        foreground = degraded(pixels, mask, 0, row["id"]).transpose(1, 2, 0)
        expected = (foreground - 127.0) * mask[..., None] / 127
        close(cached.read(number, "foreground")["foreground"], encode(base, expected))
        flipped = cached.read(number, "foreground", flipped=True)["foreground"]
        close(flipped, encode(base, expected[:, ::-1].copy()))


def test_blank_conditions_are_counted(cache):
    """A crop may miss the object."""
    columns = full()
    columns["mask"][2] = Image.new("L", SIZE)
    columns["mask"][2].paste(255, (0, 0, 10, 64))
    columns["foreground"][3] = Image.new("RGB", SIZE, (127, 127, 127))
    for number in (4, 5, 6):
        columns["background"][number] = Image.new("RGB", SIZE)
    columns["light_1"][1] = np.zeros((2, 4, 3), dtype=np.float32)
    metrics = cache(as_files(columns), center_crop=True).metrics
    assert {name: count for name, count in metrics.items() if name.startswith("num_blank")} == {
        "num_blank_backgrounds": 3,
        "num_blank_foregrounds": 2,
        "num_blank_hints": 0,
        "num_blank_light_1s": 1,
        "num_blank_lights": 0,
        "num_blank_masks": 1,
        "num_blank_relit_1s": 0,
        "num_blank_relit_2s": 0,
    }


def test_a_conditions_encoding_that_is_not_finite_is_caught(cache, base, monkeypatch, tmp_path):
    vae = load_vae(base)
    encode = vae.encode

    def encode_no_white(pixels):
        """White on grey is lighter than white: 128/127."""
        encoded = encode(pixels)
        encoded.latent_dist.mean[pixels.flatten(1).amin(1) > 1] = float("nan")
        return encoded

    vae.encode = encode_no_white
    monkeypatch.setattr(precompute, "load_vae", lambda base: vae)
    columns = {name: full()[name] for name in ("image", "foreground")}
    columns["foreground"][4] = Image.new("RGB", SIZE, "white")
    with pytest.raises(InputError, match=r"^the VAE's mean of the foreground isn't finite for [0-9a-f]{32} \("):
        cache(as_files(columns))
    assert not list((tmp_path / "out").glob("latents*"))


def test_the_vae_gets_no_more_than_a_batch_and_shards_are_bounded(cache, base, monkeypatch):
    vae, sizes = load_vae(base), []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(precompute, "load_vae", lambda base: vae)
    latents, mask, light = 2 * 2 * 4 * 8 * 8, 2 * 8 * 8, 4 * 2 * 4 * 3  # bytes; both views of latents
    monkeypatch.setattr(precompute, "_SHARD_BYTES", 2 * (latents + mask + light))
    columns = {name: full()[name] for name in ("image", "foreground", "mask", "light")}
    cached = cache(as_files(columns), random_flip=True, batch_size=2)
    assert max(sizes) == 2
    for split in SPLITS:
        assert {shard.num_rows for shard in cached.shards[split].manifest.splits[split]} == {2}


# ---------------------------------------------------------------- the lit world


def test_lit_scenes_bring_every_condition_and_keep_a_scene_in_one_split(build):
    columns = {name: name for name in lit_scenes.COLUMNS}
    built = build(source="generated", num_scenes=40, world="lit", condition_columns=columns, new_fraction=0.0)
    assert built.manifest.source == {"generated": 40, "world": "lit", "new_fraction": 0.0}
    assert built.manifest.dropped == {}
    assert built.manifest.model_dump()["conditions"]["light"] == {"shape": (1, 5, 3)}
    outcomes = [line["outcome"] for line in built.inputs]
    assert outcomes[::2] == outcomes[1::2]
    assert set(outcomes) == set(SPLITS)
    assert built.inputs[0] | columns == built.inputs[0]
    by_caption = {row["caption"]: row for row in built.rows}
    for index in range(40):
        example = lit_scenes.draw_lit(0, index)
        row = by_caption[lit_scenes.caption(example.lit, example.light_name)]
        assert np.array_equal(np.load(io.BytesIO(row["light"])), example.light)
        shown = lit_scenes.render(example.lit, example.light)
        assert np.array_equal(np.asarray(decode_rgb(row["image"])), np.asarray(shown))


def test_a_mask_is_applied_once_to_a_lit_scenes_foreground(cache, base):
    """Its alpha is the mask, and a column of masks takes the alpha's place: either way the object is on grey."""
    examples = [lit_scenes.draw_lit(0, 2 * number) for number in range(NUM)]
    images = [as_file(lit_scenes.render(example.lit, example.light)) for example in examples]
    columns = {name: [lit_scenes.COLUMNS[name](example) for example in examples] for name in ("foreground", "mask")}
    alone = cache({"image": images, "foreground": columns["foreground"]}, "alone")
    masked = cache({"image": images, **columns}, "masked")
    for number, example in enumerate(examples):
        light = lit_scenes.light_map(example.foreground_light_name)
        cutout = np.asarray(lit_scenes.cutout(example.lit, light, example.stripes)).astype(np.float64)
        expected = encode(base, (cutout[:, :, :3] - 127) / 127 * (cutout[:, :, 3:] / 255))
        for cached in (alone, masked):
            close(cached.read(number, "foreground")["foreground"], expected)


def test_maps_tell_the_light_where_captions_do_not(build):
    fields = {"source": "generated", "num_scenes": 20, "new_fraction": 0.0, "condition_columns": {"light": "light"}}
    told, silent = (build(world, world=world, **fields) for world in ("lit", "lit_by_map"))
    assert all(" light " in row["caption"] for row in told.rows)
    assert not any(" light " in row["caption"] for row in silent.rows)
    assert [row["light"] for row in told.rows] == [row["light"] for row in silent.rows]


def test_worlds_have_columns_of_their_own(build):
    fields = {"source": "generated", "num_scenes": 20, "new_fraction": 0.0}
    with pytest.raises(InputError, match=r"no such column; there are foreground, mask, .*; nearest is"):
        build(world="lit", condition_columns={"hint": "outline"}, **fields)
    with pytest.raises(InputError, match=r"'light': no such column; there are outline"):
        build(world="shapes", condition_columns={"light": "light"}, **fields)


# ---------------------------------------------------------------- from files, for `sdtrain generate`


def test_a_foreground_from_a_file_is_put_on_grey(tmp_path):
    image = Image.merge("RGBA", [*Image.new("RGB", (100, 50), (227, 27, 127)).split(), Image.new("L", (100, 50))])
    image.paste((227, 27, 127, 255), (50, 0, 100, 50))
    image.save(tmp_path / "object.png")
    found = read_condition("foreground", tmp_path / "object.png", 50)
    assert (found.size, found.mode) == ((50, 50), "RGB")
    assert found.getpixel((24, 25)) == (127, 127, 127)
    assert found.getpixel((25, 25)) == (227, 27, 127)
    image.convert("RGB").save(tmp_path / "plain.png")
    plain = read_condition("foreground", tmp_path / "plain.png", 50)
    assert plain.getpixel((3, 25)) == (227, 27, 127)


def test_a_background_and_a_light_from_files(tmp_path):
    smooth(1, size=(100, 50)).save(tmp_path / "wall.png")
    found = read_condition("background", tmp_path / "wall.png", 50)
    assert np.array_equal(np.asarray(found), np.asarray(smooth(1, size=(100, 50)))[:, 25:75])
    write_files(tmp_path, {"sky.hdr": hdr(light_of(1)), "sky.npy": npy(light_of(1)), "bad.npy": npy(-light_of(1))})
    for name in ("sky.hdr", "sky.npy"):
        light = read_condition("light", tmp_path / name, 50)
        assert light.dtype == torch.float32
        assert np.array_equal(light, light_of(1))
    with pytest.raises(InputError, match=r"bad\.npy: is negative: -"):
        read_condition("light", tmp_path / "bad.npy", 50)
    with pytest.raises(InputError, match=r"none\.hdr: file is missing"):
        read_condition("light", tmp_path / "none.hdr", 50)
