"""What is known of a training run from params and folders, before anything is loaded; for `train` and the plan."""

from dataclasses import dataclass
from pathlib import Path

from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import LatentsManifest
from sdtrain.params.schema import Params, PrecomputeParams
from sdtrain.training.branching import Origin, find_origin
from sdtrain.training.files import TrainFiles
from sdtrain.training.identity import fingerprint, training_identity
from sdtrain.training.optimizer import check_warmup, count_steps


@dataclass(frozen=True)
class RunSpec:
    """A run whose cache matches its params."""

    params: Params
    files: TrainFiles
    cache: LatentsManifest
    num_train: int
    """Number of images to train on."""
    num_steps: int
    schedule_start: int
    """The step at which the learning rate's schedule starts: 0, or where a branch resets it."""
    identity: dict
    origin: Origin | None
    """What the run branches from."""
    branch: dict | None
    """What training_config.json records of the origin."""

    @property
    def fingerprint(self) -> str:
        """The run's name in the folder of saved states."""
        return fingerprint(self.identity)


def read_spec(params: Params, files: TrainFiles) -> RunSpec:
    """Read a run's params and folders.

    Raises:
        InputError: base or cache is missing, the cache was made with other params, the warm-up outlasts the schedule,
            or the run can't branch from `train.branch_from`.
    """
    train, cache = params.train, LatentsManifest.read(files.latents)
    check_cache(cache, params.precompute, params.seed, files.latents)
    num_train = cache.num_rows("train")
    num_steps = count_steps(train, num_train)
    origin = find_origin(train, files.checkpoints, num_steps)
    schedule_start = origin.step if origin and "scheduler" in origin.reset else 0
    check_warmup(train, num_steps - schedule_start)
    identity = training_identity(params, files, num_steps, origin.record() if origin else None)
    branch = {**origin.record(), "differences": origin.check(identity)} if origin else None
    return RunSpec(params, files, cache, num_train, num_steps, schedule_start, identity, origin, branch)


def check_cache(manifest: LatentsManifest, precompute: PrecomputeParams, seed: int, latents: Path) -> None:
    """Check that the latent cache was made with these params.

    Raises:
        InputError: names what differs.
    """
    ours = {**precompute.model_dump(exclude={"batch_size"}), "seed": seed}
    theirs = {**manifest.params, "seed": manifest.seed}
    for name, value in ours.items():
        if theirs.get(name) != value:
            key = name if name == "seed" else f"precompute.{name}"
            raise InputError(
                f"{latents} was made with {key} = {theirs.get(name)!r}, params.yaml says {value!r}; "
                "run `dvc repro precompute`"
            )
