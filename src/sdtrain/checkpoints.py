"""Checkpoints: a folder with the raw and the EMA UNet as Diffusers folders, and what made them.

`data/checkpoints/{best,last}/unet/`, `unet_ema/` (where an EMA is kept) and `training_config.json`;
with more than one best, `best-2/`, `best-3/` and so on, by rising held-out loss.
"""

from pathlib import Path

from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel

from sdtrain.ema import averaged
from sdtrain.errors import InputError
from sdtrain.files import new_folder, read_json, write_json
from sdtrain.models import load_unet, training_scheduler

_FOLDERS = {"raw": "unet", "ema": "unet_ema"}


def save_checkpoint(folder: Path, unet: UNet2DConditionModel, ema: EMAModel | None, config: dict) -> None:
    """Write one checkpoint, whole or not at all; leaves the UNet's weights as they are."""
    with new_folder(folder, durable=True) as partial:
        unet.save_pretrained(partial / _FOLDERS["raw"])
        if ema is not None:
            with averaged(unet, ema):
                unet.save_pretrained(partial / _FOLDERS["ema"])
        write_json(partial / "training_config.json", config)


def load_checkpoint(folder: Path, weights: str | None) -> tuple[UNet2DConditionModel, dict]:
    """The UNet of a checkpoint, in fp32 and frozen, and its training_config.

    Args:
        weights: `raw` or `ema`; None takes the EMA where the checkpoint keeps one.

    Raises:
        InputError: the checkpoint isn't there or keeps no such weights.
    """
    if not is_checkpoint(folder):
        raise InputError(f"{folder}: no checkpoint here (it lacks training_config.json); run `dvc repro train`")
    if weights is None:
        weights = "ema" if (folder / _FOLDERS["ema"]).exists() else "raw"
    if not (folder / _FOLDERS[weights]).exists():
        raise InputError(f"{folder}: keeps no {weights} weights; use 'raw', or train with train.use_ema: true")
    return load_unet(folder / _FOLDERS[weights]), read_json(folder / "training_config.json")


def checkpoint_scheduler(base: Path, config: dict) -> DDPMScheduler:
    """The noise schedule that a checkpoint with this training_config was trained on."""
    train = config["params"]["train"]
    return training_scheduler(base, train["prediction_type"], train["zero_terminal_snr"])


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is one that `save_checkpoint` wrote; an exported model isn't."""
    return (folder / "training_config.json").exists() and not (folder / "model_index.json").exists()
