"""Every path of the pipeline. A test checks that dvc.yaml has the same ones."""

import os
from pathlib import Path

PARAMS = Path("params.yaml")

BASE = Path("data/base")
DATASET = Path("data/dataset")
LATENTS = Path("data/latents")
CHECKPOINTS = Path("data/checkpoints")
MODEL = Path("data/model")
SAMPLES = Path("data/samples")
CARD = Path("data/card")
FEATURES = Path("data/features")
EVALUATION = Path("data/evaluation")

DATASET_METRICS = Path("metrics/dataset.json")
PRECOMPUTE_METRICS = Path("metrics/precompute.json")
TRAIN_METRICS = Path("metrics/train.json")
TRAIN_CURVE = Path("metrics/train.csv")
SPEED_CURVE = Path("metrics/train_speed.csv")
VALIDATION_CURVE = Path("metrics/validation.csv")
VALIDATION_IMAGES = Path("plots/validation")
EVALUATE_METRICS = Path("metrics/evaluate.json")
IMAGE_SET_METRICS = Path("metrics/image_sets.json")
VALUES = Path("metrics/values.parquet")
LOSS_TABLE = Path("metrics/loss_by_timestep.csv")
ACCURACY_TABLE = Path("metrics/prompt_accuracy.csv")
RELIGHTING_TABLE = Path("metrics/relighting.csv")

_ROOT = Path(os.environ.get("DVC_ROOT", "."))
RUNS = _ROOT / "runs"
"""The trackers' folder. Not an out: it is in the project even if a `--temp` run works elsewhere."""
STATES = _ROOT / ".dvc" / "tmp" / "resume"
"""Saved states of training. Not an out: DVC deletes outs before a stage runs."""
