"""The image encoder that images are compared by: gather it in `data/features/`, record its origin.

The folder has the encoder in the layout of Transformers, as `evaluation/features.py` reads it, and `manifest.json`.
With `evaluate.features: none` it has the manifest alone.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from sdtrain.ground import hub
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import new_folder, read_json, sha256_file
from sdtrain.ground.manifests import FeaturesManifest
from sdtrain.ground.model_files import choose_files, copy_file
from sdtrain.params.schema import EvaluateParams

_SMALL = ("config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer_config.json",)
_KINDS = ("dinov2", "clip")
"""Of `model_type` in `config.json`."""


def resolve_features(params: EvaluateParams, out: Path) -> FeaturesManifest:
    """Gather the image encoder in `out` and return its manifest.

    Raises:
        InputError: it is missing or isn't reachable, lacks a file, or is no DINOv2 and no CLIP model.
    """
    with new_folder(out) as folder:
        source = _gather(params, folder)
        files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
        manifest = FeaturesManifest(source=source, files=files)
        manifest.write(folder)
    return manifest


def _gather(params: EvaluateParams, folder: Path) -> dict[str, str | None] | None:
    if params.features == "local":
        path = Path(params.features_path)
        where = f"evaluate.features_path = '{path}'"
        if not path.is_dir():
            raise InputError(f"{where}: no such folder; it needs an image encoder in the layout of Transformers")
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        _take(where, names, lambda wanted: {name: path / name for name in wanted}, folder)
        return {"path": str(path)}
    if params.features == "hub":
        key, repo, revision = "evaluate.features_repo", params.features_repo, params.features_revision
        instead = "set evaluate.features: none to evaluate without, or local with a folder on this machine"
        with hub.repository(key, repo, revision, "model", instead) as source:
            _take(f"{key} = {repo!r}", list(source.files), source.fetch, folder)
        return {"repo": repo, "revision": revision, "commit": source.commit}
    return None


def _take(
    where: str, names: Collection[str], fetch: Callable[[Collection[str]], dict[str, Path]], folder: Path
) -> None:
    """Copy the encoder's files; which they are stands in its config, so that comes first."""
    (config,) = choose_files(where, names, "", _SMALL[:1], None)
    path = fetch([config])[config]
    kind = read_json(path).get("model_type")
    if kind not in _KINDS:
        raise InputError(f"{where}: model_type = {kind!r} in its config.json; take a model of {' or '.join(_KINDS)}")
    is_clip = kind == "clip"  # whose captions are read, too
    wanted = choose_files(where, names, "", _SMALL + _TOKENIZER * is_clip, "model", tokenizer=is_clip)
    for name, found in fetch(wanted).items():
        copy_file(where, name, found, folder)
