"""`sdtrain plan` on a fresh clone: with a hub on this machine, with none, and offline."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from sdtrain.models.sd1 import SD1
from sdtrain.params.load import load_params
from sdtrain.tools.plan.base import find_base
from tests.conftest import ROOT
from tests.integration.hub_client import HubClient
from tests.integration.hub_server import HubServer
from tests.integration.test_plan import lines_of

RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
SD15, POKEMON = "stable-diffusion-v1-5/stable-diffusion-v1-5", "reach-vb/pokemon-blip-captions"
CONFIGS = {"unet/config.json", "vae/config.json", "text_encoder/config.json"}
CARD = """---
dataset_info:
  features: [{name: image, dtype: image}, {name: text, dtype: string}]
  splits: [{name: train, num_bytes: 119417305, num_examples: 833}]
---
# Captioned images
"""


def model_files(**unet: object) -> dict[str, bytes]:
    """A repository like Stable Diffusion 1.5's, but for what its weights hold."""
    configs = {"unet": {**SD1.unet, **unet}, "vae": SD1.vae, "text_encoder": SD1.text_encoder}
    files = {f"{part}/config.json": json.dumps(config).encode() for part, config in configs.items()}
    weights = {f"{part}/diffusion_pytorch_model.safetensors": b"large" for part in ("unet", "vae")}
    return {**files, **weights, "text_encoder/model.safetensors": b"large", "v1-5-pruned.ckpt": b"larger"}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[HubClient]:
    with HubClient(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="module")
