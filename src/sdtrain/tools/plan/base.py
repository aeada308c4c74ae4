"""The base model's structure, before the base is there: from its own configs, or else that of Stable Diffusion 1.x."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import disable_progress_bars

from sdtrain.ground import hub
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.layout import CONTROLNET, UNET_OFFSET
from sdtrain.models.parts import Configs, meta_parts, read_configs, vae_factor
from sdtrain.models.sd1 import SD1
from sdtrain.params.schema import BaseParams
from sdtrain.tools.plan.sizes import folder_bytes

PARTS = ("unet", "vae", "text_encoder")
_KEYS = {
    "unet": ("in_channels", "cross_attention_dim"),
    "vae": ("latent_channels", "block_out_channels"),
    "text_encoder": ("hidden_size", "max_position_embeddings"),
}
"""Keys that the plan reads from each part's config."""
TIMEOUT_S = 5
"""Of each request to the hub."""


@dataclass(frozen=True)
class Source:
    """Where parts of the base come from."""

    key: str
    """The params key that names it."""
    record: dict
    """What the manifest of data/base records of it, without the hub's commit."""


@dataclass(frozen=True)
class Base:
    """The structure of the base model, and its size on disk."""

    configs: Configs
    origins: dict[str, str]
    """By part, where its config comes from."""
    num_parameters: dict[str, int]
    """By part."""
    num_bytes: int
    """Of data/base."""
    bytes_origin: str
    num_hub_bytes: int
    """Of what the hub's client will keep in its own cache."""


def base_sources(params: BaseParams) -> dict[str, Source]:
    """By part, as the stage `base` takes them."""
    folder, own_unet = {"path": str(Path(params.path))}, {"unet_config": params.unet_config}
    main = _hub_source(params, "repo") if params.source == "hub" else Source("base.path", folder)
    others = {}
    if params.controlnet_repo:
        others[CONTROLNET] = _hub_source(params, "controlnet_repo")
    elif params.source == "local" and (Path(params.path) / CONTROLNET / "config.json").exists():
        others[CONTROLNET] = main
    if Path(params.unet_offset).is_file():
        others[UNET_OFFSET] = Source("base.unet_offset", {"path": str(Path(params.unet_offset))})
    return {
        "unet": main if params.unet_config is None else Source("base.unet_config", own_unet),
        "vae": _hub_source(params, "vae_repo") if params.vae_repo else main,
        "text_encoder": _hub_source(params, "text_encoder_repo") if params.text_encoder_repo else main,
        **others,
    }


def _hub_source(params: BaseParams, key: str) -> Source:
    revision = key.replace("repo", "revision")
    return Source(f"base.{key}", {"repo": getattr(params, key), "revision": getattr(params, revision)})


def find_base(params: BaseParams, folder: Path, is_made: bool) -> Base:
    """The base in data/base if that is there, else from its source.

    Raises:
        InputError: a local base isn't there, its parts don't fit together, or Diffusers refuses `base.unet_config`.
    """
    if is_made:
        configs = read_configs(folder)
        origins = dict.fromkeys(PARTS, f"configs of {folder}")
        return Base(configs, origins, _count_parameters(configs), folder_bytes(folder), f"counted in {folder}", 0)
    sources, found, origins = base_sources(params), {}, {}
    for key in dict.fromkeys(sources[part].key for part in ("vae", "text_encoder", "unet")):  # whose widths are theirs
        parts = [part for part in PARTS if sources[part].key == key]
        configs, origin = _read_parts(sources[parts[0]], parts, found)
        _check_keys(configs, origin)
        found |= configs
        origins |= dict.fromkeys(parts, origin)
    configs = Configs(**found)
    _check_fit(configs)
    num_parameters = _count_parameters(configs)
    local = {part: _stored_bytes(part, Path(s.record["path"])) for part, s in sources.items() if "path" in s.record}
    new = {part: 4 * num_parameters[part] for part in PARTS if part not in local}
    if params.controlnet_repo:
        with torch.device("meta"):
            controlnet = ControlNetModel.from_unet(
                meta_parts(configs, sample_size=64).unet, load_weights_from_unet=False
            )
        new[CONTROLNET] = 4 * sum(p.numel() for p in controlnet.parameters())
    return Base(
        configs,
        {part: origins[part] for part in PARTS},
        num_parameters,
        num_bytes=sum(local.values()) + sum(new.values()),
        bytes_origin="about, weights in fp32" if new else f"about, the files of {params.path}",
        num_hub_bytes=sum(new[part] for part in new if "repo" in sources[part].record),
    )


def latent_shape(configs: Configs, resolution: int) -> tuple[int, int, int]:
    """Channels, height and width.

    Raises:
        InputError: the stage `precompute` will refuse this resolution.
    """
    factor = vae_factor(configs.vae["block_out_channels"])
    if resolution % factor:
        raise InputError(f"precompute.resolution = {resolution}: must be a multiple of {factor}, the VAE's factor")
    return configs.latent_shape(resolution)


