"""Base models and data sets from a hub, served on this machine: what is fetched, recorded and refused."""

import csv
import hashlib
import io
import json
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sdtrain.files import read_json
from sdtrain.models.parts import load_tokenizer, tokenize
from sdtrain.models.pipelines import load_pipeline
from sdtrain.shards import read_dataset
from tests.integration.hub_client import Answer, HubClient
from tests.integration.hub_server import HubServer

Files = dict[str, bytes]

ALPHABET = sorted(bytes_to_unicode().values())
MERGES = [("c", "a"), ("ca", "t</w>")]
TOKENS = [*ALPHABET, *(c + "</w>" for c in ALPHABET), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
A_CAT = [514, 320, 513, 515]
"""Start, `a</w>`, `cat</w>`, end. Of 256 + 256 + 2 + 2 tokens the last are 513, 514 and 515; the
alphabet starts with `!` (33), so that `a` (97) is its 64th, and `a</w>` 256 later."""

NUM_PICTURES, BROKEN = 12, 5
CAPTIONS = [f"picture {number}" for number in range(NUM_PICTURES)]


# ---------------------------------------------------------------- models


@pytest.fixture(scope="session")
def make_model(tmp_path_factory) -> Callable[..., Files]:
    """A function that makes a tiny, random Stable Diffusion: the files of its Diffusers folder."""

    def make(seed: int, unet_shard_size: str = "1GB") -> Files:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("model")
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(TOKENS),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=16,
                bos_token_id=514,
                eos_token_id=515,
                pad_token_id=515,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
        )
        vocab = {token: number for number, token in enumerate(TOKENS)}
        vae.save_pretrained(folder / "vae")
        text_encoder.save_pretrained(folder / "text_encoder")
        unet.save_pretrained(folder / "unet", max_shard_size=unet_shard_size)
        CLIPTokenizer(vocab=vocab, merges=MERGES, model_max_length=77).save_pretrained(folder / "tokenizer")
        DDPMScheduler(num_train_timesteps=1000).save_pretrained(folder / "scheduler")
        return read_folder(folder)

    return make


@pytest.fixture(scope="session")
def model(make_model) -> Files:
    return make_model(seed=0)


@pytest.fixture(scope="session")
def other_model(make_model) -> Files:
    return make_model(seed=1)


@pytest.fixture(scope="session")
def sd15(model) -> Files:
    """The same model with what else lies in Stable Diffusion 1.5's repository, and its kind of tokenizer."""
    special = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start = {**special, "content": "<|startoftext|>"}
    tokenizer = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **start},
        "do_lower_case": True,
        "eos_token": {"__type": "AddedToken", **special},
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {"__type": "AddedToken", **special},
    }
    specials = {"bos_token": start, "eos_token": special, "pad_token": "<|endoftext|>", "unk_token": special}
    pickle = b"\x80\x02 a pickle, which could run anything"
    return {
        **{path: data for path, data in model.items() if not path.startswith("tokenizer/")},
        "tokenizer/tokenizer_config.json": json.dumps(tokenizer).encode(),
        "tokenizer/special_tokens_map.json": json.dumps(specials).encode(),
        "tokenizer/vocab.json": json.dumps({token: number for number, token in enumerate(TOKENS)}).encode(),
        "tokenizer/merges.txt": "\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]).encode(),
        "README.md": b"A model card.",
        "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
        "feature_extractor/preprocessor_config.json": b"{}",
        "safety_checker/config.json": b"{}",
        "safety_checker/model.safetensors": b"weights",
        "safety_checker/pytorch_model.bin": pickle,
        "text_encoder/model.fp16.safetensors": b"weights",
        "text_encoder/pytorch_model.bin": pickle,
        "unet/diffusion_pytorch_model.bin": pickle,
        "unet/diffusion_pytorch_model.fp16.safetensors": b"weights",
        "unet/diffusion_pytorch_model.non_ema.safetensors": b"weights",
        "vae/diffusion_pytorch_model.bin": pickle,
        "v1-5-pruned.ckpt": pickle,
        "v1-5-pruned.safetensors": b"weights",
    }


