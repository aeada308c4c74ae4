"""Base models and data sets from a hub, served on this machine: what is fetched, recorded and refused."""

import csv
import hashlib
import io
import json
import re
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sdtrain.data.shards import read_dataset
from sdtrain.ground.files import read_json
from sdtrain.ground.manifests import FeaturesManifest
from sdtrain.models.parts import load_tokenizer, tokenize
from sdtrain.models.pipelines import load_pipeline
from tests.integration.hub_client import Answer, HubClient
from tests.integration.hub_server import (
    INFO,
    TREE,
    HubServer,
    Response,
    breaking_off,
    edited,
    flipped,
    lfs_pointer,
    refused,
    replaced,
    reset,
    stalled,
)

Files = dict[str, bytes]

ALPHABET = sorted(bytes_to_unicode().values())
MERGES = [("c", "a"), ("ca", "t</w>")]
TOKENS = [*ALPHABET, *(c + "</w>" for c in ALPHABET), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
A_CAT = [514, 320, 513, 515]
"""Start, `a</w>`, `cat</w>`, end. Of 256 + 256 + 2 + 2 tokens the last are 513, 514 and 515; the
alphabet starts with `!` (33), so that `a` (97) is its 64th, and `a</w>` 256 later."""

NUM_IMAGES, BROKEN = 12, 5
CAPTIONS = [f"image {number}" for number in range(NUM_IMAGES)]


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
    """The same model with the other files of Stable Diffusion 1.5's repository, and its kind of tokenizer."""
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
def images() -> list[bytes]:
    """Twelve PNG files of one colour each, of which the sixth is broken."""
    images = [png((20 * number, 255 - 20 * number, 7 * number)) for number in range(NUM_IMAGES)]
    images[BROKEN] = images[BROKEN][:40]
    return images


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, format="PNG")
    return buffer.getvalue()


def as_parquet(images: list[bytes], captions: list[str]) -> bytes:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    stored = [{"bytes": image, "path": None} for image in images]
    buffer = io.BytesIO()
    datasets.Dataset.from_dict({"image": stored, "text": captions}, features=features).to_parquet(buffer)
    return buffer.getvalue()


def parquet_files(images: list[bytes]) -> Files:
    """A repository with the splits train and test, as `push_to_hub` lays them out."""
    return {
        "data/train-00000-of-00001.parquet": as_parquet(images, CAPTIONS),
        "data/test-00000-of-00001.parquet": as_parquet(images[:1], ["a test image"]),
    }


def image_folder(images: list[bytes]) -> Files:
    lines = [json.dumps({"file_name": f"{n:02}.png", "text": caption}) for n, caption in enumerate(CAPTIONS)]
    files = {f"train/{n:02}.png": image for n, image in enumerate(images)}
    return {**files, "train/metadata.jsonl": "\n".join(lines).encode()}


def zipped_image_folder(images: list[bytes]) -> Files:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in image_folder(images).items():
            archive.writestr(path.removeprefix("train/"), data)
    return {"data/train.zip": buffer.getvalue()}


# ---------------------------------------------------------------- hub and clients


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Where the client keeps what it fetched."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def client(hub, home) -> Iterator[HubClient]:
    with HubClient(hub.url, home) as client:
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


