"""What the card is about: the model as `data/model` and `data/base` record it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdtrain.ground.errors import InputError
from sdtrain.ground.layout import ADAPTER_FILE, CONTROLNET_FILE, MERGED, UNET_OFFSET
from sdtrain.ground.manifests import BaseManifest
from sdtrain.ground.records import check_record, read_record
from sdtrain.params.schema import ExportParams, IcLightParams, Params


class Recorded(BaseModel):
    """What the card reads of a JSON object, which holds more."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class Source(Recorded):
    """Where parts of the base come from: a hub repository, a local folder, or a random start."""

    parts: list[str]
    repo: str | None = None
    commit: str | None = None
    path: str | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _says_where(self) -> "Source":
        if [self.repo, self.path, self.seed].count(None) != 2 or (self.repo is None) != (self.commit is None):
            raise ValueError("must have repo and commit, or path, or seed")
        return self


class Origin(Recorded):
    """What a run branched from."""

    run: str
    step: int


class Config(Recorded):
    """Of `data/model/training_config.json`."""

    step: int
    num_steps: int
    num_train: int
    num_validation: int
    fingerprint: str
    resumed_from: Origin | None = None
    params: Params
    """All that the run was trained with."""
    export: ExportParams


class Unet(Recorded):
    """Of the base's `unet/config.json`."""

    block_out_channels: Annotated[list[int], Field(min_length=1)]
    cross_attention_dim: int


@dataclass(frozen=True)
class Files:
    """The weights in `data/model`, with their sizes in MiB."""

    folder: Path
    pipeline: float | None
    """The Diffusers folder at its root, if there is one."""
    merged: float | None
    """The Diffusers folder `merged/`, likewise."""
    lora: float | None
    """The LoRA in Diffusers' layout, likewise."""
    controlnet: float | None
    """The ControlNet in Diffusers' layout, likewise."""
    single: dict[str, float]
    """Files for other programs, by name."""


@dataclass(frozen=True)
class Model:
    """Everything that the card says about the model, but for images and metrics."""

    config: Config
    files: Files
    sources: list[Source]
    base: Path
    unet: Unet
    """Of the base, whose sizes the trained one has."""

    @property
    def uses_dora(self) -> bool:
        """Whether it is a LoRA of that kind."""
        method = self.config.params.method
        return method.name == "lora" and method.use_dora

    @property
    def unet_source(self) -> Source | None:
        """Where the base's UNet comes from."""
        return next((source for source in self.sources if "unet" in source.parts), None)

    @property
    def ic_light(self) -> IcLightParams | None:
        """How it was trained, if it is one."""
        method = self.config.params.method
        return method if isinstance(method, IcLightParams) else None

    @property
    def sees(self) -> tuple[str, ...]:
        """What it needs for an image besides the prompt, by the names of conditions."""
        if self.ic_light is None:
            return () if self.files.controlnet is None else ("hint",)
        background = ("background",) if self.ic_light.variant == "fbc" else ()
        return "foreground", *background, *(("light",) if self.ic_light.light == "map" else ())

    @property
    def is_lit(self) -> bool:
        """Whether it was trained on the generated lit world."""
        return self.ic_light is not None and self.config.params.dataset.source == "generated"

    @property
    def has_offset(self) -> bool:
        """Whether the training started from an IC-Light's weights, which are then compared with, too."""
        return any(UNET_OFFSET in source.parts for source in self.sources)


def read_model(model: Path, base: Path) -> Model:
    """Read what the stages `export` and `base` wrote.

    Raises:
        InputError: something is missing or broken; names the file, and the stage that writes it.
    """
    config = read_record(model / "training_config.json", Config, "export")
    manifest = BaseManifest.read(base)
    sources = check_record(manifest.sources, list[Source], str(base / "manifest.json"), "base")
    unet = read_record(base / "unet" / "config.json", Unet, "base")
    return Model(config, _find_files(model, config.export.name), sources, base, unet)


def _find_files(folder: Path, name: str) -> Files:
    """The weights that are there.

    Args:
        name: stem of the single files.

    Raises:
        InputError: there are none.
    """

    def pipeline(root: Path) -> float | None:
        index, nested = root / "model_index.json", root / MERGED
        if not index.is_file():
            return None
        inside = [path for path in root.rglob("*") if path.is_file() and path.parent != root]
        return _mib(index, *(path for path in inside if nested not in path.parents))

    weights = {path.name: _mib(path) for path in sorted(folder.glob("*.safetensors"))}
    singles = [f"{name}{suffix}.safetensors" for suffix in ("", "-merged", "-original")]
    found = Files(
        folder,
        pipeline=pipeline(folder),
        merged=pipeline(folder / MERGED),
        lora=weights.pop(ADAPTER_FILE, None),
        controlnet=weights.pop(CONTROLNET_FILE, None),
        single={single: weights[single] for single in singles if single in weights},
    )
    if (found.pipeline, found.merged, found.lora, found.controlnet) == (None,) * 4:
        kinds = f"model_index.json, {ADAPTER_FILE}, {CONTROLNET_FILE} or {MERGED}/"
        raise InputError(f"{folder}: has no {kinds}; run `dvc repro export`")
    return found


def _mib(*paths: Path) -> float:
    return sum(path.stat().st_size for path in paths) / 2**20