SD15_NEEDED = {
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


# ---------------------------------------------------------------- data sets


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Twelve PNG files of one colour each, of which the sixth is broken."""
    pictures = [png((20 * number, 255 - 20 * number, 7 * number)) for number in range(NUM_PICTURES)]
    pictures[BROKEN] = pictures[BROKEN][:40]
    return pictures


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, format="PNG")
    return buffer.getvalue()


def as_parquet(pictures: list[bytes], captions: list[str]) -> bytes:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    stored = [{"bytes": picture, "path": None} for picture in pictures]
    buffer = io.BytesIO()
    datasets.Dataset.from_dict({"image": stored, "text": captions}, features=features).to_parquet(buffer)
    return buffer.getvalue()


def parquet_files(pictures: list[bytes]) -> Files:
    """A repository with the splits train and test, as `push_to_hub` lays them out."""
    return {
        "data/train-00000-of-00001.parquet": as_parquet(pictures, CAPTIONS),
        "data/test-00000-of-00001.parquet": as_parquet(pictures[:1], ["a test picture"]),
    }


def image_folder(pictures: list[bytes]) -> Files:
    lines = [json.dumps({"file_name": f"{n:02}.png", "text": caption}) for n, caption in enumerate(CAPTIONS)]
    files = {f"train/{n:02}.png": picture for n, picture in enumerate(pictures)}
    return {**files, "train/metadata.jsonl": "\n".join(lines).encode()}


def zipped_image_folder(pictures: list[bytes]) -> Files:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in image_folder(pictures).items():
            archive.writestr(path.removeprefix("train/"), data)
    return {"data/train.zip": buffer.getvalue()}


# ---------------------------------------------------------------- hub and clients


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory) -> Iterator[HubClient]:
    with HubClient(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="session")
def offline_client(hub, tmp_path_factory) -> Iterator[HubClient]:
    with HubClient(hub.url, tmp_path_factory.mktemp("home"), HF_HUB_OFFLINE="1") as client:
        yield client


@pytest.fixture(scope="session")
def nowhere() -> Iterator[str]:
    """An endpoint where nothing listens: its port is taken and refuses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="session")
def lonely_client(nowhere, tmp_path_factory) -> Iterator[HubClient]:
    with HubClient(nowhere, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "outs" / "out"


def read_folder(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_folder(folder: Path, files: Files) -> str:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return str(folder)


def sha256(files: Files) -> dict[str, str]:
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}


def part_of(files: Files, *parts: str) -> Files:
    return {path: data for path, data in files.items() if path.startswith(tuple(f"{part}/" for part in parts))}


def with_config(files: Files, path: str, **changes: object) -> Files:
    return {**files, path: json.dumps({**json.loads(files[path]), **changes}).encode()}


def succeed(answer: Answer) -> str:
    assert answer.error is None, answer.error
    return answer.printed


def refusal(call: Callable[..., Answer], out: Path, **changes: object) -> str:
    """The message with which a call refuses, leaving nothing behind: no `out`, no `.partial`, no metrics."""
    answer = call(out, **changes)
    assert answer.error is not None, f"wasn't refused: {answer.printed}"
    assert not out.parent.exists() or not any(out.parent.iterdir())
    return answer.error


# ---------------------------------------------------------------- base: what is fetched and recorded


def test_the_whole_base_comes_from_the_hub(hub, client, sd15, out):
    commit = hub.add("acme/sd15", sd15)

    printed = succeed(client.resolve_base(out, source="hub", repo="acme/sd15"))

    manifest = read_json(out / "manifest.json")
    parts = ["scheduler", "tokenizer", "text_encoder", "vae", "unet"]
    assert manifest["sources"] == [{"repo": "acme/sd15", "revision": None, "commit": commit, "parts": parts}]
    model_index = hashlib.sha256((out / "model_index.json").read_bytes()).hexdigest()
    needed = {path: sd15[path] for path in SD15_NEEDED}
    assert manifest["files"] == {**sha256(needed), "model_index.json": model_index}
    fetched = read_folder(out)
    assert {path: fetched[path] for path in needed} == needed
    assert set(fetched) == {*needed, "model_index.json", "manifest.json"}
    assert printed == f"base.repo: acme/sd15 at its newest revision is commit {commit}\n"


def test_only_the_needed_files_are_asked_for(hub, client, sd15, out):
    """Above all no pickle, whole checkpoint, safety checker or second copy of the weights."""
    hub.add("acme/large", sd15)
    succeed(client.resolve_base(out, source="hub", repo="acme/large"))
    assert hub.asked_for("acme/large") == SD15_NEEDED


@pytest.mark.parametrize("kind", ["vocab.json and merges.txt", "tokenizer.json"])
def test_both_kinds_of_tokenizer_give_the_same_tokens(hub, client, sd15, model, out, kind):
    repo = f"acme/tokenizer-{len(kind)}"
    hub.add(repo, model if kind == "tokenizer.json" else sd15)
    succeed(client.resolve_base(out, source="hub", repo=repo))
    assert (out / "tokenizer" / "tokenizer.json").exists() == (kind == "tokenizer.json")
    ids = tokenize(load_tokenizer(out), ["a cat"])
    assert ids.tolist() == [A_CAT + [515] * 73]


def test_diffusers_loads_what_was_fetched(hub, client, make_model, out):
    """The UNet's weights lie in several files, as those of large models do."""
    files = make_model(seed=2, unet_shard_size="20KB")
    shards = [path for path in files if path.startswith("unet/diffusion_pytorch_model-0")]
    assert len(shards) > 1
    hub.add("acme/sharded", files)

    succeed(client.resolve_base(out, source="hub", repo="acme/sharded"))

    pipeline = load_pipeline(out)
    pictures = pipeline("a cat", num_inference_steps=1, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)
    stored = {path: data for path, data in read_folder(out).items() if path.startswith("unet/")}
    assert stored == part_of(files, "unet")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, client, model, other_model, out):
    old = hub.add("acme/moving", other_model, tag="v1.0")
    new = hub.add("acme/moving", model)
    found = {}
    for revision in (None, "main", "v1.0", old):
        succeed(client.resolve_base(out, source="hub", repo="acme/moving", revision=revision))
        manifest = read_json(out / "manifest.json")
        found[revision] = (manifest["sources"][0]["revision"], manifest["sources"][0]["commit"])
        expected = model if found[revision][1] == new else other_model
        assert part_of(read_folder(out), "unet") == part_of(expected, "unet")
    assert found == {None: (None, new), "main": ("main", new), "v1.0": ("v1.0", old), old: (old, old)}