def _read_parts(source: Source, parts: list[str], others: dict[str, dict]) -> tuple[dict[str, dict], str]:
    """The configs of the parts that come from one source, and where they come from."""
    record = source.record
    if "unet_config" in record:
        return {"unet": _own_unet(record["unet_config"], others)}, source.key
    if "path" in record:
        folder = Path(record["path"])
        if not folder.is_dir():
            raise InputError(f"base.path = '{folder}': no such folder; base.source = 'local' needs a Diffusers folder")
        return {part: read_json(folder / part / "config.json") for part in parts}, f"configs of {folder}"
    repo, revision = record["repo"], record["revision"]
    try:
        return _ask_for_configs(source.key, repo, revision, parts), f"configs of {repo}, asked of the hub"
    except InputError as fault:
        cached = {part: _cached_config(repo, revision, part) for part in parts}
        if all(cached.values()):
            return cached, f"configs of {repo}, in the hub client's cache"
        return {part: getattr(SD1, part) for part in parts}, f"the known SD 1.x structure, because {fault}"


def _ask_for_configs(key: str, repo: str, revision: str | None, parts: list[str]) -> dict[str, dict]:
    """The parts' config.json from the hub, and nothing else.

    The repository's info is asked for first: once and for `TIMEOUT_S`, whereas `hf_hub_download` alone would try again
    for minutes where there is no network.
    """
    if key == "base.repo":
        instead = "set base.source: local and base.path to a Diffusers folder on this machine"
    else:
        instead = f"set {key}: null to keep the base's own"
    configs = {}
    disable_progress_bars()
    with asking_hub(key, repo, revision, instead):
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
        names = {sibling.rfilename for sibling in info.siblings}
        for part in parts:
            name = next((name for name in _config_names(part) if name in names), f"{part}/config.json")
            configs[part] = read_json(Path(hf_hub_download(repo, name, revision=revision, etag_timeout=TIMEOUT_S)))
    return configs


@contextmanager
def asking_hub(key: str, repo: str, revision: str | None, instead: str) -> Iterator[None]:
    """Like `hub.explained`; also turns an answer that isn't the hub's into an `InputError`."""
    with hub.explained(key, repo, revision, instead):
        try:
            yield
        except JSONDecodeError:  # e.g. a network's login page
            raise InputError(f"{key} = {repo!r}: the answer from {constants.ENDPOINT} isn't the hub's") from None


def _cached_config(repo: str, revision: str | None, part: str) -> dict | None:
    """A config that the hub's client downloaded before."""
    for name in _config_names(part):
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            return read_json(Path(path))
    return None


def _config_names(part: str) -> tuple[str, ...]:
    """Where a repository may have it; a VAE's own repository has it at its root."""
    return (f"{part}/config.json", "config.json") if part == "vae" else (f"{part}/config.json",)


def _own_unet(config: dict, others: dict[str, dict]) -> dict:
    """The full config that `base.unet_config` leads to, fitted to the other parts as in the stage `base`."""
    channels, width = others["vae"]["latent_channels"], others["text_encoder"]["hidden_size"]
    fitted = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": width, **config}
    try:
        with torch.device("meta"):
            return dict(UNet2DConditionModel(**fitted).config)
    except (TypeError, ValueError) as error:
        raise InputError(f"base.unet_config: {error}") from None


def _check_keys(configs: dict[str, dict], origin: str) -> None:
    """Check that the configs have the keys that the plan reads."""
    for part, config in configs.items():
        if missing := [key for key in _KEYS[part] if key not in config]:
            raise InputError(f"{part}/config.json ({origin}) has no {', '.join(missing)}; sdtrain trains SD 1.x models")


def _check_fit(configs: Configs) -> None:
    """Check the fit that the memory estimate relies on; the stage `base` checks more."""
    for key, expected, other in (
        ("in_channels", configs.vae["latent_channels"], "vae latent_channels"),
        ("cross_attention_dim", configs.text_encoder["hidden_size"], "text_encoder hidden_size"),
    ):
        if configs.unet[key] != expected:
            raise InputError(
                f"the base model's parts don't fit together: unet {key} = {configs.unet[key]}, but {other} = {expected}"
            )


def _count_parameters(configs: Configs) -> dict[str, int]:
    modules = meta_parts(configs, sample_size=64).modules()
    return {part: sum(p.numel() for p in module.parameters()) for part, module in zip(PARTS, modules, strict=True)}


def _stored_bytes(part: str, source: Path) -> int:
    """Bytes that the stage `base` takes of a part: no pickles, no variants like `model.fp16.safetensors`."""
    if source.is_file():
        return source.stat().st_size
    files = [path for path in (source / part).iterdir() if path.suffix in (".json", ".txt", ".safetensors")]
    return sum(path.stat().st_size for path in files if "." not in path.stem)