def named(*words: str) -> str:
    """A repository's name."""
    return "acme/" + "-".join(re.findall("[a-z0-9]+", " ".join(words).lower()))


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
    """The UNet's weights are in several files, as those of large models do."""
    files = make_model(seed=2, unet_shard_size="20KB")
    shards = [path for path in files if path.startswith("unet/diffusion_pytorch_model-0")]
    assert len(shards) > 1
    hub.add("acme/sharded", files)

    succeed(client.resolve_base(out, source="hub", repo="acme/sharded"))

    pipeline = load_pipeline(out)
    images = pipeline("a cat", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
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
    """Its files are at the root, as those of stabilityai/sd-vae-ft-mse do."""
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


@pytest.fixture(scope="module")
def controlnet(model, tmp_path_factory) -> Files:
    """A trained one of the model's structure, as the hub has them: at the root of a repository of its own."""
    folder = tmp_path_factory.mktemp("controlnet")
    write_folder(folder / "base", model)
    unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet")
    ControlNetModel.from_unet(unet).save_pretrained(folder / "own")
    return read_folder(folder / "own")


@pytest.mark.parametrize("place", ["", "controlnet/"])
def test_a_controlnet_to_start_from(hub, client, model, controlnet, tmp_path, out, place):
    """Nothing else of its repository is asked for; the base's own needs no key."""
    local, repo = write_folder(tmp_path / "local", model), named("controlnet", place)
    commit = hub.add(repo, {**{place + path: data for path, data in controlnet.items()}, "control.bin": b"a pickle"})

    succeed(client.resolve_base(out, source="local", path=local, controlnet_repo=repo))

    source = {"repo": repo, "revision": None, "commit": commit, "parts": ["controlnet"]}
    assert read_json(out / "manifest.json")["sources"][1] == source
    assert part_of(read_folder(out), "controlnet") == {f"controlnet/{path}": data for path, data in controlnet.items()}
    assert hub.asked_for(repo) == {place + path for path in controlnet}

    own = write_folder(tmp_path / "own", {**model, **{f"controlnet/{path}": data for path, data in controlnet.items()}})
    succeed(client.resolve_base(out, source="local", path=own))
    assert part_of(read_folder(out), "controlnet") == {f"controlnet/{path}": data for path, data in controlnet.items()}


def test_a_controlnet_of_another_unet_is_refused(hub, client, model, controlnet, tmp_path, out):
    local, repo = write_folder(tmp_path / "local", model), named("controlnet", "of another")
    hub.add(repo, with_config(controlnet, "config.json", cross_attention_dim=96))
    message = refusal(client.resolve_base, out, source="local", path=local, controlnet_repo=repo)
    assert "controlnet cross_attention_dim = 96, but unet cross_attention_dim = " in message


def test_the_text_encoder_of_another_repository(hub, client, model, other_model, sd15, tmp_path, out):
    """The base itself is on this machine; the other repository has all of a model's parts."""
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
            "base.repo = 'acme/not--a-name': not a valid name on the hub: "
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
        "Internal Error - We're working hard to fix this as soon as possible! (tried 5 times)"
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
        "  unet in_channels = 4, but vae latent_channels = 8: the UNet's input and output must be the VAE's latents",
        "  unet out_channels = 4, but vae latent_channels = 8: the UNet's input and output must be the VAE's latents",
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
        "the UNet's cross-attention must have the text encoder's width",
    ]


def test_a_git_lfs_pointer_in_a_local_base_is_named(client, model, tmp_path, out):
    local = write_folder(tmp_path / "local", {**model, WEIGHTS: lfs_pointer(model[WEIGHTS])})
    assert refusal(client.resolve_base, out, source="local", path=local) == (
        f"base.path = '{local}': {WEIGHTS} is a Git LFS pointer, not the file itself; run `git lfs pull` there"
    )


# ---------------------------------------------------------------- image encoders


ENCODER = {
    "config.json": b'{"model_type": "dinov2"}', "preprocessor_config.json": b"{}", "model.safetensors": b"weights",
}  # fmt: skip
TOKENIZER = {"tokenizer_config.json": b"{}", "tokenizer.json": b"{}"}
UNNEEDED = {"README.md": b"a card", "pytorch_model.bin": b"a pickle", "open_clip_model.safetensors": b"weights"}


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_an_image_encoder_comes_with_what_it_needs_alone(hub, client, out, kind):
    """A CLIP's tokenizer, too, whose name follows from the repository's."""
    files = with_config(ENCODER, "config.json", model_type=kind) | (TOKENIZER if kind == "clip" else {})
    commit = hub.add(f"acme/{kind}-Small.1", {**files, **TOKENIZER, **UNNEEDED})
    succeed(client.resolve_features(out, features="hub", features_path="x", features_repo=f"acme/{kind}-Small.1"))
    manifest = FeaturesManifest.read(out)
    assert manifest.source == {"repo": f"acme/{kind}-Small.1", "revision": None, "commit": commit}
    assert manifest.label == f"{kind}_small_1"
    assert manifest.files == sha256(files)
    assert set(read_folder(out)) == {*files, "manifest.json"}