def test_the_vae_of_another_repository(hub, client, model, other_model, out):
    """Its files lie at the root, as those of stabilityai/sd-vae-ft-mse do."""
    own = hub.add("acme/base-of-vae", model)
    vae = {path.removeprefix("vae/"): data for path, data in part_of(other_model, "vae").items()}
    other = hub.add("acme/vae", {**vae, "diffusion_pytorch_model.bin": b"a pickle", "README.md": b"A card."}, tag="mse")

    succeed(
        client.resolve_base(
            out, source="hub", repo="acme/base-of-vae", vae_repo="acme/vae", vae_revision="mse", revision="main"
        )
    )

    manifest = read_json(out / "manifest.json")
    assert manifest["sources"] == [
        {
            "repo": "acme/base-of-vae",
            "revision": "main",
            "commit": own,
            "parts": ["scheduler", "tokenizer", "text_encoder", "unet"],
        },
        {"repo": "acme/vae", "revision": "mse", "commit": other, "parts": ["vae"]},
    ]
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert manifest["files"][weights] == hashlib.sha256(other_model[weights]).hexdigest()
    assert manifest["files"][weights] != hashlib.sha256(model[weights]).hexdigest()
    assert part_of(read_folder(out), "vae") == part_of(other_model, "vae")
    assert hub.asked_for("acme/vae") == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not [path for path in hub.asked_for("acme/base-of-vae") if path.startswith("vae/")]


def test_the_text_encoder_of_another_repository(hub, client, model, other_model, sd15, tmp_path, out):
    """The base itself lies on this machine; the other repository has all of a model's parts."""
    local = write_folder(tmp_path / "local", model)
    tokenizer = part_of(sd15, "tokenizer")
    commit = hub.add("acme/text", {**other_model, **tokenizer})

    succeed(client.resolve_base(out, source="local", path=local, text_encoder_repo="acme/text"))

    manifest = read_json(out / "manifest.json")
    assert manifest["sources"] == [
        {"path": local, "parts": ["scheduler", "vae", "unet"]},
        {"repo": "acme/text", "revision": None, "commit": commit, "parts": ["tokenizer", "text_encoder"]},
    ]
    weights = "text_encoder/model.safetensors"
    assert manifest["files"][weights] == hashlib.sha256(other_model[weights]).hexdigest()
    assert manifest["files"][weights] != hashlib.sha256(model[weights]).hexdigest()
    fetched = read_folder(out)
    assert part_of(fetched, "text_encoder") == part_of(other_model, "text_encoder")
    assert part_of(fetched, "vae", "unet", "scheduler") == part_of(model, "vae", "unet", "scheduler")
    assert {path.split("/")[0] for path in hub.asked_for("acme/text")} == {"text_encoder", "tokenizer"}


