"""Train on the cached latents: data/checkpoints."""

from sdtrain.params import load_params
from sdtrain.train import train
from sdtrain.training.files import TrainFiles
from stages import paths, run
from stages.launch import launch


def main() -> None:
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
    train(load_params(paths.PARAMS), files)


if __name__ == "__main__":
    launch("stages.train")
    run(main)
