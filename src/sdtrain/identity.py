"""What determines a run's weights, as a tree whose hash names the run; and how two such trees differ."""

import ast
import hashlib
import subprocess
from importlib.metadata import version
from pathlib import Path

from sdtrain.files import sha256_json
from sdtrain.manifests import read_manifest
from sdtrain.optimization import OPEN_ENDED
from sdtrain.params import TrainParams, ValidationParams

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors")
_CONTINUATION = {"resume", "resume_reset", "save_every_n_steps", "num_saved_runs", "trackers"}
"""How a run is saved, resumed and watched: never what it computes."""
_SPLIT = {"micro_batch_size", "gradient_checkpointing"}
"""How the same sums are cut up; they change rounding, and a run may move from one machine to another."""
_LENGTH = {"max_steps", "max_epochs"}
"""Stand in `num_steps`, where the learning rate's schedule depends on it."""
_PICTURES = {"prompts", "num_inference_steps", "guidance_scale", "batch_size"}
"""Drawn beside the run; and the split of the held-out loss."""


def training_identity(
    train: TrainParams,
    validation: ValidationParams,
    seed: int,
    num_steps: int,
    base: Path,
    latents: Path,
    origin: dict | None,
) -> dict:
    """The identity of a training run: params, length, base, data, code, libraries and where it branched from."""
    return {
        "seed": seed,
        "train": train.model_dump(exclude=_CONTINUATION | _SPLIT | _LENGTH),
        "validation": validation.model_dump(exclude=_PICTURES),
        "num_steps": None if train.lr_scheduler in OPEN_ENDED else num_steps,
        "base": sha256_json(read_manifest(base, "base")["files"]),
        "latents": sha256_json(read_manifest(latents, "latents")),
        "code": code_hashes("train"),
        "libraries": library_versions(),
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
            texts.append(f"the code of {rest}.py")
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


def code_hashes(module: str) -> dict[str, str]:
    """SHA-256 of a module of this package and of those that it imports, directly or not."""
    folder, hashes, names = Path(__file__).parent, {}, [module]
    while names:
        name = names.pop()
        path = folder / f"{name}.py"
        if name in hashes or not path.exists():
            continue
        source = path.read_bytes()
        hashes[name] = hashlib.sha256(source).hexdigest()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sdtrain":
                parts = node.module.split(".")
                names += [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
    return dict(sorted(hashes.items()))


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic a run rests on."""
    return {name: version(name) for name in _LIBRARIES}


def git_commit() -> str | None:
    """The commit that the working directory has checked out; None outside a git repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