# ---------------------------------------------------------------- base: what is refused


LOCAL_BASE = "set base.source: local and base.path to a Diffusers folder on this machine (data/builtin is one)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"repo": "acme/none"},
            "base.repo = 'acme/none': the hub has no such repository; "
            "check the spelling, or log in with `hf auth login` if it is private",
        ),
        (
            {"repo": "runwayml/stable-diffusion-v1-5"},
            "base.repo = 'runwayml/stable-diffusion-v1-5': the hub has no such repository; "
            "it moved: use 'stable-diffusion-v1-5/stable-diffusion-v1-5'",
        ),
        (
            {"repo": "acme/plain", "revision": "v7"},
            "base.repo = 'acme/plain': has no revision 'v7'; see its branches and commits on its page",
        ),
        (
            {"repo": "acme/plain", "vae_repo": "acme/none"},
            "base.vae_repo = 'acme/none': the hub has no such repository; "
            "check the spelling, or log in with `hf auth login` if it is private",
        ),
        (
            {"repo": "acme/plain", "text_encoder_repo": "acme/plain", "text_encoder_revision": "v8"},
            "base.text_encoder_repo = 'acme/plain': has no revision 'v8'; see its branches and commits on its page",
        ),
        (
            {"repo": "acme/not--a-name"},
            "base.repo = 'acme/not--a-name': not a name that the hub allows: "
            "Cannot have -- or .. in repo_id: 'acme/not--a-name'.",
        ),
    ],
    ids=["no repository", "moved", "no revision", "no VAE repository", "no text encoder revision", "no name"],
)
def test_a_wrong_name_is_refused(hub, client, model, out, changes, message):
    hub.add("acme/plain", model)
    assert refusal(client.resolve_base, out, source="hub", **changes) == message


def test_a_gated_repository_says_how_to_get_in(hub, client, model, out):
    hub.add("acme/gated", model, gated=True)
    assert refusal(client.resolve_base, out, source="hub", repo="acme/gated") == (
        "base.repo = 'acme/gated': the repository is gated; accept its terms on its page, "
        "then log in with `hf auth login`"
    )


def test_a_fault_of_the_hub_is_passed_on(hub, client, model, out):
    hub.add("acme/broken", model, broken=True)
    assert refusal(client.resolve_base, out, source="hub", repo="acme/broken") == (
        "base.repo = 'acme/broken': the hub answered 500: "
        "Internal Error - We're working hard to fix this as soon as possible!"
    )


def test_pickled_weights_are_refused_before_anything_is_fetched(hub, client, model, out):
    pickled = {path.replace("model.safetensors", "model.bin"): data for path, data in model.items()}
    hub.add("acme/pickled", pickled)
    assert refusal(client.resolve_base, out, source="hub", repo="acme/pickled") == (
        "base.repo = 'acme/pickled': lacks text_encoder/model.safetensors "
        "(it has pickled weights, which sdtrain never loads: convert them to safetensors)"
    )
    assert hub.asked_for("acme/pickled") == set()


def test_missing_files_are_named(hub, client, model, out):
    """Here the tokenizer's, of which either kind would do."""
    absent = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
    hub.add("acme/partial", {path: data for path, data in model.items() if path not in absent})
    assert refusal(client.resolve_base, out, source="hub", repo="acme/partial") == (
        "base.repo = 'acme/partial': lacks tokenizer/tokenizer_config.json, tokenizer/tokenizer.json"
    )


def test_without_a_network_the_way_out_is_named(lonely_client, nowhere, out):
    message = refusal(lonely_client.resolve_base, out, source="hub", repo="acme/model")
    expected = f"base.repo = 'acme/model': can't reach the hub at {nowhere}; check the network, or {LOCAL_BASE} ("
    assert message.startswith(expected)
    assert "Connection refused" in message


def test_without_a_network_a_local_base_keeps_its_own_vae(lonely_client, nowhere, model, tmp_path, out):
    local = write_folder(tmp_path / "local", model)
    message = refusal(lonely_client.resolve_base, out, source="local", path=local, vae_repo="acme/vae")
    assert message.startswith(
        f"base.vae_repo = 'acme/vae': can't reach the hub at {nowhere}; "
        "check the network, or set base.vae_repo: null to keep the base's own ("
    )


