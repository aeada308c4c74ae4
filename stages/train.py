"""Train on the cached latents: data/checkpoints."""

from sdtrain.train import train
from sdtrain.training.files import TrainFiles
from stages import paths, run
from stages.launch import launch
from stages.lease import load_params_and_lease


def main() -> None:
    params = load_params_and_lease(paths.PARAMS)
    launch("stages.train")
    files = TrainFiles(
        base=paths.BASE,
        latents=paths.LATENTS,
        checkpoints=paths.CHECKPOINTS,
        metrics=paths.TRAIN_METRICS,
        train_curve=paths.TRAIN_CURVE,
        speed_curve=paths.SPEED_CURVE,
        validation_curve=paths.VALIDATION_CURVE,
        validation_images=paths.VALIDATION_IMAGES,
        runs=paths.RUNS,
        states=paths.STATES,
    )
    train(params, files)


if __name__ == "__main__":
    run(main)