def test_an_image_encoder_of_a_folder_and_none(client, tmp_path, out):
    folder = write_folder(tmp_path / "my-dino", {**ENCODER, **UNNEEDED})
    succeed(client.resolve_features(out, features_path=folder))
    assert (FeaturesManifest.read(out).label, set(read_folder(out))) == ("my_dino", {*ENCODER, "manifest.json"})
    succeed(client.resolve_features(out, features="none"))
    assert (FeaturesManifest.read(out).label, set(read_folder(out))) == (None, {"manifest.json"})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b""}, "lacks config.json"),
        ({"config.json": b'{"model_type": "vit"}'}, "model_type = 'vit' in its config.json; take a model of dinov2 or"),
        (
            {"config.json": b'{"model_type": "clip"}', "pytorch_model.bin": b"a pickle"},
            "lacks preprocessor_config.json, tokenizer_config.json, tokenizer.json, model.safetensors (it has pickled",
        ),
        ({**ENCODER, "model.safetensors": lfs_pointer(b"w")}, "model.safetensors is a Git LFS pointer"),
        (None, "no such folder; it needs an image encoder"),
    ],
)
def test_an_image_encoder_that_cannot_be_used_is_refused(client, tmp_path, out, files, message):
    folder = str(tmp_path / "none") if files is None else write_folder(tmp_path / "folder", files)
    error = refusal(client.resolve_features, out, features_path=folder)
    assert error.startswith(f"evaluate.features_path = '{folder}': ")
    assert message in error


def test_without_a_network_evaluation_without_an_encoder_is_offered(lonely_client, out):
    error = refusal(lonely_client.resolve_features, out, features="hub", features_repo="acme/nowhere")
    assert "set evaluate.features: none to evaluate without" in error


# ---------------------------------------------------------------- base: files that don't match what the hub reports

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "vae/config.json"
PAGE = b"<!DOCTYPE html>\n<html><body>Log in to the guest network</body></html>"


def told(path: str, data: bytes) -> str:
    """The hash that the hub reports of a file, or that of a file in its place."""
    if path == CONFIG:
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    return hashlib.sha256(data).hexdigest()


