"""Checkpoints: a folder with a method's raw and averaged weights, and how they were trained.

`data/checkpoints/{best,last}/raw/`, `ema/` (if an average is kept), each as the method saves it, and
`training_config.json`; with more than one best, `best-2/`, `best-3/` and so on, by rising held-out loss.
`SHA256SUMS` lists each file's SHA-256.
"""

import shutil
from pathlib import Path

from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import check_sealed, new_folder, read_json, seal_folder, write_json
from sdtrain.methods import build_method, first_parts, recorded_method
from sdtrain.methods.method import Method, trained_parameters
from sdtrain.models.ema import averaged
from sdtrain.models.trained import load_base_of


def save_checkpoint(folder: Path, method: Method, ema: EMAModel | None, config: dict) -> None:
    """Write one checkpoint, completely or not at all; doesn't change the weights."""
    with new_folder(folder, durable=True) as partial:
        method.save(partial / "raw")
        if ema is not None:
            with averaged(trained_parameters(method).values(), ema):
                method.save(partial / "ema")
        write_json(partial / "training_config.json", config)
        seal_folder(partial)


def copy_checkpoint(source: Path, target: Path, changes: dict) -> None:
    """Copy a checkpoint, with changes to its training_config.

    Raises:
        InputError: the checkpoint or its copy is damaged.
    """
    shutil.copytree(source, target)
    try:
        hashes = check_sealed(target)
    except InputError:
        check_sealed(source)  # names the source's file if the fault is there
        raise
    config = target / "training_config.json"
    write_json(config, {**read_json(config), **changes})
    seal_folder(target, {name: digest for name, digest in hashes.items() if name != config.name})


def read_checkpoint(folder: Path) -> dict:
    """A checkpoint's training_config.

    Raises:
        InputError: the folder isn't a checkpoint.
    """
    if not is_checkpoint(folder):
        raise InputError(f"{folder}: not a checkpoint (it has no training_config.json); run `dvc repro train`")
    return read_json(folder / "training_config.json")


def load_checkpoint(folder: Path, weights: str | None, base: Path) -> tuple[Method, DDPMScheduler, dict]:
    """The method with a checkpoint's weights around its base, its noise schedule and its training_config.

    Args:
        base: the folder of the base that the checkpoint was trained on.
        weights: `raw` or `ema`; None takes `ema` if the checkpoint has it.

    Raises:
        InputError: the checkpoint isn't there, doesn't have these weights, or was trained on another base.
    """
    config = read_checkpoint(folder)
    if weights is None:
        weights = "ema" if (folder / "ema").exists() else "raw"
    if not (folder / weights).exists():
        raise InputError(f"{folder}: has no {weights} weights; use 'raw', or train with train.use_ema: true")
    params = recorded_method(config["params"]["method"])
    parts, scheduler = load_base_of(folder, base, first_parts(params, base))
    method = build_method(params, parts)
    method.load(folder / weights)
    method.trained.requires_grad_(False).eval()
    return method, scheduler, config


def is_checkpoint(folder: Path) -> bool:
    """Whether `save_checkpoint` wrote the folder; False for an exported model."""
    return (folder / "training_config.json").exists() and (folder / "raw").exists()