def lonely_client(tmp_path_factory) -> Iterator[HubClient]:
    """Its hub's port is taken and refuses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with HubClient(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path_factory.mktemp("home")) as client:
            yield client


@pytest.fixture(scope="module")
def offline_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def offline_client(hub, offline_home) -> Iterator[HubClient]:
    with HubClient(hub.url, offline_home, HF_HUB_OFFLINE="1") as client:
        yield client


@pytest.fixture
def clone(tmp_path) -> Path:
    """What git has of data/."""
    for name in ("builtin", "builtin_clip", "images", "start"):
        shutil.copytree(ROOT / "data" / name, tmp_path / "clone" / "data" / name)
    return tmp_path / "clone"


def plan_of(client: HubClient, clone: Path, recipe: str = "sd15.yaml", **changes: dict) -> dict[str, str]:
    """The plan of a recipe with changes by section, which leaves the clone as it was."""
    tree = yaml.safe_load((ROOT / "recipes" / recipe).read_text())
    for section, fields in changes.items():
        tree[section].update(fields)
    (clone / "params.yaml").write_text(yaml.safe_dump(tree))
    before = {path for path in clone.rglob("*")}
    answer = client.plan(clone)
    assert answer.error is None, answer.error
    assert {path for path in clone.rglob("*")} == before
    return lines_of(answer.printed)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["lonely_client", "offline_client"])
def test_every_recipe_is_planned_without_a_network(request, clone, kind, recipe):
    plan = plan_of(request.getfixturevalue(kind), clone, recipe)
    known = {"images", "steps", "trained", "memory", "disk", "dvc push", "validations", "resume", "time"}
    items = {f"disk {name}" for name in ("base", "dataset", "latents", "states", "checkpoints", "model", "samples")}
    assert {*known, *items, "disk DVC cache"} <= plan.keys()
    assert "(train.max_steps)" in plan["steps"]


def test_stable_diffusion_is_planned_without_a_network(lonely_client, clone):
    plan = plan_of(lonely_client, clone)
    assert plan["base"].startswith(
        "unet 859,520,964, vae 83,653,863, text_encoder 123,060,480 parameters (the known SD 1.x structure, because "
        f"base.repo = '{SD15}': can't reach the hub at http://127.0.0.1:"
    )
    assert plan["images"].startswith(f"unknown (dataset.repo = '{POKEMON}': can't reach the hub at ")
    assert plan["steps"].startswith("4,000 of 16 images, epochs unknown until the images are counted")
    assert plan["memory"].startswith("about 19.98 GiB per process")
    # In fp32, 4 * (859,520,964 + 83,653,863 + 123,060,480) bytes are 3.97 GiB; the UNet alone takes 3.20 GiB, a
    # checkpoint (raw, EMA) 6.40, a state (and two moments) 12.81, three states and three checkpoints 57.64
    assert plan["disk base"] == "3.97 GiB (about, weights in fp32)"
    assert plan["disk states"].startswith("57.64 GiB (")
    assert plan["disk checkpoints"].startswith("12.81 GiB (1 best and the last, 6.40 GiB each")
    assert plan["disk model"].startswith("1.99 GiB (about, fp16)")
    assert plan["disk latents"] == "unknown (128.6 KiB per image: 4 x 64 x 64, plain and flipped)"
    without = "without dataset and latents and features"
    assert plan["dvc push"].startswith(f"at least 18.81 GiB {without}: base 3.97 GiB, dataset unknown")
    assert plan["disk"].startswith(f"at least 99.23 GiB in total {without}")


def test_offline_mode_is_named(offline_client, clone):
    plan = plan_of(offline_client, clone)
    assert f"base.repo = '{SD15}': HF_HUB_OFFLINE is set" in plan["base"]
    assert f"dataset.repo = '{POKEMON}': HF_HUB_OFFLINE is set" in plan["images"]


def test_of_the_hub_only_configs_and_the_card_are_asked(hub, client, clone):
    revision = hub.add(SD15, model_files())
    hub.add(POKEMON, {"README.md": CARD.encode(), "data/train.parquet": b"large"}, kind="datasets")
    plan = plan_of(client, clone, base={"revision": revision})
    assert hub.asked_for(SD15) == CONFIGS
    assert hub.asked_for(POKEMON) == set()
    assert plan["base"].endswith(f"(configs of {SD15}, asked of the hub)")
    assert plan["images"] == f"750 to train on, 83 held out (about, the card of {POKEMON} on the hub)"
    assert plan["steps"] == "4,000 of 16 images, 85.3 epochs (train.max_steps)"
    # 833 x (2 views x 2 x 2 x 16,384 bytes, 77 ids of 8 and a name of 38), 4 probes of 3 x 512 x 512 x 4
    assert plan["disk latents"].startswith(f"{(833 * (131_072 + 654) + 4 * 3_145_728) / 2**20:.2f} MiB (128.6 KiB p")
    assert plan["disk dataset"].startswith(f"{(119_417_305 + 833 * 170) / 2**20:.2f} MiB (about, the card")
    assert plan["disk"].startswith("at least ")
    assert "in total without features; " in plan["disk"]
    epochs = plan_of(client, clone, base={"revision": revision}, train={"max_steps": None, "max_epochs": 10})
    assert epochs["steps"] == "469 of 16 images, 10.0 epochs (train.max_epochs)"


def test_configs_in_the_hub_clients_cache_serve_offline(hub, client, offline_client, offline_home, clone):
    hub.add("acme/small", model_files(block_out_channels=[32, 64, 128, 128], norm_num_groups=8))
    base = {"repo": "acme/small", "revision": None}
    online = plan_of(client, clone, base=base)
    assert online["base"].endswith("(configs of acme/small, asked of the hub)")
    shutil.copytree(Path(online["disk hub cache"].split("downloads in ")[1].rstrip(")")) / "hub", offline_home / "hub")
    offline = plan_of(offline_client, clone, base=base)
    assert offline["base"].endswith("(configs of acme/small, in the hub client's cache)")
    assert offline["trained"] == online["trained"] != "859,520,964 parameters (finetune), adamw, bf16"


def test_parts_may_come_from_other_places(hub, client, clone):
    hub.add("acme/sd", model_files())
    hub.add("acme/vae", {"config.json": json.dumps({**SD1.vae, "layers_per_block": 1}).encode(), "x.bin": b"large"})
    wide = {**SD1.text_encoder, "hidden_size": 384, "num_hidden_layers": 2}
    hub.add("acme/text", {"text_encoder/config.json": json.dumps(wide).encode(), "tokenizer/vocab.json": b"{}"})
    repos = {"repo": "acme/sd", "revision": None, "vae_repo": "acme/vae", "text_encoder_repo": "acme/text"}
    with pytest.raises(AssertionError, match="unet cross_attention_dim = 768, but text_encoder hidden_size = 384"):
        plan_of(client, clone, base=repos)
    unet = {"block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D"] * 2, "norm_num_groups": 8,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2}  # fmt: skip
    plan = plan_of(client, clone, base={**repos, "unet_config": unet})
    assert plan["base unet"].endswith("parameters (base.unet_config)")
    assert plan["base vae"].endswith("(configs of acme/vae, asked of the hub)")
    assert plan["base text"].endswith("(configs of acme/text, asked of the hub)")
    assert hub.asked_for("acme/vae") == {"config.json"}
    assert hub.asked_for("acme/text") == {"text_encoder/config.json"}
    with pytest.raises(AssertionError, match="base.unet_config: .*norm_groups"):
        plan_of(client, clone, base={**repos, "unet_config": {**unet, "norm_groups": 4}})


@pytest.mark.parametrize(
    ("name", "faults", "why"),
    [
        ("acme/gated", {"gated": True}, "the repository is gated; accept its terms"),
        ("acme/broken", {"broken": True}, "the hub answered 500"),
        ("acme/missing", None, "the hub has no such repository"),
    ],
)
def test_a_hub_that_refuses_leaves_the_known_structure(hub, client, clone, name, faults, why):
    if faults is not None:
        hub.add(name, model_files(), **faults)
        hub.add(name, {"README.md": CARD.encode()}, kind="datasets", **faults)
    plan = plan_of(client, clone, base={"repo": name, "revision": None}, dataset={"repo": name})
    assert "(the known SD 1.x structure, because base.repo = " in plan["base"]
    assert why in plan["base"]
    assert plan["trained"].startswith("859,520,964 parameters")


@pytest.mark.parametrize("card", ["", "---\nlicense: mit\n---\n", CARD.replace("name: train", "name: test")])
def test_a_card_that_says_nothing_leaves_the_images_unknown(hub, client, clone, card):
    hub.add("acme/images", {"README.md": card.encode()}, kind="datasets")
    plan = plan_of(client, clone, dataset={"repo": "acme/images"})
    assert plan["images"] == "unknown (the card of acme/images on the hub doesn't say)"
    assert plan["disk dataset"] == "unknown (see images)"


def test_a_local_base_that_is_not_there_is_refused(client, clone):
    shutil.rmtree(clone / "data" / "builtin")
    with pytest.raises(AssertionError, match="base.path = 'data/builtin': no such folder"):
        plan_of(client, clone, "scratch.yaml")


def test_a_resolution_that_the_vae_cannot_reduce_is_refused(client, clone):
    with pytest.raises(AssertionError, match="precompute.resolution = 500: must be a multiple of 8, the VAE's factor"):
        plan_of(client, clone, precompute={"resolution": 500})


def test_configs_that_lack_something_are_refused(hub, client, clone):
    hub.add("acme/other", {**model_files(), "text_encoder/config.json": b'{"model_type": "t5"}'})
    with pytest.raises(
        AssertionError, match=r"text_encoder/config.json .* has no hidden_size, max_position_embeddings"
    ):
        plan_of(client, clone, base={"repo": "acme/other", "revision": None})


def test_an_answer_that_is_not_the_hubs_leaves_the_known_structure(monkeypatch, tmp_path):
    """As of a network that wants a login first."""

    def answer(*_, **__):
        return json.loads("<html>please log in</html>")

    monkeypatch.setattr(HfApi, "model_info", answer)
    base = find_base(load_params(ROOT / "recipes" / "sd15.yaml").base, tmp_path, is_made=False)
    assert base.configs == SD1
    assert base.origins["unet"].startswith(f"the known SD 1.x structure, because base.repo = '{SD15}': the answer from")