DAMAGED = {
    "weights": (WEIGHTS, flipped),
    "config": (CONFIG, flipped),
    "pointer": (WEIGHTS, lambda answer: replaced(lfs_pointer(answer.body))(answer)),
    "page of the same length": (CONFIG, lambda answer: replaced(PAGE.ljust(len(answer.body)))(answer)),
    "page": (CONFIG, replaced(PAGE)),
    "longer": (CONFIG, lambda answer: replaced(answer.body + b" ")(answer)),
    "shorter": (CONFIG, lambda answer: replaced(answer.body[:-1])(answer)),
    "empty": (CONFIG, replaced(b"")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_arrives_damaged_is_fetched_again_once(hub, client, model, out, case):
    path, fault = DAMAGED[case]
    repo = named("once", case)
    commit = hub.add(repo, model)
    hub.misbehave(repo, path, fault, times=1)

    printed = succeed(client.resolve_base(out, source="hub", repo=repo))

    assert part_of(read_folder(out), "unet", "vae") == part_of(model, "unet", "vae")
    assert f"base.repo = '{repo}': {path} at commit {commit}: " in printed
    assert printed.endswith("; discarded, fetching it again\n")


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_arrives_damaged_twice_is_refused(hub, client, model, out, case):
    """And not kept: as soon as the hub is well again, all is."""
    path, fault = DAMAGED[case]
    repo = named("twice", case)
    commit = hub.add(repo, model)
    hub.misbehave(repo, path, fault, times=2)

    message = refusal(client.resolve_base, out, source="hub", repo=repo)

    arrived = fault(Response(200, {}, model[path])).body
    assert message.startswith(f"base.repo = '{repo}': {path} at commit {commit}: ")
    assert f"{len(arrived)}" in message
    assert f"{len(model[path])}" in message
    if len(arrived) == len(model[path]):
        algorithm = "git blob id" if path == CONFIG else "SHA-256"
        assert f"has {len(arrived)} bytes and {algorithm} {told(path, arrived)}" in message
        assert f"the hub reports {len(model[path])} bytes and {told(path, model[path])}" in message
    assert ("(it is an HTML page)" in message) == (case == "page of the same length")
    assert f"Check that no proxy or login page answers in place of {hub.url}, or try again later" in message
    succeed(client.resolve_base(out, source="hub", repo=repo))
    assert part_of(read_folder(out), "unet", "vae") == part_of(model, "unet", "vae")


def test_a_pointer_that_the_hub_announces_by_its_own_length_is_named(hub, client, model, out):
    """HEAD and GET agree, as if a mirror serves what git holds: only the API reports the weights."""
    hub.add("acme/mirror", model)
    for method in ("HEAD", "GET"):
        hub.misbehave("acme/mirror", WEIGHTS, replaced(lfs_pointer(model[WEIGHTS])), method=method)
    message = refusal(client.resolve_base, out, source="hub", repo="acme/mirror")
    found = hashlib.sha256(lfs_pointer(model[WEIGHTS])).hexdigest()
    assert f"and SHA-256 {found} (it is a Git LFS pointer); the hub reports {len(model[WEIGHTS])} bytes" in message


def test_a_pointer_in_the_repository_itself_is_named(hub, client, model, out):
    commit = hub.add("acme/pointers", {**model, WEIGHTS: lfs_pointer(model[WEIGHTS])})
    assert refusal(client.resolve_base, out, source="hub", repo="acme/pointers") == (
        f"base.repo = 'acme/pointers': {WEIGHTS} at commit {commit}: is a Git LFS pointer in the repository itself, "
        "which lacks the actual file; take another revision or repository"
    )


@pytest.mark.parametrize("path", [WEIGHTS, CONFIG])
def test_a_file_that_is_damaged_in_the_cache_is_fetched_again(hub, client, home, model, out, path):
    repo = named("rotten", path)
    commit = hub.add(repo, model)
    assert "discarded" not in succeed(client.resolve_base(out, source="hub", repo=repo))
    cached = home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit / path
    cached.write_bytes(flipped(Response(200, {}, model[path])).body)

    printed = succeed(client.resolve_base(out, source="hub", repo=repo))

    assert f"{path} at commit {commit}: has {len(model[path])} bytes" in printed
    assert "discarded, fetching it again" in printed
    assert read_folder(out)[path] == model[path] == cached.read_bytes()


@pytest.mark.parametrize("changes", [{"vae_repo": "acme/part"}, {"text_encoder_repo": "acme/part"}])
def test_a_part_from_another_repository_is_checked_as_well(hub, client, model, tmp_path, out, changes):
    local = write_folder(tmp_path / "local", model)
    ((key, _),) = changes.items()
    repo = named("damaged", key)
    path = f"{'vae' if key == 'vae_repo' else 'text_encoder'}/config.json"
    hub.add(repo, model)
    hub.misbehave(repo, path, flipped, times=2)
    message = refusal(client.resolve_base, out, source="local", path=local, **{key: repo})
    assert message.startswith(f"base.{key} = '{repo}': {path} at commit ")


# ---------------------------------------------------------------- base: what the API answers

NOT_THE_API = {
    "page for the repository": (INFO, replaced(PAGE), "JSONDecodeError: "),
    "page for the files": (TREE, replaced(PAGE), "JSONDecodeError: "),
    "bytes": (INFO, replaced(b"\xff\xfe\xfd"), "UnicodeDecodeError: "),
    "list": (INFO, replaced(b"[]"), "TypeError: "),
    "other files": (TREE, replaced(b'[{"type": "file", "name": "unet"}]'), "KeyError: 'path'"),
    "path for a commit": (INFO, edited(sha="../../../x"), "ValueError: it gives '../../../x' for a commit's hash"),
    "no commit": (INFO, edited(sha=None), "ValueError: it gives None for a commit's hash"),
}


@pytest.mark.parametrize("case", NOT_THE_API)
@pytest.mark.parametrize("section", ["base", "dataset"])
def test_what_is_not_the_api_is_refused(hub, client, home, model, images, out, section, case):
    what, fault, cause = NOT_THE_API[case]
    repo = named("not the api", section, case)
    before = {path for path in home.rglob("*") if "not-the-api" in path.name or path.name == "x"}
    if section == "base":
        hub.add(repo, model)
        hub.misbehave(repo, what, fault)
        message = refusal(client.resolve_base, out, source="hub", repo=repo)
    else:
        hub.add(repo, parquet_files(images), kind="datasets")
        hub.misbehave(repo, what, fault)
        message = refusal(client.build_dataset, out, repo=repo, **HUB_DATA)
    assert message.startswith(f"{section}.repo = '{repo}': the answer of {hub.url} isn't one of the hub's API ({cause}")
    assert message.endswith("); check that no proxy or login page answers in its place")
    assert {path for path in home.rglob("*") if "not-the-api" in path.name or path.name == "x"} == before


def test_a_page_that_answers_for_a_file_before_it_is_fetched_is_refused(hub, client, model, out):
    hub.add("acme/captive", model)
    hub.misbehave("acme/captive", CONFIG, lambda answer: Response(200, {}, PAGE), method="HEAD")
    message = refusal(client.resolve_base, out, source="hub", repo="acme/captive")
    assert message.startswith("base.repo = 'acme/captive': ")
    assert "does not seem to be served by a Hugging Face Hub endpoint" in message


# ---------------------------------------------------------------- base: the network's faults

WAITS = re.compile(r"trying again in ([\d.]+) s \((\d) of 5\)")
FAULTS = {
    "reset": reset(),
    "reset in the answer": reset(100),
    "cut off": breaking_off(100),
    "nothing": breaking_off(0),
    **{str(status): refused(status) for status in (408, 429, 500, 502, 503, 504)},
}


REQUESTS = [(INFO, "GET"), (TREE, "GET"), (CONFIG, "HEAD"), (CONFIG, "GET")]
"""In the order in which they are made; a HEAD's answer has no body to be cut off."""
IN_A_BODY = {"reset in the answer", "cut off", "nothing"}


@pytest.mark.parametrize(
    ("what", "method", "fault"),
    [(*request, fault) for request in REQUESTS for fault in FAULTS if request[1] == "GET" or fault not in IN_A_BODY],
)
def test_a_fault_of_the_network_is_waited_out(hub, client, model, out, what, method, fault):
    """After longer waits, each printed."""
    repo = named("weak", what, method, fault)
    hub.add(repo, model)
    hub.misbehave(repo, what, FAULTS[fault], method=method, times=2)

    printed = succeed(client.resolve_base(out, source="hub", repo=repo))

    assert part_of(read_folder(out), "unet", "vae") == part_of(model, "unet", "vae")
    assert WAITS.findall(printed) == [("0.01", "2"), ("0.02", "3")]
    assert all(line.startswith(f"{hub.url}/") for line in printed.splitlines() if WAITS.search(line))


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (reset(), "can't reach the hub at "),
        (refused(503, "Down for repair"), "the hub answered 503: Down for repair ("),
    ],
    ids=["reset", "503"],
)
@pytest.mark.parametrize(("what", "method"), REQUESTS)
def test_a_lasting_fault_of_the_network_is_refused(hub, client, model, out, what, method, fault, cause):
    """After exactly five tries: the sixth would have come through."""
    repo = named("down", what, method, cause)
    hub.add(repo, model)
    hub.misbehave(repo, what, fault, method=method, times=5)

    answer = client.resolve_base(out, source="hub", repo=repo)

    assert answer.error.startswith(f"base.repo = '{repo}': {cause}")
    assert "(tried 5 times" in answer.error
    assert WAITS.findall(answer.printed) == [("0.01", "2"), ("0.02", "3"), ("0.04", "4"), ("0.08", "5")]
    assert not any(out.parent.iterdir())
    assert "trying again" not in succeed(client.resolve_base(out, source="hub", repo=repo))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
