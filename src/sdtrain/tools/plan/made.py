"""Which of the stages' folders exist and match a params file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdtrain.data.sources import generated_record
from sdtrain.ground.errors import InputError
from sdtrain.ground.layout import UNET_OFFSET
from sdtrain.ground.manifests import BaseManifest, DatasetManifest, LatentsManifest, encoders_fingerprint
from sdtrain.params.schema import BaseParams, DatasetParams, Params
from sdtrain.tools.plan.base import base_sources
from sdtrain.training.files import TrainFiles
from sdtrain.training.spec import check_cache


@dataclass(frozen=True)
class Made:
    """Which folders can be counted."""

    base: bool
    dataset: bool
    latents: bool
    stale: list[str]
    """Why a folder that exists can't."""

    def why_not(self, folder: Path) -> str:
        """Why the folder can't be counted, as the end of a sentence."""
        return next((reason for reason in self.stale if reason.startswith(f"{folder} ")), f"{folder} isn't there")


def find_made(params: Params, files: TrainFiles, dataset: Path) -> Made:
    """Compare each folder's manifest with the params.

    A manifest records where a data set came from, not how it was split, so a change of `dataset.validation_fraction`,
    `dataset.test_fraction` or `dataset.max_train_samples` isn't noticed until DVC has rerun the stage.
    """
    stale: list[str] = []
    base = _is_made(files.base, stale, lambda: _check_base(params.base, files.base))
    data = _is_made(dataset, stale, lambda: _check_dataset(params.dataset, dataset))
    latents = _is_made(files.latents, stale, lambda: _check_latents(params, files))
    for folder, fits in ((files.base, base), (dataset, data)):
        if latents and folder.exists() and not fits:
            latents = False
            stale.append(f"{files.latents} was made from that {folder}; `dvc repro precompute` remakes it")
    return Made(base, data, latents, stale)


def _is_made(folder: Path, stale: list[str], check: Callable[[], None]) -> bool:
    if not folder.exists():
        return False
    try:
        check()
    except InputError as fault:
        stale.append(str(fault))
        return False
    return True


def _check_base(params: BaseParams, folder: Path) -> None:
    """Check that data/base was gathered from what these params name; a folder without a manifest was given by hand."""
    if not (folder / "manifest.json").exists() and (folder / "unet" / "config.json").exists():
        return
    sources, asked = BaseManifest.read(folder).sources, base_sources(params)
    if UNET_OFFSET not in asked and any(UNET_OFFSET in source["parts"] for source in sources):
        raise InputError(f"{folder} was made with a base.unet_offset; `dvc repro base` remakes it")
    for part, wanted in asked.items():
        found = next((source for source in sources if part in source["parts"]), {})
        if any(name not in found or found[name] != value for name, value in wanted.record.items()):
            raise InputError(f"{folder} was made with another {wanted.key}; `dvc repro base` remakes it")


def _check_dataset(params: DatasetParams, folder: Path) -> None:
    """Check that data/dataset was read from the source that these params name."""
    wanted = {
        "generated": {"world": None, "new_fraction": None} | generated_record(params),
        "hub": {"repo": params.repo, "revision": params.revision, "split": params.split},
    }.get(params.source, {"path": str(Path(params.path)), "type": params.source})
    manifest = DatasetManifest.read(folder)
    if {name: manifest.source.get(name) for name in wanted} != wanted:
        raise InputError(f"{folder} was made from another source; `dvc repro dataset` remakes it")
    if manifest.conditions.keys() != params.condition_columns.keys():
        raise InputError(f"{folder} was made with other conditions; `dvc repro dataset` remakes it")


def _check_latents(params: Params, files: TrainFiles) -> None:
    """Check that data/latents was made with these params and the VAE and tokenizer of data/base."""
    manifest = LatentsManifest.read(files.latents)
    check_cache(manifest, params.precompute, params.seed, files.latents)
    has_base = (files.base / "manifest.json").exists()
    if has_base and manifest.encoders_fingerprint != encoders_fingerprint(files.base):
        raise InputError(f"{files.latents} was encoded by another base model; `dvc repro precompute` remakes it")
