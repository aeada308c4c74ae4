"""What determines a run's weights, as a tree whose hash names the run; and how two such trees differ."""

import inspect
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sdtrain.ground.files import sha256_file, sha256_json
from sdtrain.ground.imports import SOURCE, import_closure
from sdtrain.ground.manifests import BaseManifest, LatentsManifest
from sdtrain.methods import METHODS, method
from sdtrain.params.schema import Params
from sdtrain.training import selection, step, validation
from sdtrain.training.files import TrainFiles
from sdtrain.training.optimizer import OPEN_ENDED

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors")
_CONTINUATION = {"resume", "resume_reset", "save_every_n_steps", "num_saved_runs", "trackers"}
"""How a run is saved, resumed and tracked: none of it changes what it computes."""
SPLIT = {"micro_batch_size", "gradient_checkpointing"}
"""How the same sums are split; they change rounding only, and a run may move to another machine."""
_LENGTH = {"max_steps", "max_epochs"}
"""Covered by `num_steps`, if the learning rate's schedule depends on it."""
_IMAGES = {"prompts", "num_held_out", "num_inference_steps", "guidance_scale", "batch_size"}
"""Settings of the images drawn during training, and the batches of the held-out loss."""


_COMPUTING_ALONE = (
    "sdtrain.train", "sdtrain.training.run", "sdtrain.training.curves", "sdtrain.training.state_files",
    "sdtrain.training.branching",
)  # fmt: skip
"""The loop, the curves, and what a run resumes or branches with; what these import checks and prints, too."""
_NOT_COMPUTING = (
    "sdtrain", "sdtrain.ground.errors", "sdtrain.methods", "sdtrain.params*",
    "sdtrain.methods.exports", "sdtrain.models.single_file", "sdtrain.models.trained", "sdtrain.ground.headers",
    "sdtrain.ground.layout",
)  # fmt: skip
"""The version; the exceptions; the table of all methods; the params' schema, whose values are in the identity; and what
a method exports with."""


def training_identity(params: Params, files: TrainFiles, num_steps: int, origin: dict | None) -> dict:
    """The identity of a training run: params, length, base, data, code, libraries and where it branched from."""
    # Dropout draws by micro-batch, so with it their size changes more than rounding.
    split = SPLIT - {"micro_batch_size"} if getattr(params.method, "dropout", 0) else SPLIT
    return {
        "method": params.method.model_dump(),
        "train": params.train.model_dump(exclude=_CONTINUATION | split | _LENGTH),
        "validation": params.validation.model_dump(exclude=_IMAGES),
        "num_steps": None if params.train.lr_scheduler in OPEN_ENDED else num_steps,
        "base": sha256_json(BaseManifest.read(files.base).files),
        "latents": sha256_json(LatentsManifest.read(files.latents).model_dump(mode="json")),
        "code": code_hashes(params.method.name),
        "libraries": library_versions(params),
        "origin": origin,
    }


def fingerprint(identity: dict) -> str:
    """16 hex digits that name the run."""
    return sha256_json(identity)[:16]


def differences(theirs: dict, ours: dict, prefix: str = "") -> dict[str, tuple]:
    """Where two identities differ: dotted key to (their value, our value)."""
    found = {}
    for key in dict.fromkeys([*theirs, *ours]):
        one, two, name = theirs.get(key), ours.get(key), f"{prefix}{key}"
        if isinstance(one, dict) and isinstance(two, dict):
            found |= differences(one, two, f"{name}.")
        elif one != two:
            found[name] = (one, two)
    return found


def describe(found: dict[str, tuple]) -> str:
    """Differences in one line, e.g. `train.lr 0.002 there, 1e-05 here; code of train.py`."""
    texts = []
    for name, (theirs, ours) in found.items():
        section, _, rest = name.partition(".")
        if section == "code":
            texts.append(f"the code of {rest}")
        elif section in ("base", "latents"):
            texts.append(f"data/{section}")
        elif name == "num_steps":
            texts.append(
                f"num_steps {theirs} there, {ours} here, on which every step's learning rate depends (only "
                f"train.lr_scheduler = {' or '.join(map(repr, OPEN_ENDED))} can be extended)"
            )
        else:
            texts.append(f"{name} {theirs} there, {ours} here")
    return "; ".join(texts)


def code_hashes(method_name: str) -> dict[str, str]:
    """SHA-256 of the modules that compute: the step, the validation, the choice of the best, this method, and all that
    they import.

    Modules that only check, save or print aren't among them: a new wording doesn't make another run.

    Raises:
        ImportError: one of them imports a module of this package that can't be found.
    """
    computing = (step, validation, selection, method, inspect.getmodule(METHODS[method_name].build))
    files = [Path(module.__file__).resolve() for module in computing]
    alone = [SOURCE.joinpath(*name.split(".")).with_suffix(".py") for name in _COMPUTING_ALONE]
    found = {_module_name(file): file for file in [*files, *alone]}
    found |= import_closure(files, {"sdtrain": SOURCE}, skip=_NOT_COMPUTING)
    return {name: sha256_file(file) for name, file in sorted(found.items())}


def _module_name(file: Path) -> str:
    inside = file.is_relative_to(SOURCE)
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts) if inside else file.stem


def library_versions(params: Params) -> dict[str, str | None]:
    """Versions of the libraries whose arithmetic a run depends on; None is not installed."""
    names = [*_LIBRARIES, *METHODS[params.method.name].libraries]
    if params.train.optimizer == "adamw_8bit":
        names.append("bitsandbytes")
    return {name: version(name) if find_spec(name) else None for name in names}


def git_commit() -> str | None:
    """The commit that the working directory has checked out; None outside a git repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