@pytest.mark.parametrize(("what", "method"), [(INFO, "GET"), (CONFIG, "HEAD"), (CONFIG, "GET")])
def test_a_refusal_is_no_fault_of_the_network(hub, client, model, out, what, method, status):
    repo = named("refused", what, method, str(status))
    hub.add(repo, model)
    hub.misbehave(repo, what, refused(status, "Not for you"), method=method)
    answer = client.resolve_base(out, source="hub", repo=repo)
    assert answer.error.startswith(f"base.repo = '{repo}': ")
    assert str(status) in answer.error
    assert "trying again" not in answer.printed


@pytest.mark.parametrize(
    "headers", [{"Retry_After": "1"}, {"ratelimit": '"api";r=0;t=1'}], ids=["Retry-After", "rate limit"]
)
def test_the_wait_that_the_hub_asks_for_is_kept(hub, client, model, out, headers):
    repo = named("busy", *headers)
    hub.add(repo, model)
    hub.misbehave(repo, INFO, refused(429, "Too many", **headers), times=1)
    printed = succeed(client.resolve_base(out, source="hub", repo=repo))
    assert "the hub answered 429: Too many; trying again in 1 s (2 of 5)" in printed


@pytest.mark.parametrize("fault", [reset, breaking_off])
def test_a_download_that_breaks_off_is_resumed(hub, client, model, out, fault):
    """From the last ten MiB, which the hub's client keeps at a time; each such stretch clears the count of faults."""
    mib = 2**20
    weights = hashlib.shake_256(b"weights").digest(63 * mib)
    repo, path = named("long", fault.__name__), WEIGHTS
    hub.add(repo, {**model, path: weights})
    hub.misbehave(repo, path, fault(11 * mib), times=5)
    before = len(hub.ranges(path))

    printed = succeed(client.resolve_base(out, source="hub", repo=repo))

    assert hub.ranges(path)[before:] == ["", *(f"{10 * n * mib}-" for n in range(1, 6))]
    assert (out / path).read_bytes() == weights
    assert WAITS.findall(printed) == [("0.01", "2")] * 5


