"""The base model: gather its parts, check that they fit together, record their origin.

`data/base/` is a complete folder in the Diffusers layout. Its `manifest.json` records where
each part came from (with the hub's commit) and the SHA-256 of every file. Only configs, tokenizer files
and safetensors are taken: no pickle is read and no remote code runs.
"""

import difflib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from sdtrain.ground import hub
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import new_folder, read_json, sha256_file, write_json
from sdtrain.ground.headers import read_shapes
from sdtrain.ground.layout import CONTROLNET, UNET_OFFSET
from sdtrain.ground.manifests import BaseManifest
from sdtrain.ground.model_files import choose_files, copy_file
from sdtrain.params.schema import BaseParams

_PARTS = {
    "scheduler": (("scheduler_config.json",), None),
    "tokenizer": (("tokenizer_config.json",), None),
    "text_encoder": (("config.json",), "model"),
    "vae": (("config.json",), "diffusion_pytorch_model"),
    "unet": (("config.json",), "diffusion_pytorch_model"),
    CONTROLNET: (("config.json",), "diffusion_pytorch_model"),
}
"""Part to its small files, and the stem of its weights."""

_PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def resolve_base(params: BaseParams, seed: int, out: Path) -> BaseManifest:
    """Gather the base model in `out` and return its manifest.

    Raises:
        InputError: a part is missing, isn't reachable, or doesn't fit the others.
    """
    own_vae, own_text = params.vae_repo is not None, params.text_encoder_repo is not None
    elsewhere = {
        "vae": own_vae,
        "tokenizer": own_text,
        "text_encoder": own_text,
        "unet": params.unet_config is not None,
    }
    # Of the hub only by its own key, because few need it and it is large.
    is_local = params.source == "local" and (Path(params.path) / CONTROLNET / "config.json").exists()
    elsewhere[CONTROLNET] = params.controlnet_repo is not None or not is_local
    main = [part for part in _PARTS if not elsewhere.get(part)]
    with new_folder(out) as folder:
        sources = []
        if params.source == "local":
            sources.append(_from_folder(Path(params.path), main, folder))
        else:
            sources.append(_from_hub("base.repo", params.repo, params.revision, main, folder))
        if own_vae:
            sources.append(_from_hub("base.vae_repo", params.vae_repo, params.vae_revision, ["vae"], folder))
        if own_text:
            both = ["tokenizer", "text_encoder"]
            repo, revision = params.text_encoder_repo, params.text_encoder_revision
            sources.append(_from_hub("base.text_encoder_repo", repo, revision, both, folder))
        if params.controlnet_repo is not None:
            repo, revision = params.controlnet_repo, params.controlnet_revision
            sources.append(_from_hub("base.controlnet_repo", repo, revision, [CONTROLNET], folder))
        if params.unet_config is not None:
            _init_unet(params.unet_config, seed, folder)
            sources.append({"unet_config": params.unet_config, "seed": seed, "parts": ["unet"]})
        if Path(params.unet_offset).is_file():
            sources.append(_take_offset(Path(params.unet_offset), folder))
        else:
            _check_no_offset(Path(params.unet_offset))
        check_fit(folder)
        write_json(folder / "model_index.json", {**_PIPELINE, "_diffusers_version": version("diffusers")})
        files = {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        manifest = BaseManifest(sources=sources, files=files)
        manifest.write(folder)
    return manifest


def check_fit(folder: Path) -> None:
    """Check, from the configs alone, that VAE, text encoder, tokenizer and UNet belong together.

    Raises:
        InputError: names both files and both values of every mismatch.
    """
    vae, text, unet = (read_json(folder / part / "config.json") for part in ("vae", "text_encoder", "unet"))
    vocabulary = _vocabulary_size(folder / "tokenizer")
    max_length = read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length")
    faults = []

    def must(ok: bool, left: str, right: str, why: str) -> None:
        if not ok:
            faults.append(f"{left}, but {right}: {why}")

    kinds = [("vae", vae, "AutoencoderKL"), ("unet", unet, "UNet2DConditionModel")]
    if (folder / CONTROLNET).exists():
        kinds.append((CONTROLNET, read_json(folder / CONTROLNET / "config.json"), "ControlNetModel"))
    for part, config, expected in kinds:
        name = config.get("_class_name") if isinstance(config, dict) else None
        must(name == expected, f"{part} is a {name}", f"sdtrain trains with {expected}", "take another base")
    if faults:
        raise InputError("the base model can't be used:\n" + "\n".join(f"  {fault}" for fault in faults))
    channels, width = vae["latent_channels"], text["hidden_size"]
    for side in ("in_channels", "out_channels"):
        must(
            unet[side] == channels,
            f"unet {side} = {unet[side]}",
            f"vae latent_channels = {channels}",
            "the UNet's input and output must be the VAE's latents",
        )
    must(
        unet["cross_attention_dim"] == width,
        f"unet cross_attention_dim = {unet['cross_attention_dim']}",
        f"text_encoder hidden_size = {width}",
        "the UNet's cross-attention must have the text encoder's width",
    )
    must(
        vocabulary <= text["vocab_size"],
        f"tokenizer has {vocabulary} tokens",
        f"text_encoder vocab_size = {text['vocab_size']}",
        "take both from the same model",
    )
    positions = text["max_position_embeddings"]
    must(
        max_length is not None and max_length <= positions,
        f"tokenizer model_max_length = {max_length}",
        f"text_encoder max_position_embeddings = {positions}",
        "take both from the same model",
    )
    if (folder / CONTROLNET).exists():
        controlnet = read_json(folder / CONTROLNET / "config.json")
        for key in ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim"):
            must(
                controlnet.get(key) == unet[key],
                f"controlnet {key} = {controlnet.get(key)}",
                f"unet {key} = {unet[key]}",
                "the ControlNet must be one of this UNet's structure",
            )
        must(
            controlnet.get("conditioning_channels", 3) == 3,
            f"controlnet conditioning_channels = {controlnet.get('conditioning_channels')}",
            "hints are RGB",
            "take another ControlNet",
        )
    if faults:
        raise InputError("the base model's parts don't fit together:\n" + "\n".join(f"  {f}" for f in faults))


def _vocabulary_size(tokenizer: Path) -> int:
    if (tokenizer / "tokenizer.json").exists():
        tree = read_json(tokenizer / "tokenizer.json")
        ids = [*tree["model"]["vocab"].values(), *(token["id"] for token in tree.get("added_tokens", []))]
    else:
        ids = read_json(tokenizer / "vocab.json").values()
    return max(ids) + 1


def _from_folder(source: Path, parts: list[str], folder: Path) -> dict:
    if not source.is_dir():
        raise InputError(f"base.path = '{source}': no such folder; base.source = 'local' needs a Diffusers folder")
    names = [str(p.relative_to(source)) for p in sorted(source.rglob("*")) if p.is_file()]
    for part in parts:
        _take(f"base.path = '{source}'", part, names, lambda name: source / name, folder)
    return {"path": str(source), "parts": parts}


def _from_hub(key: str, repo: str, revision: str | None, parts: list[str], folder: Path) -> dict:
    where = f"{key} = {repo!r}"
    if key == "base.repo":
        instead = "set base.source: local and base.path to a Diffusers folder on this machine (data/builtin is one)"
    else:
        own = "start from the UNet, with method.start: unet" if CONTROLNET in parts else "keep the base's own"
        instead = f"set {key}: null to {own}"
    with hub.repository(key, repo, revision, "model", instead) as source:
        names = list(source.files)
        paths = source.fetch([name for part in parts for name in _files_of(where, part, names)])
    for part in parts:
        _take(where, part, names, paths.__getitem__, folder)
    return {"repo": repo, "revision": revision, "commit": source.commit, "parts": parts}


def _take(where: str, part: str, names: list[str], locate: Callable[[str], Path], folder: Path) -> None:
    (folder / part).mkdir()
    for name in _files_of(where, part, names):
        copy_file(where, name, locate(name), folder / part)


def _files_of(where: str, part: str, names: list[str]) -> list[str]:
    """The files of one part among all `names`, in its own folder or, for a part's own repository, the root."""
    small, stem = _PARTS[part]
    has_own = part in ("vae", CONTROLNET) and f"{part}/config.json" not in names and "config.json" in names
    return choose_files(where, names, "" if has_own else f"{part}/", small, stem, tokenizer=part == "tokenizer")


def _check_no_offset(folder: Path) -> None:
    """Check that a folder, which is no offset, has none either."""
    where = f"base.unet_offset = '{folder}'"
    if not folder.exists():
        raise InputError(f"{where}: no such file; data/offset, a folder, is none")
    if files := sorted(folder.glob("*.safetensors")):
        raise InputError(f"{where}: is a folder; name the file in it, {files[0]}, or move that elsewhere")


def _take_offset(file: Path, folder: Path) -> dict:
    """Copy a UNet's offset to a folder of its own, with the config of the UNet that it leads to.

    Raises:
        InputError: it isn't one of this base's UNet, with more input channels.
    """
    where, shapes = f"base.unet_offset = '{file}'", read_shapes(file)
    base: dict[str, tuple[int, ...]] = {}
    for weights in sorted((folder / "unet").glob("*.safetensors")):
        base |= read_shapes(weights)
    first, config = "conv_in.weight", read_json(folder / "unet" / "config.json")
    differ = shapes.keys() ^ base.keys()
    if differ:
        raise InputError(
            f"{where}: has not the same tensors as the base's UNet: {len(differ)} are in one of them only, e.g. "
            f"{min(differ)}; expected trained minus base, in Diffusers' keys"
        )
    differ = [name for name in base if name != first and shapes[name] != base[name]]
    differ += [first] if shapes[first][:1] + shapes[first][2:] != base[first][:1] + base[first][2:] else []
    if differ:
        name = min(differ)
        fault = f"{name} has shape {list(shapes[name])}, the base's {list(base[name])}"
        raise InputError(f"{where}: {fault}; it is the offset of another base's UNet")
    channels, possible = shapes[first][1], [base[first][1] * 2, base[first][1] * 3]
    if channels not in possible:
        raise InputError(
            f"{where}: {first} has {channels} input channels, expected {possible[0]} (foreground) or {possible[1]} "
            "(foreground and background)"
        )
    (folder / UNET_OFFSET).mkdir()
    write_json(folder / UNET_OFFSET / "config.json", {**config, "in_channels": channels})
    shutil.copyfile(file, folder / UNET_OFFSET / "diffusion_pytorch_model.safetensors")
    return {"path": str(file), "parts": [UNET_OFFSET]}


def _init_unet(config: dict, seed: int, folder: Path) -> None:
    """Save a UNet with this config and random weights from `seed`; its widths follow the other parts."""
    import inspect

    import torch
    from diffusers import UNet2DConditionModel

    known = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(
                f"base.unet_config.{key} = {config[key]!r}: UNet2DConditionModel has no such setting; nearest is {near}"
            )
    channels = read_json(folder / "vae" / "config.json")["latent_channels"]
    width = read_json(folder / "text_encoder" / "config.json")["hidden_size"]
    torch.manual_seed(seed)
    fitted = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": width, **config}
    try:
        unet = UNet2DConditionModel(**fitted)
    except (TypeError, ValueError) as error:
        raise InputError(f"base.unet_config: {error}") from None
    unet.save_pretrained(folder / "unet")