def test_offline_mode_is_named(offline_client, out):
    assert refusal(offline_client.resolve_base, out, source="hub", repo="acme/model") == (
        f"base.repo = 'acme/model': HF_HUB_OFFLINE is set, so the hub can't be asked; unset it, or {LOCAL_BASE}"
    )


def test_a_vae_with_other_channels_does_not_fit(hub, client, model, out):
    hub.add("acme/four-channels", model)
    hub.add("acme/vae-of-eight", with_config(part_of(model, "vae"), "vae/config.json", latent_channels=8))
    message = refusal(client.resolve_base, out, source="hub", repo="acme/four-channels", vae_repo="acme/vae-of-eight")
    assert message.splitlines() == [
        "the base model's parts don't fit together:",
        "  unet in_channels = 4, but vae latent_channels = 8: the UNet must take and give the VAE's latents",
        "  unet out_channels = 4, but vae latent_channels = 8: the UNet must take and give the VAE's latents",
    ]


def test_a_text_encoder_of_another_width_does_not_fit(hub, client, model, out):
    hub.add("acme/sixteen-wide", model)
    wide = with_config(part_of(model, "text_encoder", "tokenizer"), "text_encoder/config.json", hidden_size=32)
    hub.add("acme/text-of-thirty-two", wide)
    message = refusal(
        client.resolve_base, out, source="hub", repo="acme/sixteen-wide", text_encoder_repo="acme/text-of-thirty-two"
    )
    assert message.splitlines() == [
        "the base model's parts don't fit together:",
        "  unet cross_attention_dim = 16, but text_encoder hidden_size = 32: "
        "the UNet must attend to the text encoder's width",
    ]


# ---------------------------------------------------------------- dataset


