"""A shrunken run's folders, made once by the same functions that the stages call."""

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from accelerate.state import AcceleratorState

from sdtrain.base import resolve_base
from sdtrain.dataset import build_dataset
from sdtrain.evaluate import EvaluateFiles, evaluate_model
from sdtrain.features import resolve_features
from sdtrain.ground.files import read_json, sha256_file, write_json
from sdtrain.ground.samples import Samples
from sdtrain.params.schema import Params, SampleParams
from sdtrain.precompute import precompute_latents
from sdtrain.sample import SampleFiles, draw_samples
from sdtrain.train import train
from sdtrain.training.files import TrainFiles
from tests.conftest import EVERYTHING_LIT, HINTED, WITH_BACKGROUND, merged


@dataclass(frozen=True)
class Run:
    """Where one training run left its results."""

    checkpoints: Path
    metrics: Path
    train_curve: pd.DataFrame
    validation_curve: pd.DataFrame


class Workspace:
    """Base, data set and latents of the shrunken default with `changes`, and a way to train on them."""

    def __init__(self, folder: Path, make_params, root: Path, changes: dict[str, dict] | None = None) -> None:
        self.folder, self._make_params, self._changes = folder, make_params, changes or {}
        self.base, self.dataset, self.latents = folder / "base", folder / "dataset", folder / "latents"
        self.features = folder / "features"
        encoder = {"features_path": str(root / "data" / "builtin_clip")}
        params = self.make_params(base={"path": str(root / "data" / "builtin")}, evaluate=encoder)
        resolve_base(params.base, params.seed, out=self.base)
        resolve_features(params.evaluate, out=self.features)
        build_dataset(params.dataset, params.seed, out=self.dataset, metrics=folder / "dataset.json")
        precompute_latents(
            params.precompute, params.seed, self.base, self.dataset, self.latents, folder / "precompute.json"
        )

    def make_params(self, **changes: dict) -> Params:
        """The shrunken default with this workspace's changes and these."""
        return self._make_params(**merged(self._changes, changes))

    def changed_base(self, out: Path, name: str, **changes) -> Path:
        """A copy of the base as though it had been resolved with these changes to one of its JSON files."""
        shutil.copytree(self.base, out)
        write_json(out / name, {**read_json(out / name), **changes})
        manifest = read_json(out / "manifest.json")
        manifest["files"][name] = sha256_file(out / name)
        write_json(out / "manifest.json", manifest)
        return out

    def release_locks(self) -> None:
        """What the end of a killed process does."""
        gc.collect()

    def train(
        self, out: Path, base: Path | None = None, latents: Path | None = None, seed: int = 0, **changes: dict
    ) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)  # each run chooses its own precision
        params: Params = self.make_params(**changes).model_copy(update={"seed": seed})
        files = self.files(out, base=base or self.base, latents=latents or self.latents)
        train(params, files)
        return Run(files.checkpoints, files.metrics, *map(pd.read_csv, (files.train_curve, files.validation_curve)))

    def evaluate(
        self, model: Path, out: Path, params: Params, checkpoints: Path | None = None, latents: Path | None = None
    ) -> dict:
        """The metrics of a model on the images that its run's validations had; the tables are in `out`, too."""
        if checkpoints is None:
            checkpoints = out / "none"
            checkpoints.mkdir(parents=True)
        files = EvaluateFiles(
            base=self.base, checkpoints=checkpoints, model=model, dataset=self.dataset, latents=latents or self.latents,
            features=self.features, metrics=out / "evaluate.json", image_sets=out / "image_sets.json",
            values=out / "values.parquet", loss_table=out / "loss.csv", accuracy_table=out / "accuracy.csv",
            relighting_table=out / "relighting.csv", pictures=out / "evaluation",
        )  # fmt: skip
        asked = params.evaluate.model_copy(update={"max_samples": params.validation.max_samples})
        evaluate_model(asked, params.method, params.seed, files)
        return read_json(files.metrics)

    def sample(self, model: Path, out: Path, params: SampleParams, **places: Path) -> Samples:
        """Draw `out / "samples"`; `places` replaces folders, e.g. the base."""
        ours = {"base": self.base, "checkpoints": out / "none", "dataset": self.dataset, "latents": self.latents}
        draw_samples(params, 0, SampleFiles(**{**ours, **places}, model=model, out=out / "samples"))
        return Samples.read(out / "samples")

    def files(self, out: Path, **places: Path) -> TrainFiles:
        """The paths of a run whose results are in `out`."""
        ours = {
            "base": self.base,
            "latents": self.latents,
            "checkpoints": out / "checkpoints",
            "metrics": out / "train.json",
            "train_curve": out / "train.csv",
            "speed_curve": out / "train_speed.csv",
            "validation_curve": out / "validation.csv",
            "validation_images": out / "validation",
            "runs": out / "runs",
            "states": out / "resume",
        }
        return TrainFiles(**{**ours, **places})


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, make_params, root) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"), make_params, root)


@pytest.fixture(scope="session")
def hinted(tmp_path_factory, make_params, root) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("hinted"), make_params, root, HINTED)


@pytest.fixture(scope="session")
def relit(tmp_path_factory, make_params, root) -> Workspace:
    """With light by map, and in its cache every condition that IC-Light without a background may need."""
    return Workspace(tmp_path_factory.mktemp("relit"), make_params, root, EVERYTHING_LIT)


@pytest.fixture(scope="session")
def with_background(tmp_path_factory, make_params, root) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("with_background"), make_params, root, WITH_BACKGROUND)


@pytest.fixture(scope="session")
def run(workspace, tmp_path_factory) -> Run:
    """One plain run of the shrunken default."""
    return workspace.train(tmp_path_factory.mktemp("run"))
