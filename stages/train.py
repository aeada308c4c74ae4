"""Fine-tune the UNet on the cached latents: data/checkpoints."""

from sdtrain.params import load_params
from sdtrain.train import train_unet
from stages import paths, run
from stages.launch import launch


def main() -> None:
    params = load_params(paths.PARAMS)
    train_unet(
        params.train,
        params.validation,
        params.precompute,
        params.seed,
        record=params.model_dump(),
        base=paths.BASE,
        latents=paths.LATENTS,
        out=paths.CHECKPOINTS,
        metrics=paths.TRAIN_METRICS,
        train_curve=paths.TRAIN_CURVE,
        speed_curve=paths.SPEED_CURVE,
        validation_curve=paths.VALIDATION_CURVE,
        runs=paths.RUNS,
        resume=paths.RESUME,
    )


if __name__ == "__main__":
    launch("stages.train")
    run(main)
