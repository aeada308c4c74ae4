"""Train on the cached latents: data/checkpoints."""

from sdtrain.params.machine import load_trainable_params
from sdtrain.train import train
from sdtrain.training.files import TrainFiles
from stages import paths, run
from stages.launch import launch


def main() -> None:
    params = load_trainable_params(paths.PARAMS)
    launch("stages.train")
    files = TrainFiles(
        base=paths.BASE,
        latents=paths.LATENTS,
        checkpoints=paths.CHECKPOINTS,
        metrics=paths.TRAIN_METRICS,
        train_curve=paths.TRAIN_CURVE,
        speed_curve=paths.SPEED_CURVE,
        validation_curve=paths.VALIDATION_CURVE,
        runs=paths.RUNS,
        states=paths.STATES,
    )
    train(params, files)


if __name__ == "__main__":
    run(main)