HUB_DATA = {"source": "hub", "validation_fraction": 0.3}
LOCAL_DATA = "set dataset.source: imagefolder and dataset.path to a folder on this machine, or use 'generated'"


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (parquet_files, "row {0}"),
        (image_folder, "row {0} train/{0:02}.png"),
        (zipped_image_folder, "row {0} zip://{0:02}.png::data/train.zip"),
    ],
)
def test_every_picture_of_a_hub_data_set_is_accounted_for(hub, client, pictures, out, layout, name):
    """Inputs go by names that are the same on every machine, wherever the hub's cache lies."""
    repo = f"acme/{layout.__name__}"
    commit = hub.add(repo, layout(pictures), kind="datasets")

    printed = succeed(client.build_dataset(out, repo=repo, **HUB_DATA))

    manifest, counts = read_json(out / "manifest.json"), read_json(out.with_suffix(".json"))
    assert manifest["source"] == {"repo": repo, "revision": None, "commit": commit, "split": "train"}
    assert printed.startswith(f"dataset.repo: {repo} at its newest revision is commit {commit}\n")
    splits = {split: list(read_dataset(out, split)) for split in ("train", "validation")}
    assert splits["train"]
    assert splits["validation"]
    assert counts == {
        "num_inputs": 12,
        "num_train": len(splits["train"]),
        "num_validation": len(splits["validation"]),
        "num_dropped": 1,
        "num_damaged_exif": 0,
    }
    assert len(splits["train"]) + len(splits["validation"]) == 11
    kept = {row["caption"]: row["image"] for rows in splits.values() for row in rows}
    assert kept == {CAPTIONS[n]: pictures[n] for n in range(NUM_PICTURES) if n != BROKEN}
    with (out / "inputs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["input"] for row in rows] == [name.format(n) for n in range(NUM_PICTURES)]
    assert [n for n, row in enumerate(rows) if row["outcome"] == "dropped"] == [BROKEN]
    assert rows[BROKEN]["reason"].startswith("can't be decoded: ")


def test_a_damaged_zip_member_is_dropped(hub, client, pictures, out):
    files = zipped_image_folder(pictures)
    stored = files["data/train.zip"]
    at = stored.index(pictures[3]) + 45  # among the picture's compressed pixels: its checksum in the archive fails
    files["data/train.zip"] = stored[:at] + bytes([stored[at] ^ 0xFF]) + stored[at + 1 :]
    hub.add("acme/damaged", files, kind="datasets")
    succeed(client.build_dataset(out, repo="acme/damaged", **HUB_DATA))
    assert read_json(out / "manifest.json")["dropped"] == {"can't be decoded": 2}


def test_a_data_set_is_read_at_the_commit_that_is_recorded(hub, client, pictures, out):
    old = hub.add("acme/growing", {"train.parquet": as_parquet(pictures[:5], CAPTIONS[:5])}, kind="datasets", tag="v1")
    new = hub.add("acme/growing", {"train.parquet": as_parquet(pictures, CAPTIONS)}, kind="datasets")
    found = {}
    for revision in (None, "v1"):
        succeed(client.build_dataset(out, repo="acme/growing", revision=revision, **HUB_DATA))
        source = read_json(out / "manifest.json")["source"]
        num_inputs = read_json(out.with_suffix(".json"))["num_inputs"]
        found[revision] = (source["revision"], source["commit"], num_inputs)
    assert found == {None: (None, new, 12), "v1": ("v1", old, 5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"repo": "acme/none"},
            "dataset.repo = 'acme/none': the hub has no such repository; "
            "check the spelling, or log in with `hf auth login` if it is private",
        ),
        (
            {"repo": "lambdalabs/pokemon-blip-captions"},
            "dataset.repo = 'lambdalabs/pokemon-blip-captions': the hub has no such repository; "
            "it moved: use 'reach-vb/pokemon-blip-captions'",
        ),
        (
            {"repo": "acme/shapes", "revision": "v7"},
            "dataset.repo = 'acme/shapes': has no revision 'v7'; see its branches and commits on its page",
        ),
        ({"repo": "acme/shapes", "split": "val"}, "dataset.split = 'val': acme/shapes has train, test"),
        (
            {"repo": "acme/shapes", "caption_column": "txt"},
            "dataset.caption_column = 'txt': no such column; there are image, text; nearest is 'text'",
        ),
        (
            {"repo": "acme/shapes", "image_column": "images"},
            "dataset.image_column = 'images': no such column; there are image, text; nearest is 'image'",
        ),
    ],
    ids=["no repository", "moved", "no revision", "no split", "no caption column", "no image column"],
)
def test_a_wrong_name_in_a_data_set_is_refused(hub, client, pictures, out, changes, message):
    hub.add("acme/shapes", parquet_files(pictures), kind="datasets")
    assert refusal(client.build_dataset, out, **HUB_DATA, **changes) == message


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"README.md": b"A card."}, "doesn't contain any data files"),
        ({"unreadable.py": b"import datasets"}, "Dataset scripts are no longer supported, but found unreadable.py"),
        ({"train.parquet": b"PAR1 and nothing more PAR1"}, "Parquet file size is 26 bytes"),
        (
            {
                "README.md": b"---\nconfigs:\n- {config_name: big, data_files: big.csv}\n"
                b"- {config_name: small, data_files: small.csv}\n---\n",
                "big.csv": b"text\na\n",
                "small.csv": b"text\na\n",
            },
            "pick one among the available configs: ['big', 'small']",
        ),
    ],
    ids=["empty", "script", "damaged", "several configs"],
)
def test_a_data_set_that_cannot_be_read_is_refused(hub, client, out, files, cause):
    hub.add("acme/unreadable", files, kind="datasets")
    message = refusal(client.build_dataset, out, repo="acme/unreadable", **HUB_DATA)
    assert message.startswith("dataset.repo = 'acme/unreadable': can't be read: ")
    assert cause in message
    assert message.endswith(f"; {LOCAL_DATA}")
    assert "\n" not in message


def test_a_gated_data_set_is_named_so(hub, client, pictures, out):
    hub.add("acme/gated-data", parquet_files(pictures), kind="datasets", gated=True)
    message = refusal(client.build_dataset, out, repo="acme/gated-data", **HUB_DATA)
    assert message.startswith("dataset.repo = 'acme/gated-data': can't be read: ")
    assert "'acme/gated-data' is a gated dataset on the Hub" in message


def test_without_a_network_the_way_to_local_pictures_is_named(lonely_client, nowhere, out):
    message = refusal(lonely_client.build_dataset, out, repo="acme/shapes", **HUB_DATA)
    assert message.startswith(
        f"dataset.repo = 'acme/shapes': can't reach the hub at {nowhere}; check the network, or {LOCAL_DATA} ("
    )


def test_offline_mode_is_named_for_a_data_set(offline_client, out):
    assert refusal(offline_client.build_dataset, out, repo="acme/shapes", **HUB_DATA) == (
        f"dataset.repo = 'acme/shapes': HF_HUB_OFFLINE is set, so the hub can't be asked; unset it, or {LOCAL_DATA}"
    )
