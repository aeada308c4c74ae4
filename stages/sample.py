"""Draw images of base, trained model and checkpoints to compare: data/samples."""

from sdtrain.ground.gpus import lease_gpus
from sdtrain.ground.processes import joined
from sdtrain.params.load import load_params
from sdtrain.params.machine import launch_numbers
from sdtrain.sample import SampleFiles, draw_samples
from stages import paths, run
from stages.launch import launch


def main() -> None:
    params = load_params(paths.PARAMS)
    lease_gpus(launch_numbers()[0])
    launch("stages.sample", one_machine=True)
    files = SampleFiles(
        base=paths.BASE,
        checkpoints=paths.CHECKPOINTS,
        model=paths.MODEL,
        dataset=paths.DATASET,
        latents=paths.LATENTS,
        out=paths.SAMPLES,
    )
    with joined() as processes:
        draw_samples(params.sample, params.seed, files, processes)


if __name__ == "__main__":
    run(main)
