"""Draw images of base, trained model and checkpoints to compare: data/samples."""

from sdtrain.ground.gpus import lease_gpus
from sdtrain.params.load import load_params
from sdtrain.sample import SampleFiles, draw_samples
from stages import paths, run


def main() -> None:
    params = load_params(paths.PARAMS)
    lease_gpus()
    files = SampleFiles(
        base=paths.BASE,
        checkpoints=paths.CHECKPOINTS,
        model=paths.MODEL,
        dataset=paths.DATASET,
        latents=paths.LATENTS,
        out=paths.SAMPLES,
    )
    draw_samples(params.sample, params.seed, files)


if __name__ == "__main__":
    run(main)