def test_a_hub_that_falls_silent_is_not_waited_for_for_ever(hub, model, tmp_path, out):
    limits = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    hub.add("acme/silent", model)
    over = threading.Event()
    for what, method in REQUESTS:
        hub.misbehave("acme/silent", what, stalled(over), method=method, times=1)
    with HubClient(hub.url, tmp_path / "home", **limits) as client:
        printed = succeed(client.resolve_base(out, source="hub", repo="acme/silent"))
    over.set()
    assert printed.count("timed out; trying again") >= 4


# ---------------------------------------------------------------- dataset


HUB_DATA = {"source": "hub", "validation_fraction": 0.3, "test_fraction": 0.0}
LOCAL_DATA = "set dataset.source: imagefolder and dataset.path to a folder on this machine, or use 'generated'"


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (parquet_files, "row {0}"),
        (image_folder, "row {0} train/{0:02}.png"),
        (zipped_image_folder, "row {0} zip://{0:02}.png::data/train.zip"),
    ],
)
def test_every_image_of_a_hub_data_set_is_accounted_for(hub, client, images, out, layout, name):
    """Inputs go by names that are the same on every machine, wherever the hub's cache is."""
    repo = f"acme/{layout.__name__}"
    commit = hub.add(repo, layout(images), kind="datasets")

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
    assert kept == {CAPTIONS[n]: images[n] for n in range(NUM_IMAGES) if n != BROKEN}
    with (out / "inputs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["input"] for row in rows] == [name.format(n) for n in range(NUM_IMAGES)]
    assert [n for n, row in enumerate(rows) if row["outcome"] == "dropped"] == [BROKEN]
    assert rows[BROKEN]["reason"].startswith("can't be decoded: ")


def parquet_with_hints(images: list[bytes]) -> Files:
    features = {"image": datasets.Image(), "edges": datasets.Image(), "text": datasets.Value("string")}
    stored = [{"bytes": image, "path": None} for image in images]
    hints = [{"bytes": png((n, n, n)), "path": None} for n in range(NUM_IMAGES)]
    table = datasets.Dataset.from_dict(
        {"image": stored, "edges": hints, "text": CAPTIONS}, features=datasets.Features(features)
    )
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return {"data/train-00000-of-00001.parquet": buffer.getvalue()}


def folder_with_hints(images: list[bytes]) -> Files:
    files = {f"train/edges/{n:02}.png": png((n, n, n)) for n in range(NUM_IMAGES)}
    rows = [
        {"file_name": f"{n:02}.png", "edges_file_name": f"edges/{n:02}.png", "text": caption}
        for n, caption in enumerate(CAPTIONS)
    ]
    return image_folder(images) | files | {"train/metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()}


def zip_with_hints(images: list[bytes]) -> Files:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in folder_with_hints(images).items():
            archive.writestr(path.removeprefix("train/"), data)
    return {"data/train.zip": buffer.getvalue()}


@pytest.mark.parametrize(
    ("layout", "origin"),
    [
        (parquet_with_hints, "edges"),
        (folder_with_hints, "train/edges/{0:02}.png"),
        (zip_with_hints, "zip://edges/{0:02}.png::data/train.zip"),
    ],
)
def test_every_image_of_a_hub_data_set_has_its_hint(hub, client, images, out, layout, origin):
    repo = f"acme/{layout.__name__}"
    hub.add(repo, layout(images), kind="datasets")
    succeed(client.build_dataset(out, repo=repo, condition_columns={"hint": "edges"}, **HUB_DATA))
    kept = {row["caption"]: row["hint"] for row in rows_of(out)}
    assert kept == {CAPTIONS[n]: png((n, n, n)) for n in range(NUM_IMAGES) if n != BROKEN}
    assert read_json(out / "manifest.json")["conditions"] == {"hint": {"channels": 1}}
    with (out / "inputs.csv").open(newline="") as file:
        assert [row["hint"] for row in csv.DictReader(file)] == [origin.format(n) for n in range(NUM_IMAGES)]


def test_files_of_a_hub_data_set_in_a_misleading_order_are_refused(hub, client, images, out):
    """Datasets would take the images for the hints."""
    files = folder_with_hints(images)
    rows = [json.loads(line) for line in files["train/metadata.jsonl"].splitlines()]
    rows = [{name: row[name] for name in ("edges_file_name", "file_name", "text")} for row in rows]
    files["train/metadata.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    hub.add("acme/misordered", files, kind="datasets")
    assert refusal(client.build_dataset, out, repo="acme/misordered", **HUB_DATA) == (
        "dataset.repo = 'acme/misordered': file_name must stand before edges_file_name in the metadata"
    )


def test_a_damaged_zip_member_is_dropped(hub, client, images, out):
    files = zipped_image_folder(images)
    stored = files["data/train.zip"]
    at = stored.index(images[3]) + 45  # among the image's compressed pixels: its checksum in the archive fails
    files["data/train.zip"] = stored[:at] + bytes([stored[at] ^ 0xFF]) + stored[at + 1 :]
    hub.add("acme/damaged", files, kind="datasets")
    succeed(client.build_dataset(out, repo="acme/damaged", **HUB_DATA))
    assert read_json(out / "manifest.json")["dropped"] == {"can't be decoded": 2}


def test_a_data_set_is_read_at_the_commit_that_is_recorded(hub, client, images, out):
    old = hub.add("acme/growing", {"train.parquet": as_parquet(images[:5], CAPTIONS[:5])}, kind="datasets", tag="v1")
    new = hub.add("acme/growing", {"train.parquet": as_parquet(images, CAPTIONS)}, kind="datasets")
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
        (
            {"repo": "acme/shapes", "condition_columns": {"hint": "edges"}},
            "dataset.condition_columns.hint = 'edges': no such column; there are image, text; nearest is 'image'",
        ),
    ],
    ids=["no repository", "moved", "no revision", "no split", "no caption column", "no image column", "no hints"],
)
def test_a_wrong_name_in_a_data_set_is_refused(hub, client, images, out, changes, message):
    hub.add("acme/shapes", parquet_files(images), kind="datasets")
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


def test_a_gated_data_set_is_named_so(hub, client, images, out):
    hub.add("acme/gated-data", parquet_files(images), kind="datasets", gated=True)
    message = refusal(client.build_dataset, out, repo="acme/gated-data", **HUB_DATA)
    assert message.startswith("dataset.repo = 'acme/gated-data': can't be read: ")
    assert "'acme/gated-data' is a gated dataset on the Hub" in message


def test_without_a_network_the_way_to_local_images_is_named(lonely_client, nowhere, out):
    message = refusal(lonely_client.build_dataset, out, repo="acme/shapes", **HUB_DATA)
    assert message.startswith(
        f"dataset.repo = 'acme/shapes': can't reach the hub at {nowhere}; check the network, or {LOCAL_DATA} ("
    )


def test_offline_mode_is_named_for_a_data_set(offline_client, out):
    assert refusal(offline_client.build_dataset, out, repo="acme/shapes", **HUB_DATA) == (
        f"dataset.repo = 'acme/shapes': HF_HUB_OFFLINE is set, so the hub can't be asked; unset it, or {LOCAL_DATA}"
    )


# ---------------------------------------------------------------- dataset: what goes wrong on the way


def with_card(images: list[bytes]) -> Files:
    return {**parquet_files(images), "README.md": b"---\ndataset_info: {dataset_name: shapes}\n---\nA card.\n"}


DATA_FILES = [
    (parquet_files, "data/train-00000-of-00001.parquet"),
    (image_folder, "train/03.png"),
    (image_folder, "train/metadata.jsonl"),
    (zipped_image_folder, "data/train.zip"),
    (with_card, "README.md"),
]


def whole(answer: Response) -> Response:
    """Damage at the end of a file, where no archive has its table of contents."""
    return replaced(answer.body[:50] + bytes([answer.body[50] ^ 1]) + answer.body[51:])(answer)


@pytest.mark.parametrize(("layout", "path"), DATA_FILES)
def test_a_data_file_that_arrives_damaged_twice_is_refused(hub, client, images, out, layout, path):
    repo = named("damaged", layout.__name__, path)
    commit = hub.add(repo, layout(images), kind="datasets")
    hub.misbehave(repo, path, whole)
    message = refusal(client.build_dataset, out, repo=repo, **HUB_DATA)
    assert message.startswith(f"dataset.repo = '{repo}': {path} at commit {commit}: has ")
    assert "also when fetched again; it isn't kept" in message


@pytest.mark.parametrize(("layout", "path"), DATA_FILES)
def test_a_data_file_that_is_damaged_in_the_cache_is_fetched_again(hub, client, home, images, out, layout, path):
    """Also where Datasets has made a table of it before."""
    repo = named("rotten", layout.__name__, path)
    files = layout(images)
    commit = hub.add(repo, files, kind="datasets")
    cached = home / "hub" / f"datasets--{repo.replace('/', '--')}" / "snapshots" / commit / path
    succeed(client.build_dataset(out, repo=repo, **HUB_DATA))
    right = sorted((row["caption"], row["image"]) for row in rows_of(out))
    cached.write_bytes(whole(Response(200, {}, files[path])).body)

    printed = succeed(client.build_dataset(out, repo=repo, **HUB_DATA))

    assert f"dataset.repo = '{repo}': {path} at commit {commit}: has {len(files[path])} bytes" in printed
    assert cached.read_bytes() == files[path]
    assert sorted((row["caption"], row["image"]) for row in rows_of(out)) == right


def rows_of(out: Path) -> list[dict]:
    return [row for split in ("train", "validation") for row in read_dataset(out, split)]


def test_a_table_made_of_damaged_files_is_not_used_again(hub, client, home, images, out):
    """Its images are those of the files that were checked, whatever a cache of Datasets holds."""
    hub.add("acme/tables", image_folder(images), kind="datasets")
    succeed(client.build_dataset(out, repo="acme/tables", **HUB_DATA))
    assert not [path for path in home.rglob("*.arrow") if "tables" in str(path)]


@pytest.mark.parametrize("fault", ["reset", "cut off", "503"])
@pytest.mark.parametrize("what", [INFO, TREE, "data/train-00000-of-00001.parquet"])
def test_a_fault_of_the_network_is_waited_out_for_a_data_set(hub, client, images, out, what, fault):
    repo = named("weak data", what, fault)
    hub.add(repo, parquet_files(images), kind="datasets")
    hub.misbehave(repo, what, FAULTS[fault], times=3)
    printed = succeed(client.build_dataset(out, repo=repo, **HUB_DATA))
    assert WAITS.findall(printed)[:3] == [("0.01", "2"), ("0.02", "3"), ("0.04", "4")]
    assert read_json(out.with_suffix(".json"))["num_inputs"] == 12


@pytest.mark.parametrize("num_right", [0, 1, 2])
def test_a_lasting_fault_of_the_network_is_refused_for_a_data_set(hub, client, images, out, num_right):
    """Whoever asks: we do first, Datasets after us."""
    repo = f"acme/down-data-{num_right}"
    hub.add(repo, parquet_files(images), kind="datasets")
    if num_right:
        hub.misbehave(repo, TREE, lambda answer: answer, times=num_right)
    hub.misbehave(repo, TREE, refused(503, "Down for repair"))
    message = refusal(client.build_dataset, out, repo=repo, **HUB_DATA)
    assert message == f"dataset.repo = '{repo}': the hub answered 503: Down for repair (tried 5 times)"


def test_files_of_another_commit_are_refused(hub, client, images, out):
    """As a card may name them: which they are at that moment isn't recorded, and nothing vouches for them."""
    elsewhere = "hf://datasets/acme/mixed@v1/data/train*.parquet"
    card = f"---\nconfigs:\n- {{config_name: default, data_files: '{elsewhere}'}}\n---\n".encode()
    hub.add("acme/mixed", parquet_files(images), kind="datasets", tag="v1")
    commit = hub.add("acme/mixed", {"README.md": card}, kind="datasets")
    assert refusal(client.build_dataset, out, repo="acme/mixed", **HUB_DATA) == (
        f"dataset.repo = 'acme/mixed': names files outside commit {commit}, which can't be checked: "
        f"hf://datasets/acme/mixed@v1/data/train-00000-of-00001.parquet; {LOCAL_DATA}"
    )


def test_files_with_odd_names_are_found(hub, client, out):
    """Names that are patterns, or parts of addresses, elsewhere; among enough others for one progress bar."""
    names = ["[00] a.png", "b#1.png", "c 100%20.png", "d?x=1.png", "é.png", *(f"{n}.png" for n in range(20))]
    images = [png((n, 2 * n, 3 * n)) for n in range(len(names))]
    lines = [json.dumps({"file_name": name, "text": name}) for name in names]
    files = {f"train/{name}": image for name, image in zip(names, images, strict=True)}
    hub.add("acme/odd", {**files, "train/metadata.jsonl": "\n".join(lines).encode()}, kind="datasets")
    succeed(client.build_dataset(out, repo="acme/odd", **HUB_DATA))
    assert {row["caption"]: row["image"] for row in rows_of(out)} == dict(zip(names, images, strict=True))
